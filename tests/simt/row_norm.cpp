// Entry points of the row kernels.
#include "cuda/row_norm_bwd_ragged.cuh"
#include "cuda/row_norm_ragged.cuh"
#include "norm_entry.h"

SIMT_NORM_ENTRY(row_norm_fwd,
                row_norm_fwd(arguments.forward<T>(), arguments.device(), EmulatedLaunch{&status}))
SIMT_NORM_ENTRY(row_norm_bwd,
                row_norm_bwd(arguments.backward<T>(), arguments.device(), EmulatedLaunch{&status}))

extern "C" __attribute__((visibility("default"))) const char* simt_launched() {
  return fastnorm::cuda::launched_kernels().c_str();
}

extern "C" __attribute__((visibility("default"))) int row_norm_bwd_workspace(const int64_t* view,
                                                                             int element_size) {
  return static_cast<int>(fastnorm::cuda::row_norm_bwd_workspace_bytes(
      {view[0], view[1], view[2], view[3], view[4], view[5]}, element_size));
}
