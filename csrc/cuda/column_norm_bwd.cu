// Launches of the column kernels, backward.
#include "cuda/column_forms.cuh"
#include "cuda/launch.h"

namespace fastnorm::cuda {

template <typename T>
void launch_column_norm_bwd(const NormBackward<T>& p, const DeviceLimits& device,
                            cudaStream_t stream) {
  column_geometry_bwd(p, device, StreamLaunch{stream, device.max_shared});
}

template <typename T>
size_t column_norm_bwd_workspace(const NormConfig& config, const DeviceLimits& device) {
  return column_geometry_bwd_workspace<T>(config, device);
}

template <typename T>
bool column_takes_row_norm_bwd(const NormConfig& config, const DeviceLimits& device) {
  return planes_take_rows_bwd<T>(config, device);
}

#define FASTNORM_INSTANTIATE(T)                                                         \
  template void launch_column_norm_bwd<T>(const NormBackward<T>&, const DeviceLimits&,  \
                                          cudaStream_t);                                \
  template size_t column_norm_bwd_workspace<T>(const NormConfig&, const DeviceLimits&); \
  template bool column_takes_row_norm_bwd<T>(const NormConfig&, const DeviceLimits&);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)

}  // namespace fastnorm::cuda
