// Launches of the row kernels, forward.
#include "cuda/launch.h"
#include "cuda/row_norm_ragged.cuh"

namespace fastnorm::cuda {

template <typename T>
void launch_row_norm_fwd(const NormForward<T>& p, const DeviceLimits& device, cudaStream_t stream) {
  row_norm_fwd(p, device, StreamLaunch{stream});
}

#define FASTNORM_INSTANTIATE(T) \
  template void launch_row_norm_fwd<T>(const NormForward<T>&, const DeviceLimits&, cudaStream_t);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)

}  // namespace fastnorm::cuda
