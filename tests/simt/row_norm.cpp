// Entry points of the row kernels.
#include "cuda/row_norm.cuh"

#include "norm_entry.h"

SIMT_NORM_ENTRY(row_norm_fwd,
                row_norm_fwd(arguments.forward<T>(), arguments.device(), EmulatedLaunch{&status}))

extern "C" __attribute__((visibility("default"))) const char* simt_launched() {
  return fastnorm::cuda::launched_kernels().c_str();
}
