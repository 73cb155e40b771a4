// The norm operators as every device has them: options, checks, outputs, registration. A device
// brings two functions that choose dtype and geometry,
//
//   forward(config, x, residual, weight, bias, mean, var, NormOutputs&)
//       fills y, sum and the statistics
//   backward(config, dy, dsum, x, weight, bias, residual, mean, var, mask, NormGradients&)
//       fills dx and dresidual, makes dweight and dbias
#pragma once

#include <torch/library.h>

#include "torch_utils.h"

namespace fastnorm {

struct NormOutputs {
  at::Tensor y, sum, mean, var;  // sum: with the prologue alone; empty statistics: frozen ones
};

struct NormGradients {
  at::Tensor x, weight, bias, residual;  // empty where not wanted
};

inline at::Tensor none_like(const at::Tensor& x) { return make_empty({0}, x.options()); }

// Null for what is absent or empty.
template <typename T>
const T* input_data(const OptionalTensor& t) {
  return has(t) && t->numel() > 0 ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <typename T>
T* output_data(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// A mean square has no mean: whatever stands there isn't looked at.
inline void check_statistics(const at::Tensor& x, const NormConfig& config,
                             const OptionalTensor& mean, const OptionalTensor& var) {
  const View& view = config.view;
  const at::ScalarType wide = accumulate_type(x.scalar_type());
  for (const auto& t : {config.statistic == Statistic::MeanVar ? mean : std::nullopt, var}) {
    TORCH_CHECK(!has(t) || (t->scalar_type() == wide && t->numel() == view.statistics() &&
                            t->is_contiguous() && t->device() == x.device()),
                "fastnorm: expected ", view.statistics(), " contiguous statistics of ", wide,
                " on ", x.device());
  }
}

template <typename Device>
struct NormOperators {
  using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  static NormOutputs forward(const NormConfig& config, const at::Tensor& x,
                             const OptionalTensor& residual, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& mean,
                             const OptionalTensor& var) {
    check_operands(x, config.view, {residual}, {weight, bias});
    check_statistics(x, config, mean, var);
    const auto statistic = [&](bool wanted) {
      const auto options = x.options().dtype(accumulate_type(x.scalar_type()));
      return wanted ? make_empty({config.view.outer, config.view.kept}, options) : none_like(x);
    };
    const bool centered = config.statistic == Statistic::MeanVar;
    NormOutputs out{make_empty_like(x), config.prologue ? make_empty_like(x) : at::Tensor(),
                    statistic(centered && !config.frozen), statistic(!config.frozen)};
    Device::forward(config, x, residual, weight, bias, mean, var, out);
    return out;
  }

  static Gradients backward(const NormConfig& config, const OptionalTensor& dy,
                            const OptionalTensor& dsum, const at::Tensor& x,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, const OptionalTensor& mean,
                            const at::Tensor& var, std::array<bool, 4> mask) {
    check_operands(x, config.view, {dy, dsum, residual}, {weight, bias});
    check_statistics(x, config, mean, var);
    NormGradients out;
    out.x = mask[0] ? make_empty_like(x) : none_like(x);
    out.residual = mask[3] ? make_empty_like(x) : none_like(x);
    Device::backward(config, dy, dsum, x, weight, bias, residual, mean, var, mask, out);
    return {std::move(out.x), std::move(out.weight), std::move(out.bias), std::move(out.residual)};
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_fwd(
      const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
      const OptionalTensor& residual, const OptionalTensor& mean, const OptionalTensor& var,
      const OptionalTensor& seed, at::IntArrayRef view, int64_t statistic, double eps,
      double weight_offset, int64_t activation, double dropout_p) {
    const NormConfig config = to_config(view, statistic, has(var), false, eps, weight_offset,
                                        activation, dropout_p, seed);
    NormOutputs out = forward(config, x, residual, weight, bias, mean, var);
    return {std::move(out.y), std::move(out.mean), std::move(out.var)};
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_fwd(
      const at::Tensor& x, const at::Tensor& residual, const OptionalTensor& weight,
      const OptionalTensor& bias, const OptionalTensor& seed, at::IntArrayRef view,
      int64_t statistic, double eps, double weight_offset, double dropout_p) {
    const NormConfig config =
        to_config(view, statistic, false, true, eps, weight_offset, 0, dropout_p, seed);
    NormOutputs out = forward(config, x, residual, weight, bias, {}, {});
    return {std::move(out.y), std::move(out.sum), std::move(out.mean), std::move(out.var)};
  }

  static Gradients norm_bwd(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& residual,
                            const OptionalTensor& mean, const at::Tensor& var,
                            const OptionalTensor& seed, at::IntArrayRef view, int64_t statistic,
                            bool frozen, double eps, double weight_offset, int64_t activation,
                            double dropout_p, std::array<bool, 4> mask) {
    const NormConfig config =
        to_config(view, statistic, frozen, false, eps, weight_offset, activation, dropout_p, seed);
    return backward(config, dy, {}, x, weight, bias, residual, mean, var, mask);
  }

  static Gradients add_norm_bwd(const OptionalTensor& dy, const OptionalTensor& dsum,
                                const at::Tensor& sum, const OptionalTensor& weight,
                                const OptionalTensor& mean, const at::Tensor& var,
                                const OptionalTensor& seed, at::IntArrayRef view, int64_t statistic,
                                double eps, double weight_offset, double dropout_p,
                                std::array<bool, 4> mask) {
    const NormConfig config =
        to_config(view, statistic, false, true, eps, weight_offset, 0, dropout_p, seed);
    return backward(config, dy, dsum, sum, weight, {}, {}, mean, var, mask);
  }

  static void register_on(torch::Library& m) {
    m.impl("norm_fwd", norm_fwd);
    m.impl("norm_bwd", norm_bwd);
    m.impl("add_norm_fwd", add_norm_fwd);
    m.impl("add_norm_bwd", add_norm_bwd);
  }
};

}  // namespace fastnorm
