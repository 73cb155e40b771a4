// Cross-entropy: schema, CPU entry, autograd, and the eager entry.
#include "cross_entropy.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "autograd.h"
#include "cpu/cross_entropy_cpu.h"
#include "eager.h"

TORCH_LIBRARY_FRAGMENT(fastnorm, m) {
  // Loss (a scalar, or one per row for reduction 0) of rows of logits with class ids, in float32
  // or double; its gradient for the input (empty unless asked for); and what the gradient is still
  // to be multiplied by, besides that of the loss: 1, except where masked logits change the weight
  // that a weighted mean divides by. Reduction: 0 none, 1 mean, 2 sum.
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, Tensor? prior, "
      "float label_smoothing, int ignore_index, int reduction, bool torch_mean, bool need_grad) "
      "-> (Tensor loss, Tensor grad, Tensor scale)");
  // grad *= factor (one element), which on CUDA reads nothing more where the factor is 1; on a CPU
  // the caller can look for itself.
  m.def("scale_gradient_(Tensor(a!) grad, Tensor factor) -> ()");
}

namespace fastnorm::cpu {
namespace {

// What the mean divides by, and the sum of the rows' mass it takes for granted.
template <typename A>
double total_mass(const CrossEntropy<A>& p, bool torch_mean) {
  double smooth = 0, priors = 0, total = 0;
  for (int64_t k = 0; k < p.classes; ++k) {
    const double u = p.prior == nullptr ? 1.0 : p.prior[k];
    priors += u;
    smooth += u * (p.weight == nullptr ? 1.0 : p.weight[k]);
  }
  const double share = torch_mean ? 0.0 : p.smoothing;
  const double spread = priors > 0 ? share * smooth / priors : 0.0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.target[i] == p.ignore_index) continue;
    const double hard = p.weight == nullptr ? 1.0 : p.weight[p.target[i]];
    total += p.weight == nullptr ? 1.0 : (1 - share) * hard + spread;
  }
  return total;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_op(
    const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& prior, double label_smoothing, int64_t ignore_index, int64_t reduction,
    bool torch_mean, bool need_grad) {
  check_cross_entropy(input, target, weight, prior);
  const int64_t rows = input.size(0), classes = input.size(1);
  const int64_t* ids = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_CHECK_INDEX(ids[i] == ignore_index || (ids[i] >= 0 && ids[i] < classes), "Target ",
                      ids[i], " is out of bounds: expected 0 to ", classes - 1);
  }
  const at::ScalarType wide = accumulate_type(input.scalar_type());
  const auto options = input.options().dtype(wide);
  at::Tensor grad = make_empty({need_grad ? rows : 0, classes}, input.options());
  at::Tensor scale = make_empty({}, options);
  at::Tensor loss = reduction == 0 ? make_empty({rows}, options) : make_empty({}, options);
  visit_dtype(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const at::Tensor w = converted(weight, wide), u = converted(prior, wide);
    c10::SmallVector<A, 64> losses(reduction == 0 ? 0 : rows), mass(rows);
    CrossEntropy<T> p{rows,
                      classes,
                      input.const_data_ptr<T>(),
                      ids,
                      pointer_or_null<A>(w),
                      pointer_or_null<A>(u),
                      label_smoothing,
                      ignore_index,
                      A(1),
                      reduction == 0 ? loss.mutable_data_ptr<A>() : losses.data(),
                      mass.data(),
                      need_grad ? grad.mutable_data_ptr<T>() : nullptr};
    double total = 1;
    if (reduction == 1) {
      total = total_mass(
          CrossEntropy<A>{rows, classes, nullptr, ids, p.weight, p.prior, label_smoothing,
                          ignore_index, A(1), nullptr, nullptr, nullptr},
          torch_mean);
      if (total == 0 && !torch_mean) total = 1;
      p.scale = static_cast<A>(1 / total);
    }
    cross_entropy(p);
    double correction = 1;
    if (reduction == 1 && p.weight != nullptr && label_smoothing > 0 && !torch_mean) {
      double actual = 0;
      for (int64_t i = 0; i < rows; ++i) actual += p.mass[i];
      // Only masked logits move it by more than the rounding of its terms.
      const double rounding = 4 * std::numeric_limits<A>::epsilon();
      const bool moved = std::abs(actual - total) > rounding * std::abs(total);
      if (moved && actual != 0) correction = total / actual;
    }
    *scale.mutable_data_ptr<A>() = static_cast<A>(correction);
    if (reduction != 0) {
      double sum = 0;
      for (int64_t i = 0; i < rows; ++i) sum += p.loss[i];
      *loss.mutable_data_ptr<A>() = static_cast<A>(sum / total * correction);
    }
  });
  return {std::move(loss), std::move(grad), std::move(scale)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) { m.impl("cross_entropy", cross_entropy_op); }

}  // namespace fastnorm::cpu

// -------------------------------------------------------------------------------------------
// Autograd
// -------------------------------------------------------------------------------------------

namespace fastnorm {
namespace {

struct CrossEntropyCall {
  double label_smoothing = 0.0;
  int64_t ignore_index = -100;
  int64_t reduction = 1;
  bool torch_mean = false;
};

Three call_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const at::Tensor& weight, const at::Tensor& prior,
                         const CrossEntropyCall& c, bool need_grad) {
  static const auto handle =
      op<Three(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
               double, int64_t, int64_t, bool, bool)>("fastnorm::cross_entropy");
  at::AutoDispatchBelowADInplaceOrView guard;
  return handle.call(input, target, optional(weight), optional(prior), c.label_smoothing,
                     c.ignore_index, c.reduction, c.torch_mean, need_grad);
}

void scale_gradient(const at::Tensor& grad, const at::Tensor& factor) {
  static const auto handle =
      op<void(const at::Tensor&, const at::Tensor&)>("fastnorm::scale_gradient_");
  handle.call(grad, factor);
}

// The gradient is computed with the loss. Held apart from the saved tensors, it can be scaled in
// place and handed on; a second pass over a retained graph computes it again.
struct CrossEntropyNode final : public Node {
  CrossEntropyCall call;
  SavedVariable input, target;
  at::Tensor weight, prior, grad, scale;

  std::string name() const override { return "FastnormCrossEntropyBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    input.reset_data();
    target.reset_data();
    weight.reset();
    prior.reset();
    grad.reset();
    scale.reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!grads[0].defined() || !task_should_compute_output(0)) return {at::Tensor()};
    const at::Tensor x = input.unpack(), ids = target.unpack();
    const at::Tensor weight_ = weight, prior_ = prior, scale_ = scale;
    if (at::GradMode::is_enabled()) {
      lock.unlock();
      return {reference_vjp(grads[0], x, ids, weight_, prior_)};
    }
    at::Tensor dx = std::exchange(grad, at::Tensor());
    lock.unlock();
    if (!dx.defined()) dx = std::get<1>(call_cross_entropy(x, ids, weight_, prior_, call, true));
    const at::Tensor& dloss = grads[0];
    at::AutoDispatchBelowADInplaceOrView guard;
    if (at::isTensorSubclassLike(dloss)) {
      const at::Tensor factor = dloss * scale_;
      return {(dx * (call.reduction == 0 ? factor.unsqueeze(-1) : factor)).to(dx.scalar_type())};
    }
    if (call.reduction == 0) return {dx.mul_(dloss.unsqueeze(1))};
    // The usual gradient of a loss is 1, which saves a pass; looking is free on a CPU.
    if (!dloss.is_cpu()) {
      scale_gradient(dx, dloss * scale_);
      return {dx};
    }
    const double factor = dloss.item<double>() * scale_.item<double>();
    if (factor != 1) dx.mul_(factor);
    return {dx};
  }

 private:
  // With create_graph the backward must itself be differentiable: fastnorm.losses takes the
  // gradient of the pure-PyTorch reference. A first backward never comes here.
  at::Tensor reference_vjp(const at::Tensor& dloss, const at::Tensor& x, const at::Tensor& ids,
                           const at::Tensor& weight_, const at::Tensor& prior_) const {
    namespace py = pybind11;
    py::gil_scoped_acquire gil;
    return py::module_::import("fastnorm.losses")
        .attr("reference_vjp")(dloss, x, ids, optional(weight_), optional(prior_),
                               call.label_smoothing, call.ignore_index, call.reduction,
                               call.torch_mean)
        .cast<at::Tensor>();
  }
};

// Rows of logits and class ids, as the operator takes them; differentiable in the logits.
at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const at::Tensor& weight, const at::Tensor& prior,
                         const CrossEntropyCall& call) {
  const bool train = torch::autograd::compute_requires_grad(input);
  auto [loss, grad, scale] = call_cross_entropy(input, target, weight, prior, call, train);
  if (train) {
    auto node = make_node<CrossEntropyNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(input));
    node->call = call;
    node->input = SavedVariable(input, false);
    node->target = SavedVariable(target, false);
    node->weight = weight;
    node->prior = prior;
    node->grad = std::move(grad);
    node->scale = std::move(scale);
    torch::autograd::set_history(loss, node);
  }
  return loss;
}

// -------------------------------------------------------------------------------------------
// The eager entry
// -------------------------------------------------------------------------------------------

namespace py = pybind11;

// One constant for each class, or none.
bool fits_classes(const at::Tensor& t, const at::Tensor& x) {
  return !t.defined() ||
         (t.dim() == 1 && t.size(0) == x.size(1) && t.device() == x.device() && !t.requires_grad());
}

// cross_entropy of rows of logits with int64 class ids.
py::object eager_cross_entropy(const py::handle& input, const py::handle& target,
                               const py::handle& weight, const py::handle& label_smoothing,
                               const py::handle& prior, const py::handle& ignore_index,
                               int64_t reduction, const py::handle& torch_mean) {
  at::Tensor x, ids, w, u;
  if (!undisturbed() || reduction < 0 || !PyFloat_CheckExact(label_smoothing.ptr()) ||
      !PyLong_CheckExact(ignore_index.ptr()) || !PyBool_Check(torch_mean.ptr()) ||
      !plain_tensor(input.ptr(), x) || !x.defined() || x.dim() != 2 || x.numel() == 0 ||
      !plain_tensor(target.ptr(), ids, true) || !ids.defined() || ids.dim() != 1 ||
      ids.size(0) != x.size(0) || ids.device() != x.device() || !plain_tensor(weight.ptr(), w) ||
      !fits_classes(w, x) || !plain_tensor(prior.ptr(), u) || !fits_classes(u, x)) {
    return py::none();
  }
  CrossEntropyCall call;
  call.label_smoothing = PyFloat_AS_DOUBLE(label_smoothing.ptr());
  int overflow = 0;
  call.ignore_index = PyLong_AsLongLongAndOverflow(ignore_index.ptr(), &overflow);
  call.reduction = reduction;
  call.torch_mean = torch_mean.ptr() == Py_True;
  if (overflow != 0 || !(call.label_smoothing >= 0 && call.label_smoothing <= 1)) {
    return py::none();
  }
  at::Tensor loss;
  {
    py::gil_scoped_release release;
    loss = cross_entropy(dense(x), dense(ids), w, u, call);
    if (loss.scalar_type() != x.scalar_type() &&
        !at::autocast::is_autocast_enabled(x.device().type())) {
      loss = loss.to(x.scalar_type());
    }
  }
  return wrap(loss);
}

// The call that Python has validated and laid out.
at::Tensor prepared_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                  const OptionalTensor& weight, const OptionalTensor& prior,
                                  double label_smoothing, int64_t ignore_index, int64_t reduction,
                                  bool torch_mean) {
  py::gil_scoped_release release;
  return cross_entropy(input, target, value_or_undefined(weight), value_or_undefined(prior),
                       {label_smoothing, ignore_index, reduction, torch_mean});
}

}  // namespace

void register_cross_entropy(py::module_& m) {
  using torch::wrap_pybind_function;
  m.def("cross_entropy", wrap_pybind_function(eager_cross_entropy));
  m.def("prepared_cross_entropy", wrap_pybind_function(prepared_cross_entropy));
}

}  // namespace fastnorm
