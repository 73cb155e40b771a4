// What the dropout operators of all devices ask of their arguments.
#pragma once

#include "common/dropout.h"
#include "torch_utils.h"

namespace fastnorm {

// `like_x`: tensors that must be laid out as x is.
inline DropoutConfig checked_dropout(const at::Tensor& x,
                                     std::initializer_list<OptionalTensor> like_x,
                                     const OptionalTensor& bias, const OptionalTensor& seed,
                                     at::IntArrayRef view, int64_t activation, double p,
                                     int64_t kind) {
  TORCH_CHECK(view.size() == 3, "fastnorm: a mask view has 3 numbers, got ", view.size());
  TORCH_CHECK(p >= 0.0 && p <= 1.0, "fastnorm: p must be between 0 and 1, got ", p);
  const MaskView mask{view[0], view[1], view[2]};
  TORCH_CHECK(x.is_non_overlapping_and_dense() && x.numel() == mask.numel(),
              "fastnorm: the input must be dense with ", mask.numel(), " elements");
  TORCH_CHECK(mask.shared == 1 || (!has(bias) && activation == 0),
              "fastnorm: bias and activation go with masks of single elements alone");
  TORCH_CHECK(!has(bias) || (x.is_contiguous() && bias->dim() == 1 && bias->is_contiguous() &&
                             bias->numel() == x.size(-1) && bias->device() == x.device() &&
                             bias->scalar_type() == x.scalar_type()),
              "fastnorm: bias goes with a contiguous input and has the size of its last dimension");
  TORCH_CHECK(!has(seed) || (seed->scalar_type() == at::kLong && seed->numel() == 1 &&
                             seed->device() == x.device()),
              "fastnorm: the seed is one int64 element on the input's device");
  for (const auto& t : like_x) {
    TORCH_CHECK(!has(t) || (t->scalar_type() == x.scalar_type() && t->sizes() == x.sizes() &&
                            t->strides() == x.strides() && t->device() == x.device()),
                "fastnorm: expected a tensor like the input");
  }
  return DropoutConfig::of(mask, static_cast<Activation>(activation), p,
                           static_cast<DropoutKind>(kind),
                           has(seed) ? seed->const_data_ptr<int64_t>() : nullptr);
}

}  // namespace fastnorm
