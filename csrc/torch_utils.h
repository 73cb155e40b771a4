// The one header of ours that knows Torch: options of a norm as they travel through the
// dispatcher, and the checks that every kernel entry makes.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/norm.h"

namespace fastnorm {

using OptionalTensor = std::optional<at::Tensor>;

inline View to_view(at::IntArrayRef v) {
  TORCH_CHECK(v.size() == 6, "fastnorm: a view has 6 numbers, got ", v.size());
  return View{v[0], v[1], v[2], v[3], v[4], v[5]};
}

inline bool has(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// float for everything but double: the type of statistics, and of parameters inside kernels.
inline at::ScalarType accumulate_type(at::ScalarType t) {
  return t == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls f(T{}) with the storage type of `dtype`.
template <typename F>
void visit_dtype(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(c10::BFloat16{});
    case at::kHalf:
      return f(c10::Half{});
    default:
      TORCH_CHECK_TYPE(false, "fastnorm: expected a floating-point input, got ", dtype);
  }
}

inline NormConfig to_config(at::IntArrayRef view, int64_t statistic, bool frozen, bool prologue,
                            double eps, double weight_offset, int64_t activation, double dropout_p,
                            const OptionalTensor& seed) {
  NormConfig c;
  c.view = to_view(view);
  c.statistic = static_cast<Statistic>(statistic);
  c.frozen = frozen;
  c.prologue = prologue;
  c.eps = eps;
  c.weight_offset = weight_offset;
  c.activation = static_cast<Activation>(activation);
  c.dropout = Dropout::of(dropout_p, has(seed) ? seed->const_data_ptr<int64_t>() : nullptr);
  return c;
}

// at::empty and at::empty_like (of a dense tensor), which on the CPU come without the dispatcher:
// that alone takes longer than a small norm.
inline at::Tensor make_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return options.device().is_cpu() ? at::detail::empty_cpu(sizes, options)
                                   : at::empty(sizes, options);
}

inline at::Tensor make_empty_like(const at::Tensor& x) {
  return x.is_cpu() ? at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.options())
                    : at::empty_like(x);
}

// Same sizes, and the same position in memory for every element. The stride of a dimension of
// size 1 means nothing.
inline bool same_layout(const at::Tensor& t, const at::Tensor& x) {
  if (t.sizes() != x.sizes()) return false;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1 && t.stride(d) != x.stride(d)) return x.numel() == 0;
  }
  return true;
}

// The element order of every tensor beside `x` must be that of x, and nothing may be padded.
inline void check_operands(const at::Tensor& x, const View& view,
                           std::initializer_list<OptionalTensor> same,
                           std::initializer_list<OptionalTensor> per_channel) {
  TORCH_CHECK(x.is_non_overlapping_and_dense() && x.numel() == view.numel(),
              "fastnorm: the input must be dense with ", view.numel(), " elements");
  for (const auto& t : same) {
    TORCH_CHECK(!has(t) || (t->scalar_type() == x.scalar_type() && same_layout(*t, x) &&
                            t->device() == x.device()),
                "fastnorm: expected a tensor like the input");
  }
  for (const auto& t : per_channel) {
    TORCH_CHECK(!has(t) || (t->numel() == view.channels() && t->is_contiguous() &&
                            t->device() == x.device()),
                "fastnorm: expected one contiguous value per channel (", view.channels(), ")");
  }
}

}  // namespace fastnorm
