// Which form of the column geometry takes a norm.
#pragma once

#include "cuda/pixel_norm.cuh"
#include "cuda/plane_resident.cuh"

namespace fastnorm::cuda {

template <typename T, typename Launch>
void column_geometry_fwd(const NormForward<T>& p, const DeviceLimits& device, Launch&& launch) {
  if (p.config.view.inner == 0) return pixel_norm_fwd(p, device, launch);
  if (!plane_resident_fwd(p, device, launch)) column_norm_fwd(p, launch);
}

template <typename T, typename Launch>
void column_geometry_bwd(const NormBackward<T>& p, const DeviceLimits& device, Launch&& launch) {
  if (p.config.view.inner == 0) return pixel_norm_bwd(p, device, launch);
  if (!plane_resident_bwd(p, device, launch)) column_norm_bwd(p, launch);
}

template <typename T>
size_t column_geometry_bwd_workspace(const NormConfig& config, const DeviceLimits& device) {
  const View& view = config.view;
  if (view.inner == 0) return pixel_norm_bwd_workspace_bytes(view, sizeof(T));
  // Without dx the streaming form runs.
  return std::max(column_norm_bwd_workspace_bytes(view, sizeof(T)),
                  plane_resident_bwd_workspace_bytes<T>(config, device));
}

}  // namespace fastnorm::cuda
