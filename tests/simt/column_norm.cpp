// Entry points of the column kernels.
#include "cuda/pixel_norm.cuh"
#include "norm_entry.h"

SIMT_NORM_ENTRY(column_norm_fwd, column_norm_fwd(arguments.forward<T>(), EmulatedLaunch{&status}))
SIMT_NORM_ENTRY(column_norm_bwd, column_norm_bwd(arguments.backward<T>(), EmulatedLaunch{&status}))
SIMT_NORM_ENTRY(pixel_norm_fwd,
                pixel_norm_fwd(arguments.forward<T>(), arguments.device(), EmulatedLaunch{&status}))
SIMT_NORM_ENTRY(pixel_norm_bwd, pixel_norm_bwd(arguments.backward<T>(), arguments.device(),
                                               EmulatedLaunch{&status}))

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT const char* simt_launched() { return fastnorm::cuda::launched_kernels().c_str(); }

SIMT_EXPORT int column_norm_workspace(const int64_t* view, int element_size, int backward) {
  using namespace fastnorm::cuda;
  const fastnorm::View v{view[0], view[1], view[2], view[3], view[4], view[5]};
  const size_t bytes = backward == 0  ? column_norm_fwd_workspace_bytes(v, element_size)
                       : v.inner == 0 ? pixel_norm_bwd_workspace_bytes(v, element_size)
                                      : column_norm_bwd_workspace_bytes(v, element_size);
  return static_cast<int>(bytes);
}
