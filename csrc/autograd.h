// Differentiable forms of the norm operators for eager mode. The nodes are C++ because a Python
// torch.autograd.Function alone costs more than all of F.layer_norm on a small input
// (benchmarks/bench_overhead.py); under torch.compile fastnorm/_ops.py has the Python form.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <tuple>

#include "torch_utils.h"

namespace fastnorm {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// torch 2.13 counts references to a Node in the Node, earlier releases in a shared_ptr.
template <typename N>
auto make_node() {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<N>(new N(), [](N* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<N>();
  }
}

// The operator's handle, for a static variable.
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline OptionalTensor optional(at::Tensor t) {
  return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt;
}

inline at::Tensor value_or_undefined(const OptionalTensor& t) { return has(t) ? *t : at::Tensor(); }

struct NormCall {
  std::array<int64_t, 6> view;
  int64_t statistic = 0;
  double eps = 0.0;
  double weight_offset = 0.0;
  int64_t activation = 0;
  double dropout_p = 0.0;
};

struct NormOutput {
  at::Tensor y, mean, var;  // mean and var only where the call computed them
};

// Inputs are dense and laid out alike (torch_utils.h: check_operands). mean_in and var_in freeze
// the statistics; the caller passes tensors that nothing else writes to.
NormOutput norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& residual, const OptionalTensor& mean_in,
                const OptionalTensor& var_in, const OptionalTensor& seed, const NormCall& call);

// (y, sum)
std::tuple<at::Tensor, at::Tensor> add_norm(const at::Tensor& x, const at::Tensor& residual,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& seed,
                                            const NormCall& call);

// `t` with the strides of `x` (a copy unless it has them).
at::Tensor laid_out_like(const at::Tensor& t, const at::Tensor& x);

}  // namespace fastnorm
