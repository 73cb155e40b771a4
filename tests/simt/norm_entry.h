// What the entry points of the emulated norm kernels have in common: arguments as arrays, in the
// order of tests/simt/norms.py, and the launch that stands for <<<>>>.
#pragma once

#include "cuda/norm_cuda.h"

namespace fastnorm::cuda {

struct EntryArguments {
  const int64_t* integers;  // view[6], statistic, frozen, prologue, activation, weight_wide,
                            // bias_wide, clusters, max_shared
  const double* reals;      // eps, weight_offset, dropout_p
  void* const* pointers;

  NormConfig config(const void* seed) const {
    NormConfig c;
    c.view = {integers[0], integers[1], integers[2], integers[3], integers[4], integers[5]};
    c.statistic = static_cast<Statistic>(integers[6]);
    c.frozen = integers[7] != 0;
    c.prologue = integers[8] != 0;
    c.activation = static_cast<Activation>(integers[9]);
    c.eps = reals[0];
    c.weight_offset = reals[1];
    c.dropout = Dropout::of(reals[2], static_cast<const int64_t*>(seed));
    return c;
  }
  Parameter weight(int pointer) const { return {pointers[pointer], integers[10] != 0}; }
  Parameter bias(int pointer) const { return {pointers[pointer], integers[11] != 0}; }
  DeviceLimits device() const { return {integers[12] != 0, static_cast<size_t>(integers[13])}; }

  // pointers: x, residual, weight, bias, y, sum, mean, var, seed, workspace
  template <typename T>
  NormForward<T> forward() const {
    using A = Accumulate<T>;
    return {config(pointers[8]),
            static_cast<const T*>(pointers[0]),
            static_cast<const T*>(pointers[1]),
            weight(2),
            bias(3),
            static_cast<T*>(pointers[4]),
            static_cast<T*>(pointers[5]),
            static_cast<A*>(pointers[6]),
            static_cast<A*>(pointers[7]),
            static_cast<unsigned char*>(pointers[9])};
  }

  // pointers: dy, dsum, x, residual, weight, bias, mean, var, dx, dresidual, dweight, dbias, seed,
  // workspace
  template <typename T>
  NormBackward<T> backward() const {
    using A = Accumulate<T>;
    return {config(pointers[12]),
            static_cast<const T*>(pointers[0]),
            static_cast<const T*>(pointers[1]),
            static_cast<const T*>(pointers[2]),
            static_cast<const T*>(pointers[3]),
            weight(4),
            bias(5),
            static_cast<const A*>(pointers[6]),
            static_cast<const A*>(pointers[7]),
            static_cast<T*>(pointers[8]),
            static_cast<T*>(pointers[9]),
            pointers[10],
            pointers[11],
            integers[10] != 0,
            integers[11] != 0,
            static_cast<unsigned char*>(pointers[13])};
  }
};

// Starts kernels one after another until one fails; the names of those started, for tests of the
// dispatch, are in launched_kernels(). With names_only they aren't started.
inline std::string& launched_kernels() {
  static std::string names;
  return names;
}
inline bool names_only = false;

struct EmulatedLaunch {
  int* status;

  template <typename... P, typename... A>
  void operator()(const char* name, const LaunchShape& shape, void (*kernel)(P...),
                  A... arguments) const {
    if (*status != 0) return;
    std::string& names = launched_kernels();
    names += (names.empty() ? "" : "; ") + std::string(name);
    if (names_only) return;
    simt::Launch config{shape.grid, shape.threads, shape.shared, shape.cluster};
    *status = simt::launch(name, config, kernel, arguments...);
  }
};

// Bit d: whether dtype d is compiled, for builds that need not have all.
#ifndef SIMT_DTYPES
#define SIMT_DTYPES 15
#endif

// Calls f(T{}) for dtype 0 float, 1 double, 2 half, 3 bfloat16.
template <typename F>
void visit_entry_dtype(int dtype, F&& f) {
  if constexpr ((SIMT_DTYPES & 1) != 0) {
    if (dtype == 0) return f(float{});
  }
  if constexpr ((SIMT_DTYPES & 2) != 0) {
    if (dtype == 1) return f(double{});
  }
  if constexpr ((SIMT_DTYPES & 4) != 0) {
    if (dtype == 2) return f(__half{});
  }
  if constexpr ((SIMT_DTYPES & 8) != 0) {
    if (dtype == 3) return f(__nv_bfloat16{});
  }
}

}  // namespace fastnorm::cuda

// Whether the calls to come only name their kernels.
extern "C" __attribute__((visibility("default"), used)) inline void simt_names_only(int on) {
  fastnorm::cuda::names_only = on != 0;
}

#define SIMT_NORM_ENTRY(name, geometry_call)                                            \
  extern "C" __attribute__((visibility("default"))) int name(                           \
      int dtype, const int64_t* integers, const double* reals, void* const* pointers) { \
    using namespace fastnorm::cuda;                                                     \
    const EntryArguments arguments{integers, reals, pointers};                          \
    int status = 0;                                                                     \
    launched_kernels().clear();                                                         \
    visit_entry_dtype(dtype, [&](auto zero) {                                           \
      using T = decltype(zero);                                                         \
      geometry_call;                                                                    \
    });                                                                                 \
    return status;                                                                      \
  }
