// CUDA side of the dropout operators: checks, registration.
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/dropout_cuda.h"

namespace fastnorm::cuda {
namespace {

template <typename T>
const T* pointer(const OptionalTensor& t) {
  return has(t) ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

struct Options {
  at::IntArrayRef view;
  int64_t activation;
  double p;
  int64_t kind;
};

// out = what becomes of `in`: x, or, with `x` given, a gradient.
void run(const at::Tensor& out, const at::Tensor& in, const OptionalTensor& x,
         const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& seed,
         const Options& options, bool backward) {
  TORCH_CHECK(options.view.size() == 3, "fastnorm: a mask view has 3 numbers, got ",
              options.view.size());
  TORCH_CHECK(options.p >= 0.0 && options.p <= 1.0, "fastnorm: p must be between 0 and 1, got ",
              options.p);
  const MaskView mask{options.view[0], options.view[1], options.view[2]};
  TORCH_CHECK(in.is_non_overlapping_and_dense() && in.numel() == mask.numel(),
              "fastnorm: the input must be dense with ", mask.numel(), " elements");
  TORCH_CHECK(mask.shared == 1 || (!has(bias) && options.activation == 0),
              "fastnorm: bias and activation go with masks of single elements alone");
  for (const OptionalTensor* t : {&x, &residual}) {
    TORCH_CHECK(
        !has(*t) || ((*t)->scalar_type() == in.scalar_type() && (*t)->sizes() == in.sizes() &&
                     (*t)->strides() == in.strides() && (*t)->device() == in.device()),
        "fastnorm: expected a tensor like the input");
  }
  TORCH_CHECK(!has(bias) || (in.is_contiguous() && bias->dim() == 1 && bias->is_contiguous() &&
                             bias->numel() == in.size(-1) && bias->device() == in.device() &&
                             bias->scalar_type() == in.scalar_type()),
              "fastnorm: bias goes with a contiguous input and has the size of its last dimension");
  TORCH_CHECK(!has(seed) || (seed->scalar_type() == at::kLong && seed->numel() == 1 &&
                             seed->device() == in.device()),
              "fastnorm: the seed is one int64 element on the input's device");
  TORCH_CHECK(!backward || options.activation == 0 || has(x),
              "fastnorm: the activation's derivative needs x");
  if (in.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(in.device());
  DropoutConfig config = DropoutConfig::of(mask, static_cast<Activation>(options.activation),
                                           options.p, static_cast<DropoutKind>(options.kind),
                                           has(seed) ? seed->const_data_ptr<int64_t>() : nullptr);
  if (backward) config.shift = config.dropped = 0.0;
  visit_device_dtype(in.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_dropout(
        DropoutPass<T>{config, static_cast<const T*>(in.const_data_ptr()),
                       options.activation != 0 ? pointer<T>(x) : nullptr, pointer<T>(bias),
                       pointer<T>(residual), static_cast<T*>(out.mutable_data_ptr()),
                       has(bias) ? bias->numel() : 1},
        c10::cuda::getCurrentCUDAStream());
  });
}

at::Tensor dropout_fwd(const at::Tensor& x, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& seed,
                       at::IntArrayRef view, int64_t activation, double p, int64_t kind) {
  at::Tensor y = at::empty_like(x);
  run(y, x, {}, bias, residual, seed, {view, activation, p, kind}, false);
  return y;
}

at::Tensor dropout_bwd(const at::Tensor& grad, const OptionalTensor& x, const OptionalTensor& bias,
                       const OptionalTensor& seed, at::IntArrayRef view, int64_t activation,
                       double p, int64_t kind) {
  at::Tensor dx = at::empty_like(grad);
  run(dx, grad, x, bias, {}, seed, {view, activation, p, kind}, true);
  return dx;
}

void dropout_inplace(const at::Tensor& x, const at::Tensor& seed, at::IntArrayRef view, double p,
                     int64_t kind) {
  run(x, x, {}, {}, {}, seed, {view, 0, p, kind}, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CUDA, m) {
  m.impl("dropout_fwd", dropout_fwd);
  m.impl("dropout_bwd", dropout_bwd);
  m.impl("dropout_", dropout_inplace);
}

}  // namespace fastnorm::cuda
