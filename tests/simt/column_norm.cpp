// Entry points of the column kernels.
#include "cuda/column_forms.cuh"
#include "norm_entry.h"

SIMT_NORM_ENTRY(column_norm_fwd, column_geometry_fwd(arguments.forward<T>(), arguments.device(),
                                                     EmulatedLaunch{&status}))
SIMT_NORM_ENTRY(column_norm_bwd, column_geometry_bwd(arguments.backward<T>(), arguments.device(),
                                                     EmulatedLaunch{&status}))
SIMT_NORM_ENTRY(pixel_norm_fwd,
                pixel_norm_fwd(arguments.forward<T>(), arguments.device(), EmulatedLaunch{&status}))
SIMT_NORM_ENTRY(pixel_norm_bwd, pixel_norm_bwd(arguments.backward<T>(), arguments.device(),
                                               EmulatedLaunch{&status}))

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT const char* simt_launched() { return fastnorm::cuda::launched_kernels().c_str(); }

// Whether a row norm is the column geometry's; integers as for the norms.
SIMT_EXPORT int column_takes_row_norm(int dtype, const int64_t* integers, const double* reals,
                                      int residual, int backward) {
  using namespace fastnorm::cuda;
  const EntryArguments arguments{integers, reals, nullptr};
  bool taken = false;
  visit_entry_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const fastnorm::NormConfig config = arguments.config(nullptr);
    taken = backward == 0 ? planes_take_rows_fwd<T>(config, residual != 0, arguments.device())
                          : planes_take_rows_bwd<T>(config, arguments.device());
  });
  return taken;
}

// Bytes, forward or backward; integers as for the norms.
SIMT_EXPORT int column_norm_workspace(int dtype, const int64_t* integers, const double* reals,
                                      int backward) {
  using namespace fastnorm::cuda;
  const EntryArguments arguments{integers, reals, nullptr};
  size_t bytes = 0;
  visit_entry_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const fastnorm::NormConfig config = arguments.config(nullptr);
    bytes = backward == 0 ? column_norm_fwd_workspace_bytes(config.view, sizeof(T))
                          : column_geometry_bwd_workspace<T>(config, arguments.device());
  });
  return static_cast<int>(bytes);
}
