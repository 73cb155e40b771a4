// CUDA side of the norm operators: checks, allocation, choice of geometry and dtype.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/device.h"

namespace fastnorm::cuda {
namespace {

bool is_row(const View& view) { return view.reduce_outer == 1 && view.tail == 1; }

at::Tensor none_like(const at::Tensor& x) { return at::empty({0}, x.options()); }

template <typename T>
const T* input(const OptionalTensor& t) {
  return has(t) && t->numel() > 0 ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T>
T* output(at::Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// Weight and bias in the input's type, or in the accumulate type.
Parameter parameter(const OptionalTensor& t, const at::Tensor& x) {
  if (!has(t)) return {};
  const at::ScalarType wide = accumulate_type(x.scalar_type());
  TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type() || t->scalar_type() == wide,
                   "fastnorm: expected a weight and bias of ", x.scalar_type(), " or ", wide,
                   ", got ", t->scalar_type());
  return {t->const_data_ptr(), t->scalar_type() == wide};
}

at::Tensor workspace_of(size_t bytes, const at::Tensor& x) {
  return at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
}

at::Tensor empty_statistic(const at::Tensor& x, const View& view, bool wanted) {
  const auto options = x.options().dtype(accumulate_type(x.scalar_type()));
  return wanted ? at::empty({view.outer, view.kept}, options) : none_like(x);
}

struct ForwardOutputs {
  at::Tensor y, sum, mean, var;
};

ForwardOutputs norm_fwd_cuda(const NormConfig& config, const at::Tensor& x,
                             const OptionalTensor& residual, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& mean_in,
                             const OptionalTensor& var_in) {
  const View& view = config.view;
  check_operands(x, view, {residual}, {weight, bias});
  const c10::cuda::CUDAGuard guard(x.device());
  const bool centered = config.statistic == Statistic::MeanVar;
  ForwardOutputs out{at::empty_like(x), config.prologue ? at::empty_like(x) : none_like(x),
                     empty_statistic(x, view, centered && !config.frozen),
                     empty_statistic(x, view, !config.frozen)};
  const DeviceLimits limits = limits_of(x.device().index());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const bool row = is_row(view);
  const at::Tensor workspace =
      workspace_of(row ? 0 : column_norm_fwd_workspace(view, x.element_size()), x);
  visit_device_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    A* mean = config.frozen ? const_cast<A*>(input<A>(mean_in)) : output<A>(out.mean);
    A* var = config.frozen ? const_cast<A*>(input<A>(var_in)) : output<A>(out.var);
    const NormForward<T> p{config,
                           input<T>(x),
                           input<T>(residual),
                           parameter(weight, x),
                           parameter(bias, x),
                           output<T>(out.y),
                           output<T>(out.sum),
                           centered ? mean : nullptr,
                           var,
                           static_cast<unsigned char*>(workspace.data_ptr())};
    row ? launch_row_norm_fwd(p, limits, stream) : launch_column_norm_fwd(p, limits, stream);
  });
  return out;
}

// Outputs of a backward call, for x, weight, bias, residual in this order.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients norm_bwd_cuda(const NormConfig& config, const OptionalTensor& dy,
                        const OptionalTensor& dsum, const at::Tensor& x,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const OptionalTensor& mean,
                        const at::Tensor& var, std::array<bool, 4> mask) {
  const View& view = config.view;
  check_operands(x, view, {dy, dsum, residual}, {weight, bias});
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType wide = accumulate_type(x.scalar_type());
  const auto per_channel = [&](const OptionalTensor& like, bool wanted) {
    if (!wanted) return none_like(x);
    return at::empty({view.channels()}, x.options().dtype(has(like) ? like->scalar_type() : wide));
  };
  at::Tensor dx = mask[0] ? at::empty_like(x) : none_like(x);
  at::Tensor dw = per_channel(weight, mask[1]), db = per_channel(bias, mask[2]);
  at::Tensor dr = mask[3] ? at::empty_like(x) : none_like(x);
  const DeviceLimits limits = limits_of(x.device().index());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const bool row = is_row(view);
  const at::Tensor workspace = workspace_of(row ? row_norm_bwd_workspace(view, x.element_size())
                                                : column_norm_bwd_workspace(view, x.element_size()),
                                            x);
  visit_device_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const NormBackward<T> p{config,
                            input<T>(dy),
                            input<T>(dsum),
                            input<T>(x),
                            input<T>(residual),
                            parameter(weight, x),
                            parameter(bias, x),
                            config.statistic == Statistic::MeanVar ? input<A>(mean) : nullptr,
                            input<A>(var),
                            output<T>(dx),
                            output<T>(dr),
                            output<void>(dw),
                            output<void>(db),
                            dw.scalar_type() == wide,
                            db.scalar_type() == wide,
                            static_cast<unsigned char*>(workspace.data_ptr())};
    row ? launch_row_norm_bwd(p, limits, stream) : launch_column_norm_bwd(p, limits, stream);
  });
  return {std::move(dx), std::move(dw), std::move(db), std::move(dr)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_fwd(
    const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mean, const OptionalTensor& var,
    const OptionalTensor& seed, at::IntArrayRef view, int64_t statistic, double eps,
    double weight_offset, int64_t activation, double dropout_p) {
  const NormConfig config =
      to_config(view, statistic, has(var), false, eps, weight_offset, activation, dropout_p, seed);
  ForwardOutputs out = norm_fwd_cuda(config, x, residual, weight, bias, mean, var);
  return {std::move(out.y), std::move(out.mean), std::move(out.var)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_fwd(
    const at::Tensor& x, const at::Tensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seed, at::IntArrayRef view, int64_t statistic,
    double eps, double weight_offset, double dropout_p) {
  const NormConfig config =
      to_config(view, statistic, false, true, eps, weight_offset, 0, dropout_p, seed);
  ForwardOutputs out = norm_fwd_cuda(config, x, residual, weight, bias, {}, {});
  return {std::move(out.y), std::move(out.sum), std::move(out.mean), std::move(out.var)};
}

Gradients norm_bwd(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& residual,
                   const OptionalTensor& mean, const at::Tensor& var, const OptionalTensor& seed,
                   at::IntArrayRef view, int64_t statistic, bool frozen, double eps,
                   double weight_offset, int64_t activation, double dropout_p,
                   std::array<bool, 4> mask) {
  const NormConfig config =
      to_config(view, statistic, frozen, false, eps, weight_offset, activation, dropout_p, seed);
  return norm_bwd_cuda(config, dy, {}, x, weight, bias, residual, mean, var, mask);
}

Gradients add_norm_bwd(const OptionalTensor& dy, const OptionalTensor& dsum, const at::Tensor& sum,
                       const OptionalTensor& weight, const OptionalTensor& mean,
                       const at::Tensor& var, const OptionalTensor& seed, at::IntArrayRef view,
                       int64_t statistic, double eps, double weight_offset, double dropout_p,
                       std::array<bool, 4> mask) {
  const NormConfig config =
      to_config(view, statistic, false, true, eps, weight_offset, 0, dropout_p, seed);
  return norm_bwd_cuda(config, dy, dsum, sum, weight, {}, {}, mean, var, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CUDA, m) {
  m.impl("norm_fwd", norm_fwd);
  m.impl("norm_bwd", norm_bwd);
  m.impl("add_norm_fwd", add_norm_fwd);
  m.impl("add_norm_bwd", add_norm_bwd);
}

}  // namespace fastnorm::cuda
