// Everything of dropout that knows Torch: operators, CPU entry, autograd, and the eager entry.
#include "dropout.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/randint.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "autograd.h"
#include "cpu/dropout_cpu.h"
#include "dropout_op.h"
#include "eager.h"
#include "seed.h"

namespace fastnorm {

// -------------------------------------------------------------------------------------------
// Operators
// -------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastnorm, m) {
  // The int64 element from which all random bits of a call follow.
  m.def("draw_seed(Tensor like, Generator? generator=None) -> Tensor",
        {at::Tag::nondeterministic_seeded});
  // residual + dropout(activation(x + bias)). mask_view is (outer, shared, inner) of
  // common/dropout.h; without a seed nothing is dropped.
  m.def(
      "dropout_fwd(Tensor x, Tensor? bias, Tensor? residual, Tensor? seed, SymInt[3] mask_view, "
      "int activation, float p, int kind) -> Tensor");
  // The same in place, without the fused parts.
  m.def("dropout_(Tensor(a!) x, Tensor seed, SymInt[3] mask_view, float p, int kind) -> ()");
  // The gradient of x; x and bias are given where the activation's derivative needs them.
  m.def(
      "dropout_bwd(Tensor grad_output, Tensor? x, Tensor? bias, Tensor? seed, "
      "SymInt[3] mask_view, int activation, float p, int kind) -> Tensor");
}

at::Tensor draw_seed(const at::Tensor& like, const std::optional<at::Generator>& generator) {
  constexpr int64_t kRange = std::numeric_limits<int64_t>::max();
  const auto options = at::TensorOptions().dtype(at::kLong).device(like.device());
  if (!like.is_cpu()) return at::randint(kRange, {1}, generator, options);
  // at::randint without its overhead, which is more than dropout itself on a small input.
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(
      generator, at::detail::getDefaultCPUGenerator());
  at::Tensor seed = make_empty({1}, options);
  std::lock_guard<std::mutex> lock(source->mutex_);
  *seed.mutable_data_ptr<int64_t>() =
      static_cast<int64_t>(source->random64() % static_cast<uint64_t>(kRange));
  return seed;
}

namespace {

// The bias in the accumulation type, converted once.
template <typename T>
class Bias {
  using A = cpu::acc_t<T>;

 public:
  explicit Bias(const OptionalTensor& t) {
    if (!has(t)) return;
    converted_ = t->to(c10::CppTypeToScalarType<A>::value);
    data_ = converted_.const_data_ptr<A>();
  }
  const A* get() const { return data_; }
  int64_t columns() const { return data_ == nullptr ? 1 : converted_.numel(); }

 private:
  at::Tensor converted_;
  const A* data_ = nullptr;
};

void forward_into(const at::Tensor& y, const at::Tensor& x, const OptionalTensor& bias,
                  const OptionalTensor& residual, const OptionalTensor& seed, at::IntArrayRef view,
                  int64_t activation, double p, int64_t kind) {
  const DropoutConfig config =
      checked_dropout(x, {residual}, bias, seed, view, activation, p, kind);
  if (x.numel() == 0) return;
  visit_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Bias<T> b(bias);
    cpu::dropout_fwd(cpu::DropoutForward<T>{config, x.const_data_ptr<T>(), b.get(),
                                            has(residual) ? residual->const_data_ptr<T>() : nullptr,
                                            y.mutable_data_ptr<T>(), b.columns()});
  });
}

at::Tensor dropout_fwd_cpu(const at::Tensor& x, const OptionalTensor& bias,
                           const OptionalTensor& residual, const OptionalTensor& seed,
                           at::IntArrayRef view, int64_t activation, double p, int64_t kind) {
  at::Tensor y = make_empty_like(x);
  forward_into(y, x, bias, residual, seed, view, activation, p, kind);
  return y;
}

void dropout_inplace_cpu(const at::Tensor& x, const at::Tensor& seed, at::IntArrayRef view,
                         double p, int64_t kind) {
  forward_into(x, x, {}, {}, seed, view, 0, p, kind);
}

at::Tensor dropout_bwd_cpu(const at::Tensor& grad, const OptionalTensor& x,
                           const OptionalTensor& bias, const OptionalTensor& seed,
                           at::IntArrayRef view, int64_t activation, double p, int64_t kind) {
  const DropoutConfig config = checked_dropout(grad, {x}, bias, seed, view, activation, p, kind);
  TORCH_CHECK(activation == 0 || has(x), "fastnorm: the activation's derivative needs x");
  at::Tensor dx = make_empty_like(grad);
  if (grad.numel() == 0) return dx;
  visit_dtype(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Bias<T> b(bias);
    cpu::dropout_bwd(cpu::DropoutBackward<T>{config, grad.const_data_ptr<T>(),
                                             activation != 0 ? x->const_data_ptr<T>() : nullptr,
                                             b.get(), dx.mutable_data_ptr<T>(), b.columns()});
  });
  return dx;
}

at::Tensor dropout_fwd_meta(const at::Tensor& x, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, c10::SymIntArrayRef, int64_t, double, int64_t) {
  return at::empty_like(x);
}

at::Tensor dropout_bwd_meta(const at::Tensor& grad, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, c10::SymIntArrayRef, int64_t, double, int64_t) {
  return at::empty_like(grad);
}

void dropout_inplace_meta(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef, double,
                          int64_t) {}

at::Tensor draw_seed_meta(const at::Tensor& like, const std::optional<at::Generator>&) {
  return at::empty({1}, like.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("draw_seed", draw_seed);
  m.impl("dropout_fwd", dropout_fwd_cpu);
  m.impl("dropout_", dropout_inplace_cpu);
  m.impl("dropout_bwd", dropout_bwd_cpu);
}

TORCH_LIBRARY_IMPL(fastnorm, CUDA, m) { m.impl("draw_seed", draw_seed); }

TORCH_LIBRARY_IMPL(fastnorm, Meta, m) {
  m.impl("draw_seed", draw_seed_meta);
  m.impl("dropout_fwd", dropout_fwd_meta);
  m.impl("dropout_", dropout_inplace_meta);
  m.impl("dropout_bwd", dropout_bwd_meta);
}

// -------------------------------------------------------------------------------------------
// Autograd
// -------------------------------------------------------------------------------------------

namespace {

auto find_op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<at::Tensor(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                        const OptionalTensor&, c10::SymIntArrayRef, int64_t, double, int64_t)>();
}

at::Tensor call_fwd(const at::Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual,
                    const OptionalTensor& seed, const DropoutCall& call) {
  static const auto op = find_op("fastnorm::dropout_fwd");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, bias, residual, seed, c10::fromIntArrayRefUnchecked(call.view), call.activation,
                 call.p, call.kind);
}

at::Tensor call_bwd(const at::Tensor& grad, const OptionalTensor& x, const OptionalTensor& bias,
                    const OptionalTensor& seed, const DropoutCall& call) {
  static const auto op = find_op("fastnorm::dropout_bwd");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(grad, x, bias, seed, c10::fromIntArrayRefUnchecked(call.view), call.activation,
                 call.p, call.kind);
}

void call_inplace(const at::Tensor& x, const at::Tensor& seed, const DropoutCall& call) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnorm::dropout_", "")
                             .typed<void(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef,
                                         double, int64_t)>();
  at::AutoDispatchBelowADInplaceOrView guard;
  op.call(x, seed, c10::fromIntArrayRefUnchecked(call.view), call.p, call.kind);
}

at::Tensor with_strides(const at::Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (t.strides() == strides) return t;
  return at::empty_strided(sizes, strides, t.options()).copy_(t);
}

// With create_graph an activation's derivative must itself be differentiable: the gradients of
// the pure-PyTorch reference. A first backward never comes here.
variable_list reference_vjp(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& bias,
                            const at::Tensor& seed, const DropoutCall& call) {
  namespace py = pybind11;
  py::gil_scoped_acquire gil;
  const auto object = [](const at::Tensor& t) -> py::object {
    return t.defined() ? py::cast(t) : py::none();
  };
  const py::object result =
      py::module_::import("fastnorm._dropout")
          .attr("reference_vjp")(grad, x, object(bias), object(seed), call.activation, call.p);
  variable_list out;
  for (const py::handle item : result) {
    out.push_back(item.is_none() ? at::Tensor() : py::cast<at::Tensor>(item));
  }
  return out;
}

// Inputs: x, bias, residual. Only the seed is saved, and what an activation's derivative needs.
struct DropoutNode final : public Node {
  DropoutCall call;
  std::vector<int64_t> sizes, strides;  // of x: the mask's indices are positions in its memory
  SavedVariable x, bias, seed;

  std::string name() const override { return "FastnormDropoutBackward"; }

  void remember(const at::Tensor& x_, const at::Tensor& bias_, const at::Tensor& seed_,
                const DropoutCall& call_) {
    call = call_;
    sizes = x_.sizes().vec();
    strides = x_.strides().vec();
    seed = SavedVariable(seed_, false);
    if (call.activation != 0) {
      x = SavedVariable(x_, false);
      bias = SavedVariable(bias_, false);
    }
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    bias.reset_data();
    seed.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    // Held while the saved tensors are read only: a recorded backward runs the engine again.
    std::unique_lock<std::mutex> lock(mutex_);
    variable_list out(3);
    if (!grads[0].defined()) return out;
    if (task_should_compute_output(2)) out[2] = grads[0];
    const bool wants_bias = task_should_compute_output(1);
    if (!task_should_compute_output(0) && !wants_bias) return out;
    const at::Tensor grad = with_strides(grads[0], sizes, strides);
    const at::Tensor seed_ = seed.unpack(), x_ = x.unpack(), bias_ = bias.unpack();
    lock.unlock();
    at::Tensor dx;
    if (call.activation == 0) {
      dx = at::GradMode::is_enabled() ? masked_gradient(grad, optional(seed_), call)
                                      : call_bwd(grad, {}, {}, optional(seed_), call);
    } else {
      if (at::GradMode::is_enabled()) {
        variable_list vjp = reference_vjp(grad, x_, bias_, seed_, call);
        out[0] = vjp[0];
        out[1] = vjp[1];
        return out;
      }
      dx = call_bwd(grad, x_, optional(bias_), optional(seed_), call);
    }
    if (wants_bias) out[1] = dx.reshape({-1, dx.size(-1)}).sum(0);
    out[0] = std::move(dx);
    return out;
  }
};

}  // namespace

at::Tensor masked_gradient(const at::Tensor& grad, const OptionalTensor& seed,
                           const DropoutCall& call) {
  decltype(make_node<DropoutNode>()) node;
  if (torch::autograd::compute_requires_grad(grad)) {
    node = make_node<DropoutNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(grad, at::Tensor(), at::Tensor()));
    node->remember(grad, {}, value_or_undefined(seed), call);
  }
  at::Tensor out = call_bwd(grad, {}, {}, seed, call);
  if (node) torch::autograd::set_history(out, node);
  return out;
}

at::Tensor dropout(const at::Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual,
                   const OptionalTensor& seed, const DropoutCall& call) {
  const at::Tensor b = value_or_undefined(bias), r = value_or_undefined(residual);
  decltype(make_node<DropoutNode>()) node;
  if (torch::autograd::compute_requires_grad(x, b, r)) {
    node = make_node<DropoutNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, b, r));
    node->remember(x, b, value_or_undefined(seed), call);
  }
  at::Tensor y = call_fwd(x, bias, residual, seed, call);
  if (node) torch::autograd::set_history(y, node);
  return y;
}

namespace {

// x is a dense tensor that autograd lets us overwrite (not a leaf that requires grad, no view).
void dropout_inplace(const at::Tensor& x, const at::Tensor& seed, const DropoutCall& call) {
  decltype(make_node<DropoutNode>()) node;
  if (torch::autograd::compute_requires_grad(x)) {
    node = make_node<DropoutNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, at::Tensor(), at::Tensor()));
    node->remember(x, {}, seed, call);
  }
  call_inplace(x, seed, call);
  torch::autograd::increment_version(x);
  if (node) torch::autograd::rebase_history(x, node);
}

}  // namespace

std::optional<std::array<int64_t, 3>> mask_view(const at::Tensor& x, uint64_t shared) {
  if (shared == 0) return std::array<int64_t, 3>{x.numel(), 1, 1};
  c10::SmallVector<int64_t, 8> order;  // dimensions of more than one element, outermost first
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  std::array<int64_t, 3> view{1, 1, 1};
  size_t stretch = 0;
  for (const int64_t d : order) {
    const bool is_shared = (shared >> d) & 1;
    if (is_shared && stretch == 2) return std::nullopt;
    if (is_shared) stretch = 1;
    if (!is_shared && stretch == 1) stretch = 2;
    view[stretch] *= x.size(d);
  }
  return view;
}

// -------------------------------------------------------------------------------------------
// The eager entry
// -------------------------------------------------------------------------------------------

namespace {

namespace py = pybind11;

std::optional<bool> to_bool(const py::handle& object) {
  if (object.ptr() == Py_True) return true;
  if (object.ptr() == Py_False) return false;
  return std::nullopt;
}

// None, or a generator of x's device; false for anything else.
bool to_generator(const py::handle& object, const at::Tensor& x,
                  std::optional<at::Generator>& out) {
  if (object.is_none()) return true;
  if (!THPGenerator_Check(object.ptr())) return false;
  out = reinterpret_cast<THPGenerator*>(object.ptr())->cdata;
  return out->device().type() == x.device().type() &&
         (!x.device().has_index() || !out->device().has_index() ||
          out->device().index() == x.device().index());
}

bool fits_bias(const at::Tensor& bias, const at::Tensor& x) {
  return !bias.defined() || (x.dim() > 0 && x.is_contiguous() && bias.dim() == 1 &&
                             bias.is_contiguous() && bias.numel() == x.size(-1) &&
                             bias.scalar_type() == x.scalar_type() && bias.device() == x.device());
}

bool fits_residual(const at::Tensor& residual, const at::Tensor& x) {
  return !residual.defined() ||
         (residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type() &&
          residual.device() == x.device());
}

// Takes a call that it understands in full, and returns None for every other one: Python then
// validates, explains and chooses. `shared` is a bit set of dimensions.
py::object eager_dropout(const py::handle& input, const py::handle& probability,
                         const py::handle& training, const py::handle& inplace, int64_t kind,
                         uint64_t shared, int64_t activation, const py::handle& bias,
                         const py::handle& residual, const py::handle& generator) {
  at::Tensor x, b, r;
  std::optional<at::Generator> source;
  const std::optional<bool> train = to_bool(training), overwrite = to_bool(inplace);
  if (!undisturbed() || !train || !overwrite || activation < 0 ||
      !(PyFloat_Check(probability.ptr()) || PyLong_Check(probability.ptr())) ||
      !plain_tensor(input.ptr(), x) || !x.defined() || x.numel() == 0 ||
      !plain_tensor(bias.ptr(), b) || !plain_tensor(residual.ptr(), r) ||
      !to_generator(generator, x, source) || !fits_bias(b, x) || !fits_residual(r, x)) {
    return py::none();
  }
  const double p = PyFloat_AsDouble(probability.ptr());
  if (!(p >= 0.0 && p <= 1.0)) {
    PyErr_Clear();
    return py::none();
  }
  const bool drops = *train && p > 0.0;
  const bool fused = activation != 0 || b.defined() || r.defined();
  if (!drops && !fused) return py::reinterpret_borrow<py::object>(input);
  if (*overwrite &&
      (fused || x.is_view() || x.is_inference() || !x.is_non_overlapping_and_dense() ||
       (x.requires_grad() && x.is_leaf() && at::GradMode::is_enabled()))) {
    return py::none();
  }
  at::Tensor y;
  bool understood = false;
  {
    py::gil_scoped_release release;
    if (!x.is_non_overlapping_and_dense()) x = x.contiguous();
    const auto view = mask_view(x, drops ? shared : 0);
    understood = view.has_value();
    if (view) {
      const DropoutCall call{*view, activation, p, kind};
      const OptionalTensor seed = drops ? OptionalTensor(draw_seed(x, source)) : std::nullopt;
      if (*overwrite) {
        dropout_inplace(x, *seed, call);
      } else {
        if (r.defined()) r = with_strides(r, x.sizes(), x.strides());
        y = dropout(x, optional(b), optional(r), seed, call);
      }
    }
  }
  if (!understood) return py::none();
  if (y.defined()) return py::reinterpret_steal<py::object>(THPVariable_Wrap(y));
  if (*overwrite) return py::reinterpret_borrow<py::object>(input);
  return py::none();
}

// The call that Python has validated and laid out.
at::Tensor prepared_dropout(const at::Tensor& x, const OptionalTensor& bias,
                            const OptionalTensor& residual, const OptionalTensor& seed,
                            std::array<int64_t, 3> view, int64_t activation, double p,
                            int64_t kind) {
  py::gil_scoped_release release;
  return dropout(x, bias, residual, seed, {view, activation, p, kind});
}

}  // namespace

void register_dropout(py::module_& m) {
  using torch::wrap_pybind_function;
  m.def("dropout", wrap_pybind_function(eager_dropout));
  m.def("prepared_dropout", wrap_pybind_function(prepared_dropout));
}

}  // namespace fastnorm
