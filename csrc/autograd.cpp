#include "autograd.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include "dropout.h"

namespace fastnorm {
namespace {

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Three call_norm_fwd(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& residual, const OptionalTensor& mean,
                    const OptionalTensor& var, const OptionalTensor& seed, const NormCall& c) {
  static const auto handle = op<Three(
      const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, c10::SymIntArrayRef,
      int64_t, double, double, int64_t, double)>("fastnorm::norm_fwd");
  at::AutoDispatchBelowADInplaceOrView guard;
  return handle.call(x, weight, bias, residual, mean, var, seed,
                     c10::fromIntArrayRefUnchecked(c.view), c.statistic, c.eps, c.weight_offset,
                     c.activation, c.dropout_p);
}

Four call_norm_bwd(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& residual,
                   const OptionalTensor& mean, const at::Tensor& var, const OptionalTensor& seed,
                   const NormCall& c, bool frozen, std::array<bool, 4> mask) {
  static const auto handle =
      op<Four(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
              const OptionalTensor&, c10::SymIntArrayRef, int64_t, bool, double, double, int64_t,
              double, std::array<bool, 4>)>("fastnorm::norm_bwd");
  at::AutoDispatchBelowADInplaceOrView guard;
  return handle.call(dy, x, weight, bias, residual, mean, var, seed,
                     c10::fromIntArrayRefUnchecked(c.view), c.statistic, frozen, c.eps,
                     c.weight_offset, c.activation, c.dropout_p, mask);
}

Four call_add_norm_fwd(const at::Tensor& x, const at::Tensor& residual,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& seed, const NormCall& c) {
  static const auto handle =
      op<Four(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, c10::SymIntArrayRef, int64_t, double, double, double)>(
          "fastnorm::add_norm_fwd");
  at::AutoDispatchBelowADInplaceOrView guard;
  return handle.call(x, residual, weight, bias, seed, c10::fromIntArrayRefUnchecked(c.view),
                     c.statistic, c.eps, c.weight_offset, c.dropout_p);
}

Four call_add_norm_bwd(const OptionalTensor& dy, const OptionalTensor& dsum, const at::Tensor& sum,
                       const OptionalTensor& weight, const OptionalTensor& mean,
                       const at::Tensor& var, const OptionalTensor& seed, const NormCall& c,
                       std::array<bool, 4> mask) {
  static const auto handle = op<Four(
      const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&,
      const OptionalTensor&, const at::Tensor&, const OptionalTensor&, c10::SymIntArrayRef, int64_t,
      double, double, double, std::array<bool, 4>)>("fastnorm::add_norm_bwd");
  at::AutoDispatchBelowADInplaceOrView guard;
  return handle.call(dy, dsum, sum, weight, mean, var, seed, c10::fromIntArrayRefUnchecked(c.view),
                     c.statistic, c.eps, c.weight_offset, c.dropout_p, mask);
}

// The gradient of a parameter comes back flat.
at::Tensor shaped_like(at::Tensor grad, const at::Tensor& parameter) {
  return grad.dim() == parameter.dim() ? grad : grad.view(parameter.sizes());
}

// With create_graph, a backward must itself be differentiable: fastnorm._ops.differentiable_vjp
// takes the gradients of the pure-PyTorch reference. A first backward never comes here.
variable_list differentiable_vjp(bool prologue, const variable_list& grads,
                                 const variable_list& inputs, const at::Tensor& mean,
                                 const at::Tensor& var, const at::Tensor& seed, const NormCall& c,
                                 const std::vector<bool>& needs) {
  namespace py = pybind11;
  py::gil_scoped_acquire gil;
  const auto object = [](const at::Tensor& t) -> py::object {
    return t.defined() ? py::cast(t) : py::none();
  };
  const auto list = [&](const variable_list& tensors) {
    py::list out;
    for (const auto& t : tensors) out.append(object(t));
    return out;
  };
  py::object result =
      py::module_::import("fastnorm._ops")
          .attr("differentiable_vjp")(prologue, list(grads), list(inputs), object(mean),
                                      object(var), object(seed), py::cast(c.view), c.statistic,
                                      c.eps, c.weight_offset, c.activation, c.dropout_p, needs);
  variable_list out;
  for (const py::handle item : result) {
    out.push_back(item.is_none() ? at::Tensor() : py::cast<at::Tensor>(item));
  }
  return out;
}

struct NormNode final : public Node {
  NormCall call;
  bool frozen = false;
  SavedVariable x, weight, bias, residual;
  at::Tensor mean, var, seed;  // made by us, seen by nobody else
  bool has_residual = false;

  std::string name() const override { return "FastnormNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    weight.reset_data();
    bias.reset_data();
    residual.reset_data();
    mean.reset();
    var.reset();
    seed.reset();
  }

  variable_list apply(variable_list&& grads) override {
    // Held while the saved tensors are read only: a recorded backward runs the engine again.
    std::unique_lock<std::mutex> lock(mutex_);
    variable_list out(4);
    if (!grads[0].defined()) return out;
    const auto self = getptr();
    const at::Tensor x_ = x.unpack(self), weight_ = weight.unpack(self);
    const at::Tensor bias_ = bias.unpack(self), residual_ = residual.unpack(self);
    const at::Tensor mean_ = mean, var_ = var, seed_ = seed;
    lock.unlock();
    std::vector<bool> needs;
    for (size_t i = 0; i < 4; ++i) needs.push_back(task_should_compute_output(i));
    if (at::GradMode::is_enabled()) {
      // Without an activation the residual is not saved; its gradient does not need it.
      return differentiable_vjp(false, grads, {x_, weight_, bias_, residual_},
                                frozen ? mean_ : at::Tensor(), frozen ? var_ : at::Tensor(), seed_,
                                call, needs);
    }
    const bool epilogue = call.activation != 0 || seed_.defined();
    const at::Tensor dy = laid_out_like(grads[0], x_);
    const std::array<bool, 4> mask{needs[0], needs[1], needs[2], needs[3] && epilogue};
    if (mask[0] || mask[1] || mask[2] || mask[3]) {
      auto [dx, dw, db, dr] =
          call_norm_bwd(dy, x_, optional(weight_), optional(bias_), optional(residual_),
                        optional(mean_), var_, optional(seed_), call, frozen, mask);
      if (mask[0]) out[0] = dx;
      if (mask[1]) out[1] = shaped_like(dw, weight_);
      if (mask[2]) out[2] = shaped_like(db, bias_);
      if (mask[3]) out[3] = dr;
    }
    if (needs[3] && !epilogue) out[3] = grads[0];
    return out;
  }
};

struct AddNormNode final : public Node {
  NormCall call;
  SavedVariable sum, weight, bias;
  at::Tensor mean, var, seed;

  std::string name() const override { return "FastnormAddNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    sum.reset_data();
    weight.reset_data();
    bias.reset_data();
    mean.reset();
    var.reset();
    seed.reset();
  }

  variable_list apply(variable_list&& grads) override {
    std::unique_lock<std::mutex> lock(mutex_);
    variable_list out(4);
    if (!grads[0].defined() && !grads[1].defined()) return out;
    const auto self = getptr();
    const at::Tensor sum_ = sum.unpack(self), weight_ = weight.unpack(self);
    const at::Tensor bias_ = bias.unpack(self), mean_ = mean, var_ = var, seed_ = seed;
    lock.unlock();
    std::vector<bool> needs;  // in the order x, residual, weight, bias
    for (size_t i = 0; i < 4; ++i) needs.push_back(task_should_compute_output(i));
    if (at::GradMode::is_enabled()) {
      return differentiable_vjp(true, grads, {sum_, weight_, bias_}, {}, {}, seed_, call, needs);
    }
    const bool dropout = seed_.defined();
    OptionalTensor dsum;
    if (grads[1].defined()) dsum = laid_out_like(grads[1], sum_);
    if (!grads[0].defined()) {  // the norm's output is unused: its derivative may be infinite
      const DropoutCall mask{{sum_.numel(), 1, 1}, 0, call.dropout_p};
      if (needs[0]) out[0] = dropout ? masked_gradient(*dsum, seed_, mask) : *dsum;
      if (needs[1]) out[1] = *dsum;
      return out;
    }
    const at::Tensor dy = laid_out_like(grads[0], sum_);
    // Without dropout x and the residual have the same gradient, written once.
    const bool want_dx = needs[0] && dropout, want_dr = needs[1] || (needs[0] && !dropout);
    auto [dx, dw, db, dr] =
        call_add_norm_bwd(dy, dsum, sum_, optional(weight_), optional(mean_), var_, optional(seed_),
                          call, {want_dx, needs[2], needs[3], want_dr});
    if (needs[0]) out[0] = dropout ? dx : dr;
    if (needs[1]) out[1] = dr;
    if (needs[2]) out[2] = shaped_like(dw, weight_).to(weight_.scalar_type());
    if (needs[3]) out[3] = shaped_like(db, bias_).to(bias_.scalar_type());
    return out;
  }
};

}  // namespace

at::Tensor laid_out_like(const at::Tensor& t, const at::Tensor& x) {
  if (t.scalar_type() == x.scalar_type() && same_layout(t, x)) return t;
  at::Tensor out = at::empty_like(x);
  out.copy_(t);
  return out;
}

NormOutput norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& residual, const OptionalTensor& mean_in,
                const OptionalTensor& var_in, const OptionalTensor& seed, const NormCall& call) {
  using torch::autograd::compute_requires_grad;
  const at::Tensor w = value_or_undefined(weight), b = value_or_undefined(bias);
  const at::Tensor r = value_or_undefined(residual);
  decltype(make_node<NormNode>()) node;
  if (compute_requires_grad(x, w, b, r)) {
    node = make_node<NormNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, w, b, r));
  }
  NormOutput out;
  std::tie(out.y, out.mean, out.var) =
      call_norm_fwd(x, weight, bias, residual, mean_in, var_in, seed, call);
  if (node) {
    node->call = call;
    node->frozen = has(var_in);
    node->x = SavedVariable(x, false);
    node->weight = SavedVariable(w, false);
    node->bias = SavedVariable(b, false);
    if (call.activation != 0) node->residual = SavedVariable(r, false);
    node->mean = node->frozen ? value_or_undefined(mean_in) : out.mean;
    node->var = node->frozen ? *var_in : out.var;
    node->seed = value_or_undefined(seed);
    torch::autograd::set_history(out.y, node);
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> add_norm(const at::Tensor& x, const at::Tensor& residual,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& seed,
                                            const NormCall& call) {
  using torch::autograd::compute_requires_grad;
  const at::Tensor w = value_or_undefined(weight), b = value_or_undefined(bias);
  decltype(make_node<AddNormNode>()) node;
  if (compute_requires_grad(x, residual, w, b)) {
    node = make_node<AddNormNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, residual, w, b));
  }
  auto [y, sum, mean, var] = call_add_norm_fwd(x, residual, weight, bias, seed, call);
  if (node) {
    node->call = call;
    torch::autograd::set_history(variable_list{y, sum}, node);
    node->sum = SavedVariable(sum, true);
    node->weight = SavedVariable(w, false);
    node->bias = SavedVariable(b, false);
    node->mean = mean;
    node->var = var;
    node->seed = value_or_undefined(seed);
  }
  return {y, sum};
}

}  // namespace fastnorm
