// Launches of the column kernels, backward.
#include "cuda/launch.h"
#include "cuda/pixel_norm.cuh"

namespace fastnorm::cuda {

size_t column_norm_bwd_workspace(const View& view, size_t element_size) {
  return view.inner == 0 ? pixel_norm_bwd_workspace_bytes(view, element_size)
                         : column_norm_bwd_workspace_bytes(view, element_size);
}

template <typename T>
void launch_column_norm_bwd(const NormBackward<T>& p, const DeviceLimits& device,
                            cudaStream_t stream) {
  if (p.config.view.inner == 0) return pixel_norm_bwd(p, device, StreamLaunch{stream});
  column_norm_bwd(p, StreamLaunch{stream});
}

#define FASTNORM_INSTANTIATE(T)                                                        \
  template void launch_column_norm_bwd<T>(const NormBackward<T>&, const DeviceLimits&, \
                                          cudaStream_t);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)

}  // namespace fastnorm::cuda
