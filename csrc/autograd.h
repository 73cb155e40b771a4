// Differentiable forms of the norm operators for eager mode. The nodes are C++ because a Python
// torch.autograd.Function alone costs more than all of F.layer_norm on a small input
// (benchmarks/bench_overhead.py); under torch.compile fastnorm/_ops.py has the Python form.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "torch_utils.h"

namespace fastnorm {

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
