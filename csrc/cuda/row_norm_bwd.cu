// Launches of the row kernels, backward.
#include "cuda/launch.h"
#include "cuda/row_norm_bwd_ragged.cuh"

namespace fastnorm::cuda {

size_t row_norm_bwd_workspace(const View& view, size_t element_size) {
  return row_norm_bwd_workspace_bytes(view, element_size);
}

template <typename T>
void launch_row_norm_bwd(const NormBackward<T>& p, const DeviceLimits& device,
                         cudaStream_t stream) {
  row_norm_bwd(p, device, StreamLaunch{stream, device.max_shared});
}

#define FASTNORM_INSTANTIATE(T) \
  template void launch_row_norm_bwd<T>(const NormBackward<T>&, const DeviceLimits&, cudaStream_t);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)

}  // namespace fastnorm::cuda
