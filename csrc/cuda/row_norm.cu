// Launches of the row kernels.
#include "cuda/launch.h"
#include "cuda/row_norm_bwd.cuh"
#include "cuda/row_norm_ragged.cuh"

namespace fastnorm::cuda {

size_t row_norm_bwd_workspace(const View& view, size_t element_size) {
  return row_norm_bwd_workspace_bytes(view, element_size);
}

template <typename T>
void launch_row_norm_fwd(const NormForward<T>& p, const DeviceLimits& device, cudaStream_t stream) {
  row_norm_fwd(p, device, StreamLaunch{stream});
}

template <typename T>
void launch_row_norm_bwd(const NormBackward<T>& p, const DeviceLimits& device,
                         cudaStream_t stream) {
  row_norm_bwd(p, device, StreamLaunch{stream});
}

#define FASTNORM_INSTANTIATE(T)                                                                   \
  template void launch_row_norm_fwd<T>(const NormForward<T>&, const DeviceLimits&, cudaStream_t); \
  template void launch_row_norm_bwd<T>(const NormBackward<T>&, const DeviceLimits&, cudaStream_t);
FASTNORM_INSTANTIATE(float)
FASTNORM_INSTANTIATE(double)
FASTNORM_INSTANTIATE(__half)
FASTNORM_INSTANTIATE(__nv_bfloat16)
#undef FASTNORM_INSTANTIATE

}  // namespace fastnorm::cuda
