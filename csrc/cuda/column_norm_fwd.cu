// Launches of the column kernels, forward.
#include "cuda/column_forms.cuh"
#include "cuda/launch.h"

namespace fastnorm::cuda {

size_t column_norm_fwd_workspace(const View& view, size_t element_size) {
  return column_norm_fwd_workspace_bytes(view, element_size);
}

template <typename T>
void launch_column_norm_fwd(const NormForward<T>& p, const DeviceLimits& device,
                            cudaStream_t stream) {
  column_geometry_fwd(p, device, StreamLaunch{stream, device.max_shared});
}

template <typename T>
bool column_takes_row_norm_fwd(const NormConfig& config, bool residual,
                               const DeviceLimits& device) {
  return planes_take_rows_fwd<T>(config, residual, device);
}

#define FASTNORM_INSTANTIATE(T)                                                       \
  template void launch_column_norm_fwd<T>(const NormForward<T>&, const DeviceLimits&, \
                                          cudaStream_t);                              \
  template bool column_takes_row_norm_fwd<T>(const NormConfig&, bool, const DeviceLimits&);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)

}  // namespace fastnorm::cuda
