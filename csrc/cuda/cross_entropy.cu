// Launches of the cross-entropy kernels.
#include "cuda/cross_entropy.cuh"
#include "cuda/launch.h"

namespace fastnorm::cuda {

template <typename T>
void launch_cross_entropy(const CrossEntropy<T>& p, const DeviceLimits& device,
                          cudaStream_t stream) {
  cross_entropy(p, device, StreamLaunch{stream, device.max_shared});
}

template <typename T>
void launch_scale_gradient(T* grad, int64_t numel, const Accumulate<T>* factor,
                           cudaStream_t stream) {
  scale_gradient(grad, numel, factor, StreamLaunch{stream});
}

#define FASTNORM_INSTANTIATE(T)                                                      \
  template void launch_cross_entropy<T>(const CrossEntropy<T>&, const DeviceLimits&, \
                                        cudaStream_t);                               \
  template void launch_scale_gradient<T>(T*, int64_t, const Accumulate<T>*, cudaStream_t);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)

}  // namespace fastnorm::cuda
