// CPU side of the norm operators: choice of geometry and dtype.
#include <limits>

#include "cpu/norm_cpu.h"
#include "norm_op.h"

namespace fastnorm::cpu {
namespace {

// A parameter or statistic in the accumulation type, with the offset added and, for 16-bit inputs,
// any NaN made canonical (vec_math.h: store). Kernels read it many times, so one conversion of
// `channels` values here saves a template parameter there.
template <typename A>
class Parameter {
 public:
  Parameter(const OptionalTensor& t, double offset, const at::Tensor& x) {
    if (!has(t)) return;
    const auto dtype = c10::CppTypeToScalarType<A>::value;
    if (t->scalar_type() == dtype && offset == 0.0 && x.element_size() > 2) {
      data_ = t->const_data_ptr<A>();
      return;
    }
    converted_ = at::empty(t->sizes(), x.options().dtype(dtype));
    A* out = converted_.mutable_data_ptr<A>();
    visit_dtype(t->scalar_type(), [&](auto zero) {
      using P = decltype(zero);
      const P* in = t->const_data_ptr<P>();
      for (int64_t i = 0; i < t->numel(); ++i) {
        const A v = static_cast<A>(in[i]) + static_cast<A>(offset);
        out[i] = v == v ? v : std::numeric_limits<A>::quiet_NaN();
      }
    });
    data_ = out;
  }
  const A* get() const { return data_; }

 private:
  at::Tensor converted_;
  const A* data_ = nullptr;
};

// A call of `to` that changes nothing is a dispatch all the same.
at::Tensor in_type_of(const OptionalTensor& parameter, at::Tensor grad) {
  const bool fits = !has(parameter) || parameter->scalar_type() == grad.scalar_type();
  return fits ? std::move(grad) : grad.to(parameter->scalar_type());
}

// Frozen statistics are a batch norm's, whose batches of one must round as the larger ones do.
bool is_row(const NormConfig& config) {
  const View& view = config.view;
  return view.reduce_outer == 1 && view.tail == 1 && view.inner != 0 && !config.frozen;
}

struct CpuNorm {
  static void forward(const NormConfig& config, const at::Tensor& x, const OptionalTensor& residual,
                      const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& mean, const OptionalTensor& var, NormOutputs& out) {
    visit_dtype(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const Parameter<A> w(weight, config.weight_offset, x), b(bias, 0.0, x);
      const bool centered = config.statistic == Statistic::MeanVar;
      const Parameter<A> given_mean(centered ? mean : std::nullopt, 0.0, x), given_var(var, 0.0, x);
      A* m = config.frozen ? const_cast<A*>(given_mean.get()) : output_data<A>(out.mean);
      A* v = config.frozen ? const_cast<A*>(given_var.get()) : output_data<A>(out.var);
      const NormForward<T> p{
          config,  input_data<T>(x),      input_data<T>(residual), w.get(),
          b.get(), output_data<T>(out.y), output_data<T>(out.sum), centered ? m : nullptr,
          v};
      is_row(config) ? row_norm_fwd(p) : column_norm_fwd(p);
    });
  }

  static void backward(const NormConfig& config, const OptionalTensor& dy,
                       const OptionalTensor& dsum, const at::Tensor& x,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& mean,
                       const at::Tensor& var, std::array<bool, 4> mask, NormGradients& out) {
    const auto wide = x.options().dtype(accumulate_type(x.scalar_type()));
    out.weight = mask[1] ? at::empty({config.view.channels()}, wide) : none_like(x);
    out.bias = mask[2] ? at::empty({config.view.channels()}, wide) : none_like(x);
    visit_dtype(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const Parameter<A> w(weight, config.weight_offset, x), b(bias, 0.0, x);
      const bool centered = config.statistic == Statistic::MeanVar;
      const Parameter<A> given_mean(config.frozen && centered ? mean : std::nullopt, 0.0, x);
      const Parameter<A> given_var(config.frozen ? OptionalTensor(var) : std::nullopt, 0.0, x);
      const NormBackward<T> p{config,
                              input_data<T>(dy),
                              input_data<T>(dsum),
                              input_data<T>(x),
                              input_data<T>(residual),
                              w.get(),
                              b.get(),
                              !centered       ? nullptr
                              : config.frozen ? given_mean.get()
                                              : input_data<A>(mean),
                              config.frozen ? given_var.get() : input_data<A>(var),
                              output_data<T>(out.x),
                              output_data<T>(out.residual),
                              output_data<A>(out.weight),
                              output_data<A>(out.bias)};
      is_row(config) ? row_norm_bwd(p) : column_norm_bwd(p);
    });
    if (mask[1]) out.weight = in_type_of(weight, std::move(out.weight));
    if (mask[2]) out.bias = in_type_of(bias, std::move(out.bias));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) { NormOperators<CpuNorm>::register_on(m); }

}  // namespace fastnorm::cpu
