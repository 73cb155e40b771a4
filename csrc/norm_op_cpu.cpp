// CPU side of the norm operators: checks, allocation, choice of geometry and dtype.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/norm_cpu.h"
#include "torch_utils.h"

namespace fastnorm::cpu {
namespace {

// A parameter in the accumulation type, with the offset added. Kernels read it many times, so
// one conversion of `channels` values here saves a template parameter there.
template <typename A>
class Parameter {
 public:
  Parameter(const OptionalTensor& t, double offset, const at::Tensor& x) {
    if (!has(t)) return;
    const auto dtype = c10::CppTypeToScalarType<A>::value;
    if (t->scalar_type() == dtype && offset == 0.0) {
      data_ = t->const_data_ptr<A>();
      return;
    }
    converted_ = at::empty(t->sizes(), x.options().dtype(dtype));
    A* out = converted_.mutable_data_ptr<A>();
    visit_dtype(t->scalar_type(), [&](auto zero) {
      using P = decltype(zero);
      const P* in = t->const_data_ptr<P>();
      for (int64_t i = 0; i < t->numel(); ++i) {
        out[i] = static_cast<A>(in[i]) + static_cast<A>(offset);
      }
    });
    data_ = out;
  }
  const A* get() const { return data_; }

 private:
  at::Tensor converted_;
  const A* data_ = nullptr;
};

bool is_row(const View& view) {
  return view.reduce_outer == 1 && view.tail == 1 && view.inner != 0;
}

at::Tensor none_like(const at::Tensor& x) { return at::empty({0}, x.options()); }

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return has(t) ? t->const_data_ptr<T>() : nullptr;
}

template <typename T>
void forward(const NormForward<T>& p) {
  is_row(p.config.view) ? row_norm_fwd(p) : column_norm_fwd(p);
}

template <typename T>
void backward(const NormBackward<T>& p) {
  is_row(p.config.view) ? row_norm_bwd(p) : column_norm_bwd(p);
}

at::Tensor empty_statistic(const at::Tensor& x, const View& view) {
  return at::empty({view.outer, view.kept}, x.options().dtype(accumulate_type(x.scalar_type())));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_fwd(
    const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mean_in, const OptionalTensor& var_in,
    const OptionalTensor& seed, at::IntArrayRef view, int64_t statistic, double eps,
    double weight_offset, int64_t activation, double dropout_p) {
  const bool frozen = has(var_in);
  const NormConfig config =
      to_config(view, statistic, frozen, false, eps, weight_offset, activation, dropout_p, seed);
  check_operands(x, config.view, {residual}, {weight, bias});
  at::Tensor y = at::empty_like(x);
  const bool centered = config.statistic == Statistic::MeanVar;
  at::Tensor mean = !frozen && centered ? empty_statistic(x, config.view) : none_like(x);
  at::Tensor var = frozen ? none_like(x) : empty_statistic(x, config.view);
  visit_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Parameter<A> w(weight, weight_offset, x), b(bias, 0.0, x);
    A* m = nullptr;
    if (centered) m = frozen ? const_cast<A*>(mean_in->const_data_ptr<A>()) : mean.data_ptr<A>();
    A* v = frozen ? const_cast<A*>(var_in->const_data_ptr<A>()) : var.data_ptr<A>();
    forward(NormForward<T>{config, x.const_data_ptr<T>(), data_or_null<T>(residual), w.get(),
                           b.get(), y.mutable_data_ptr<T>(), nullptr, m, v});
  });
  return {std::move(y), std::move(mean), std::move(var)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_fwd(
    const at::Tensor& x, const at::Tensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seed, at::IntArrayRef view, int64_t statistic,
    double eps, double weight_offset, double dropout_p) {
  const NormConfig config =
      to_config(view, statistic, false, true, eps, weight_offset, 0, dropout_p, seed);
  check_operands(x, config.view, {residual}, {weight, bias});
  at::Tensor y = at::empty_like(x), sum = at::empty_like(x);
  const bool centered = config.statistic == Statistic::MeanVar;
  at::Tensor mean = centered ? empty_statistic(x, config.view) : none_like(x);
  at::Tensor var = empty_statistic(x, config.view);
  visit_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Parameter<A> w(weight, weight_offset, x), b(bias, 0.0, x);
    row_norm_fwd(
        NormForward<T>{config, x.const_data_ptr<T>(), residual.const_data_ptr<T>(), w.get(),
                       b.get(), y.mutable_data_ptr<T>(), sum.mutable_data_ptr<T>(),
                       centered ? mean.mutable_data_ptr<A>() : nullptr, var.mutable_data_ptr<A>()});
  });
  return {std::move(y), std::move(sum), std::move(mean), std::move(var)};
}

// Outputs of a backward call, for x, weight, bias, residual in this order.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients run_backward(const NormConfig& config, const OptionalTensor& dy,
                       const OptionalTensor& dsum, const at::Tensor& x,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& mean,
                       const at::Tensor& var, std::array<bool, 4> mask) {
  check_operands(x, config.view, {dy, dsum, residual}, {weight, bias});
  const auto acc = accumulate_type(x.scalar_type());
  const auto per_channel = [&](bool wanted) {
    return wanted ? at::empty({config.view.channels()}, x.options().dtype(acc)) : none_like(x);
  };
  at::Tensor dx = mask[0] ? at::empty_like(x) : none_like(x);
  at::Tensor dw = per_channel(mask[1]), db = per_channel(mask[2]);
  at::Tensor dr = mask[3] ? at::empty_like(x) : none_like(x);
  visit_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Parameter<A> w(weight, config.weight_offset, x), b(bias, 0.0, x);
    const auto out = [](at::Tensor& t, bool wanted, auto z) {
      using P = decltype(z);
      return wanted ? t.mutable_data_ptr<P>() : nullptr;
    };
    backward(NormBackward<T>{
        config, data_or_null<T>(dy), data_or_null<T>(dsum), x.const_data_ptr<T>(),
        data_or_null<T>(residual), w.get(), b.get(),
        config.statistic == Statistic::MeanVar ? mean->const_data_ptr<A>() : nullptr,
        var.const_data_ptr<A>(), out(dx, mask[0], T{}), out(dr, mask[3], T{}),
        out(dw, mask[1], A{}), out(db, mask[2], A{})});
  });
  const auto like = [](at::Tensor g, const OptionalTensor& p, bool wanted) {
    return wanted && has(p) ? g.to(p->scalar_type()) : g;
  };
  return {dx, like(dw, weight, mask[1]), like(db, bias, mask[2]), dr};
}

Gradients norm_bwd(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& residual,
                   const OptionalTensor& mean, const at::Tensor& var, const OptionalTensor& seed,
                   at::IntArrayRef view, int64_t statistic, bool frozen, double eps,
                   double weight_offset, int64_t activation, double dropout_p,
                   std::array<bool, 4> mask) {
  const NormConfig config =
      to_config(view, statistic, frozen, false, eps, weight_offset, activation, dropout_p, seed);
  return run_backward(config, dy, {}, x, weight, bias, residual, mean, var, mask);
}

Gradients add_norm_bwd(const OptionalTensor& dy, const OptionalTensor& dsum, const at::Tensor& sum,
                       const OptionalTensor& weight, const OptionalTensor& mean,
                       const at::Tensor& var, const OptionalTensor& seed, at::IntArrayRef view,
                       int64_t statistic, double eps, double weight_offset, double dropout_p,
                       std::array<bool, 4> mask) {
  const NormConfig config =
      to_config(view, statistic, false, true, eps, weight_offset, 0, dropout_p, seed);
  return run_backward(config, dy, dsum, sum, weight, {}, {}, mean, var, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("norm_fwd", norm_fwd);
  m.impl("norm_bwd", norm_bwd);
  m.impl("add_norm_fwd", add_norm_fwd);
  m.impl("add_norm_bwd", add_norm_bwd);
}

}  // namespace fastnorm::cpu
