// Entry points of the cross-entropy kernels.
#include "cuda/cross_entropy.cuh"

#include "norm_entry.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

// integers: rows, classes, ignore_index, mean, torch_mean, clusters
// pointers: x, target, weight, prior, totals, losses, mass, grad, loss, scale
SIMT_EXPORT int cross_entropy(int dtype, const int64_t* integers, double smoothing,
                              void* const* pointers) {
  using namespace fastnorm::cuda;
  int status = 0;
  launched_kernels().clear();
  visit_entry_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = fastnorm::Accumulate<T>;
    cross_entropy(
        CrossEntropy<T>{integers[0], integers[1], static_cast<const T*>(pointers[0]),
                        static_cast<const int64_t*>(pointers[1]),
                        static_cast<const A*>(pointers[2]), static_cast<const A*>(pointers[3]),
                        smoothing, integers[2], integers[3] != 0, integers[4] != 0,
                        static_cast<double*>(pointers[4]), static_cast<A*>(pointers[5]),
                        static_cast<A*>(pointers[6]), static_cast<T*>(pointers[7]),
                        static_cast<A*>(pointers[8]), static_cast<A*>(pointers[9])},
        DeviceLimits{integers[5] != 0, 227 * 1024}, EmulatedLaunch{&status});
  });
  return status;
}

SIMT_EXPORT int scale_gradient(int dtype, const int64_t* numel, void* grad, const void* factor) {
  using namespace fastnorm::cuda;
  int status = 0;
  visit_entry_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    scale_gradient(static_cast<T*>(grad), *numel,
                   static_cast<const fastnorm::Accumulate<T>*>(factor), EmulatedLaunch{&status});
  });
  return status;
}

SIMT_EXPORT const char* simt_launched() { return fastnorm::cuda::launched_kernels().c_str(); }
