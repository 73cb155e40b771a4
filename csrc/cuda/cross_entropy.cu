// CUDA side of the cross-entropy operator: allocation, launch, registration.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cross_entropy.h"
#include "cuda/cross_entropy.cuh"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace fastnorm::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_op(
    const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& prior, double label_smoothing, int64_t ignore_index, int64_t reduction,
    bool torch_mean, bool need_grad) {
  check_cross_entropy(input, target, weight, prior);
  const c10::cuda::CUDAGuard guard(input.device());
  const int64_t rows = input.size(0), classes = input.size(1);
  const at::ScalarType wide = accumulate_type(input.scalar_type());
  const auto options = input.options().dtype(wide);
  const at::Tensor w = converted(weight, wide), u = converted(prior, wide);
  const at::Tensor losses = at::empty({rows}, options), mass = at::empty({rows}, options);
  const at::Tensor totals = at::empty({kClassTotals}, input.options().dtype(at::kDouble));
  const at::Tensor grad = at::empty({need_grad ? rows : 0, classes}, input.options());
  const at::Tensor loss = reduction == 0 ? losses : at::empty({}, options);
  const at::Tensor scale = reduction == 0 ? at::ones({}, options) : at::empty({}, options);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  visit_device_dtype(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    launch_cross_entropy(
        CrossEntropy<T>{rows, classes, static_cast<const T*>(input.const_data_ptr()),
                        target.const_data_ptr<int64_t>(), data_or_null<A>(w), data_or_null<A>(u),
                        label_smoothing, ignore_index, reduction == 1, torch_mean,
                        totals.mutable_data_ptr<double>(), losses.mutable_data_ptr<A>(),
                        mass.mutable_data_ptr<A>(),
                        need_grad ? static_cast<T*>(grad.mutable_data_ptr()) : nullptr,
                        reduction == 0 ? nullptr : loss.mutable_data_ptr<A>(),
                        scale.mutable_data_ptr<A>()},
        limits_of(input.device().index()), stream);
  });
  return {loss, grad, scale};
}

void scale_gradient_op(const at::Tensor& grad, const at::Tensor& factor) {
  TORCH_CHECK(grad.is_contiguous() && factor.numel() == 1 && factor.device() == grad.device() &&
                  factor.scalar_type() == accumulate_type(grad.scalar_type()),
              "fastnorm: expected a contiguous gradient and one factor of ",
              accumulate_type(grad.scalar_type()), " on ", grad.device());
  const c10::cuda::CUDAGuard guard(grad.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  visit_device_dtype(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_scale_gradient(static_cast<T*>(grad.mutable_data_ptr()), grad.numel(),
                          factor.const_data_ptr<Accumulate<T>>(),
                          c10::cuda::getCurrentCUDAStream());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CUDA, m) {
  m.impl("cross_entropy", cross_entropy_op);
  m.impl("scale_gradient_", scale_gradient_op);
}

}  // namespace fastnorm::cuda
