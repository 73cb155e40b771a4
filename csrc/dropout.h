// Dropout in eager mode: the differentiable call, and the entry that Python tries first.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>

#include "torch_utils.h"

namespace fastnorm {

struct DropoutCall {
  std::array<int64_t, 3> view;  // MaskView of common/dropout.h
  int64_t activation = 0;
  double p = 0.0;
  int64_t kind = 0;  // DropoutKind
};

// residual + dropout(activation(x + bias)), differentiable any number of times. Inputs are dense
// and laid out like x; without a seed nothing is dropped.
at::Tensor dropout(const at::Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual,
                   const OptionalTensor& seed, const DropoutCall& call);

// keep ? scale * grad : 0, itself differentiable: its own backward pass is the same map.
at::Tensor masked_gradient(const at::Tensor& grad, const OptionalTensor& seed,
                           const DropoutCall& call);

// The MaskView of x's memory when the dimensions in the bit set `shared` share their mask;
// nullopt where those of more than one element do not lie next to each other.
std::optional<std::array<int64_t, 3>> mask_view(const at::Tensor& x, uint64_t shared);

void register_dropout(pybind11::module_& m);

}  // namespace fastnorm
