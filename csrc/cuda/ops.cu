// CUDA side of every operator: allocation, choice of geometry and dtype, registration. One file, so
// that nvcc parses Torch's headers once.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>

#include "cross_entropy.h"
#include "cuda/cross_entropy_cuda.h"
#include "cuda/dropout_cuda.h"
#include "cuda/norm_cuda.h"
#include "dropout_op.h"
#include "norm_op.h"

namespace fastnorm::cuda {
namespace {

// The kernels' name of a storage type.
template <typename T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<c10::Half> {
  using type = __half;
};
template <>
struct DeviceType<c10::BFloat16> {
  using type = __nv_bfloat16;
};

template <typename F>
void visit_device_dtype(at::ScalarType dtype, F&& f) {
  visit_dtype(dtype, [&](auto zero) { f(typename DeviceType<decltype(zero)>::type{}); });
}

// Of the current device. Asked once for each: a query per call would be a tenth of a small launch.
DeviceLimits current_limits() {
  static std::mutex mutex;
  static std::unordered_map<int, DeviceLimits> known;
  const int device = c10::cuda::current_device();
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int shared = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const auto max_shared = static_cast<size_t>(shared);
  return known[device] = {clusters_fit(device, max_shared), max_shared};
}

// -------------------------------------------------------------------------------------------
// Norms
// -------------------------------------------------------------------------------------------

// Weight or bias as the kernels read it: in the input's type or the accumulate type.
OptionalTensor readable(const OptionalTensor& t, const at::Tensor& x) {
  const at::ScalarType wide = accumulate_type(x.scalar_type());
  if (!has(t) || t->scalar_type() == x.scalar_type() || t->scalar_type() == wide) return t;
  return t->to(wide);
}

Parameter parameter(const OptionalTensor& t, const at::Tensor& x) {
  if (!has(t)) return {};
  return {t->const_data_ptr(), t->scalar_type() == accumulate_type(x.scalar_type())};
}

at::Tensor workspace_of(size_t bytes, const at::Tensor& x) {
  return at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
}

struct CudaNorm {
  static void forward(const NormConfig& config, const at::Tensor& x, const OptionalTensor& residual,
                      const OptionalTensor& any_weight, const OptionalTensor& any_bias,
                      const OptionalTensor& mean, const OptionalTensor& var, NormOutputs& out) {
    const View& view = config.view;
    const c10::cuda::CUDAGuard guard(x.device());
    const OptionalTensor weight = readable(any_weight, x), bias = readable(any_bias, x);
    const DeviceLimits limits = current_limits();
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const bool centered = config.statistic == Statistic::MeanVar;
    visit_device_dtype(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const bool row =
          config.is_row() && !column_takes_row_norm_fwd<T>(config, has(residual), limits);
      const at::Tensor workspace =
          workspace_of(row ? 0 : column_norm_fwd_workspace(view, sizeof(T)), x);
      A* m = config.frozen ? const_cast<A*>(input_data<A>(mean)) : output_data<A>(out.mean);
      A* v = config.frozen ? const_cast<A*>(input_data<A>(var)) : output_data<A>(out.var);
      const NormForward<T> p{config,
                             input_data<T>(x),
                             input_data<T>(residual),
                             parameter(weight, x),
                             parameter(bias, x),
                             output_data<T>(out.y),
                             output_data<T>(out.sum),
                             centered ? m : nullptr,
                             v,
                             static_cast<unsigned char*>(workspace.data_ptr())};
      row ? launch_row_norm_fwd(p, limits, stream) : launch_column_norm_fwd(p, limits, stream);
    });
  }

  static void backward(const NormConfig& config, const OptionalTensor& dy,
                       const OptionalTensor& dsum, const at::Tensor& x,
                       const OptionalTensor& any_weight, const OptionalTensor& any_bias,
                       const OptionalTensor& residual, const OptionalTensor& mean,
                       const at::Tensor& var, std::array<bool, 4> mask, NormGradients& out) {
    const View& view = config.view;
    const c10::cuda::CUDAGuard guard(x.device());
    const OptionalTensor weight = readable(any_weight, x), bias = readable(any_bias, x);
    const at::ScalarType wide = accumulate_type(x.scalar_type());
    const auto per_channel = [&](const OptionalTensor& like, bool wanted) {
      const auto options = x.options().dtype(has(like) ? like->scalar_type() : wide);
      return wanted ? at::empty({view.channels()}, options) : none_like(x);
    };
    out.weight = per_channel(weight, mask[1]);
    out.bias = per_channel(bias, mask[2]);
    const DeviceLimits limits = current_limits();
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const bool centered = config.statistic == Statistic::MeanVar;
    visit_device_dtype(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const bool row =
          config.is_row() && !(mask[0] && column_takes_row_norm_bwd<T>(config, limits));
      const at::Tensor workspace = workspace_of(row ? row_norm_bwd_workspace(view, sizeof(T))
                                                    : column_norm_bwd_workspace<T>(config, limits),
                                                x);
      const NormBackward<T> p{config,
                              input_data<T>(dy),
                              input_data<T>(dsum),
                              input_data<T>(x),
                              input_data<T>(residual),
                              parameter(weight, x),
                              parameter(bias, x),
                              centered ? input_data<A>(mean) : nullptr,
                              input_data<A>(var),
                              output_data<T>(out.x),
                              output_data<T>(out.residual),
                              output_data<void>(out.weight),
                              output_data<void>(out.bias),
                              out.weight.scalar_type() == wide,
                              out.bias.scalar_type() == wide,
                              static_cast<unsigned char*>(workspace.data_ptr())};
      row ? launch_row_norm_bwd(p, limits, stream) : launch_column_norm_bwd(p, limits, stream);
    });
    if (mask[1] && has(any_weight)) out.weight = out.weight.to(any_weight->scalar_type());
    if (mask[2] && has(any_bias)) out.bias = out.bias.to(any_bias->scalar_type());
  }
};

// -------------------------------------------------------------------------------------------
// Dropout
// -------------------------------------------------------------------------------------------

// out = what becomes of `in`: x, or, with `x` given, a gradient.
void run_dropout(const at::Tensor& out, const at::Tensor& in, const OptionalTensor& x,
                 const OptionalTensor& bias, const OptionalTensor& residual,
                 const OptionalTensor& seed, at::IntArrayRef view, int64_t activation, double p,
                 int64_t kind, bool backward) {
  DropoutConfig config = checked_dropout(in, {x, residual}, bias, seed, view, activation, p, kind);
  TORCH_CHECK(!backward || activation == 0 || has(x),
              "fastnorm: the activation's derivative needs x");
  if (in.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(in.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  if (backward) config.shift = config.dropped = 0.0;
  visit_device_dtype(in.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_dropout(
        DropoutPass<T>{config, input_data<T>(in), activation != 0 ? input_data<T>(x) : nullptr,
                       input_data<T>(bias), input_data<T>(residual), output_data<T>(out),
                       has(bias) ? bias->numel() : 1},
        stream);
  });
}

at::Tensor dropout_fwd(const at::Tensor& x, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& seed,
                       at::IntArrayRef view, int64_t activation, double p, int64_t kind) {
  at::Tensor y = at::empty_like(x);
  run_dropout(y, x, {}, bias, residual, seed, view, activation, p, kind, false);
  return y;
}

at::Tensor dropout_bwd(const at::Tensor& grad, const OptionalTensor& x, const OptionalTensor& bias,
                       const OptionalTensor& seed, at::IntArrayRef view, int64_t activation,
                       double p, int64_t kind) {
  at::Tensor dx = at::empty_like(grad);
  run_dropout(dx, grad, x, bias, {}, seed, view, activation, p, kind, true);
  return dx;
}

void dropout_inplace(const at::Tensor& x, const at::Tensor& seed, at::IntArrayRef view, double p,
                     int64_t kind) {
  run_dropout(x, x, {}, {}, {}, seed, view, 0, p, kind, false);
}

// -------------------------------------------------------------------------------------------
// Cross-entropy
// -------------------------------------------------------------------------------------------

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
                        target.const_data_ptr<int64_t>(), pointer_or_null<A>(w),
                        pointer_or_null<A>(u), label_smoothing, ignore_index, reduction == 1,
                        torch_mean, totals.mutable_data_ptr<double>(), losses.mutable_data_ptr<A>(),
                        mass.mutable_data_ptr<A>(),
                        need_grad ? static_cast<T*>(grad.mutable_data_ptr()) : nullptr,
                        reduction == 0 ? nullptr : loss.mutable_data_ptr<A>(),
                        scale.mutable_data_ptr<A>()},
        current_limits(), stream);
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
                          factor.const_data_ptr<Accumulate<T>>(), stream);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CUDA, m) {
  NormOperators<CudaNorm>::register_on(m);
  m.impl("dropout_fwd", dropout_fwd);
  m.impl("dropout_bwd", dropout_bwd);
  m.impl("dropout_", dropout_inplace);
  m.impl("cross_entropy", cross_entropy_op);
  m.impl("scale_gradient_", scale_gradient_op);
}

}  // namespace fastnorm::cuda
