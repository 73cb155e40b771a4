// CPU side of the norm operators: choice of geometry and dtype.
#include <limits>
#include <memory>

#include "cpu/vec_math.h"
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
    converted_.reset(new A[t->numel()]);
    visit_dtype(t->scalar_type(), [&](auto zero) {
      convert(t->const_data_ptr<decltype(zero)>(), t->numel(), static_cast<A>(offset));
    });
    data_ = converted_.get();
  }
  const A* get() const { return data_; }

 private:
  template <typename P>
  void convert(const P* in, int64_t n, A offset) {
    A* out = converted_.get();
    if constexpr (sizeof(P) == 2 && std::is_same_v<A, float>) {  // NaNs of 16 bits are fit already
      for_each_wide<A>(n, [&](auto tag, int64_t i) {
        const auto v = load(tag, in + i);
        store(tag, out + i, v + decltype(v + v)(offset));
      });
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const A v = static_cast<A>(in[i]) + offset;
        out[i] = v == v ? v : std::numeric_limits<A>::quiet_NaN();
      }
    }
  }

  std::unique_ptr<A[]> converted_;
  const A* data_ = nullptr;
};

// The gradient of a parameter: summed in the accumulation type, kept in the parameter's.
template <typename A>
class ParameterGradient {
 public:
  ParameterGradient(bool wanted, const OptionalTensor& parameter, int64_t channels,
                    const at::Tensor& x, at::Tensor& out)
      : out_(out) {
    const auto dtype = c10::CppTypeToScalarType<A>::value;
    const auto kept = has(parameter) ? parameter->scalar_type() : dtype;
    out = wanted ? make_empty({channels}, x.options().dtype(kept)) : none_like(x);
    if (!wanted || channels == 0) return;
    if (kept != dtype) wide_.reset(new A[channels]);
    sums_ = wide_ ? wide_.get() : out.mutable_data_ptr<A>();
  }
  A* get() const { return sums_; }
  void finish() const {
    if (!wide_) return;
    visit_dtype(out_.scalar_type(), [&](auto zero) {
      at::vec::convert(wide_.get(), out_.mutable_data_ptr<decltype(zero)>(), out_.numel());
    });
  }

 private:
  const at::Tensor& out_;
  std::unique_ptr<A[]> wide_;
  A* sums_ = nullptr;
};

bool takes_rows(const NormConfig& config) { return config.is_row() && !is_plane(config.view); }

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
      takes_rows(config) ? row_norm_fwd(p) : column_norm_fwd(p);
    });
  }

  static void backward(const NormConfig& config, const OptionalTensor& dy,
                       const OptionalTensor& dsum, const at::Tensor& x,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& mean,
                       const at::Tensor& var, std::array<bool, 4> mask, NormGradients& out) {
    const int64_t channels = mask[1] || mask[2] ? config.view.channels() : 0;
    visit_dtype(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const Parameter<A> w(weight, config.weight_offset, x), b(bias, 0.0, x);
      const bool centered = config.statistic == Statistic::MeanVar;
      const Parameter<A> given_mean(config.frozen && centered ? mean : std::nullopt, 0.0, x);
      const Parameter<A> given_var(config.frozen ? OptionalTensor(var) : std::nullopt, 0.0, x);
      const ParameterGradient<A> dweight(mask[1], weight, channels, x, out.weight),
          dbias(mask[2], bias, channels, x, out.bias);
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
                              dweight.get(),
                              dbias.get()};
      takes_rows(config) ? row_norm_bwd(p) : column_norm_bwd(p);
      dweight.finish();
      dbias.finish();
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) { NormOperators<CpuNorm>::register_on(m); }

}  // namespace fastnorm::cpu
