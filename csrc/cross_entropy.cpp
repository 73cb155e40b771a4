// The cross-entropy operator: schema, checks, and the CPU entry.
#include "cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/cross_entropy_cpu.h"

TORCH_LIBRARY_FRAGMENT(fastnorm, m) {
  // Loss (a scalar, or one per row for reduction 0) of rows of logits with class ids, in float32
  // or double; its gradient for the input (empty unless asked for); and what the gradient is still
  // to be multiplied by, besides that of the loss: 1, except where masked logits change the weight
  // that a weighted mean divides by. Reduction: 0 none, 1 mean, 2 sum.
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, Tensor? prior, "
      "float label_smoothing, int ignore_index, int reduction, bool torch_mean, bool need_grad) "
      "-> (Tensor loss, Tensor grad, Tensor scale)");
  // grad *= factor (one element), which on CUDA reads nothing more where the factor is 1; on a CPU
  // the caller can look for itself.
  m.def("scale_gradient_(Tensor(a!) grad, Tensor factor) -> ()");
}

namespace fastnorm::cpu {
namespace {

// What the mean divides by, and the sum of the rows' mass it takes for granted.
template <typename A>
double total_mass(const CrossEntropy<A>& p, bool torch_mean) {
  double smooth = 0, priors = 0, total = 0;
  for (int64_t k = 0; k < p.classes; ++k) {
    const double u = p.prior == nullptr ? 1.0 : p.prior[k];
    priors += u;
    smooth += u * (p.weight == nullptr ? 1.0 : p.weight[k]);
  }
  const double share = torch_mean ? 0.0 : p.smoothing;
  const double spread = priors > 0 ? share * smooth / priors : 0.0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.target[i] == p.ignore_index) continue;
    const double hard = p.weight == nullptr ? 1.0 : p.weight[p.target[i]];
    total += p.weight == nullptr ? 1.0 : (1 - share) * hard + spread;
  }
  return total;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_op(
    const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& prior, double label_smoothing, int64_t ignore_index, int64_t reduction,
    bool torch_mean, bool need_grad) {
  check_cross_entropy(input, target, weight, prior);
  const int64_t rows = input.size(0), classes = input.size(1);
  const int64_t* ids = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_CHECK_INDEX(ids[i] == ignore_index || (ids[i] >= 0 && ids[i] < classes), "Target ",
                      ids[i], " is out of bounds: expected 0 to ", classes - 1);
  }
  const at::ScalarType wide = accumulate_type(input.scalar_type());
  const auto options = input.options().dtype(wide);
  at::Tensor losses = at::empty({rows}, options), mass = at::empty({rows}, options);
  at::Tensor grad = at::empty({need_grad ? rows : 0, classes}, input.options());
  at::Tensor loss = reduction == 0 ? losses : at::empty({}, options);
  at::Tensor scale = at::empty({}, options);
  visit_dtype(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const at::Tensor w = converted(weight, wide), u = converted(prior, wide);
    CrossEntropy<T> p{rows,
                      classes,
                      input.const_data_ptr<T>(),
                      ids,
                      pointer_or_null<A>(w),
                      pointer_or_null<A>(u),
                      label_smoothing,
                      ignore_index,
                      A(1),
                      losses.mutable_data_ptr<A>(),
                      mass.mutable_data_ptr<A>(),
                      need_grad ? grad.mutable_data_ptr<T>() : nullptr};
    double total = 1;
    if (reduction == 1) {
      total = total_mass(
          CrossEntropy<A>{rows, classes, nullptr, ids, p.weight, p.prior, label_smoothing,
                          ignore_index, A(1), nullptr, nullptr, nullptr},
          torch_mean);
      if (total == 0 && !torch_mean) total = 1;
      p.scale = static_cast<A>(1 / total);
    }
    cross_entropy(p);
    double correction = 1;
    if (reduction == 1 && p.weight != nullptr && label_smoothing > 0 && !torch_mean) {
      double actual = 0;
      for (int64_t i = 0; i < rows; ++i) actual += p.mass[i];
      // Only masked logits move it by more than the rounding of its terms.
      const double rounding = 4 * std::numeric_limits<A>::epsilon();
      const bool moved = std::abs(actual - total) > rounding * std::abs(total);
      if (moved && actual != 0) correction = total / actual;
    }
    *scale.mutable_data_ptr<A>() = static_cast<A>(correction);
    if (reduction != 0) {
      double sum = 0;
      for (int64_t i = 0; i < rows; ++i) sum += p.loss[i];
      *loss.mutable_data_ptr<A>() = static_cast<A>(sum / total * correction);
    }
  });
  return {std::move(loss), std::move(grad), std::move(scale)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) { m.impl("cross_entropy", cross_entropy_op); }

}  // namespace fastnorm::cpu
