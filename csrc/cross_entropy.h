// What the cross-entropy operators of all devices ask of their arguments.
#pragma once

#include "torch_utils.h"

namespace fastnorm {

inline void check_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                const OptionalTensor& weight, const OptionalTensor& prior) {
  TORCH_CHECK(input.dim() == 2 && input.is_contiguous(),
              "fastnorm: input must be contiguous rows of logits, got ", input.sizes());
  const int64_t rows = input.size(0), classes = input.size(1);
  TORCH_CHECK(target.scalar_type() == at::kLong && target.is_contiguous() && target.dim() == 1 &&
                  target.size(0) == rows && target.device() == input.device(),
              "fastnorm: target must be ", rows, " contiguous int64 class ids on ", input.device(),
              ", got ", target.scalar_type(), " ", target.sizes(), " on ", target.device());
  for (const auto& t : {weight, prior}) {
    TORCH_CHECK(
        !has(t) || (t->dim() == 1 && t->size(0) == classes && t->device() == input.device()),
        "fastnorm: weight and prior must have one value for each of ", classes, " classes, on ",
        input.device());
  }
}

// A tensor in the type of the sums, as the kernels read it; undefined for none.
inline at::Tensor converted(const OptionalTensor& t, at::ScalarType dtype) {
  return has(t) ? t->to(dtype).contiguous() : at::Tensor();
}

template <typename A>
const A* pointer_or_null(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<A>() : nullptr;
}

}  // namespace fastnorm
