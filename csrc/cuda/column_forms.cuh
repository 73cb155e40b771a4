// Which form of the column geometry takes a norm.
#pragma once

#include "cuda/pixel_norm.cuh"
#include "cuda/plane_resident.cuh"

namespace fastnorm::cuda {

inline constexpr int64_t kScratchRoom = 8 << 10;  // bytes of a block that its row can't have

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

// Whether the planes of a row norm, a group or instance norm of NCHW, may be chunked: samples whose
// packs lie elsewhere in a batch would have other bits there.
template <typename T>
bool chunks_rows(const View& v) {
  return PlaneTiling::takes(v) && v.row_size() % kPackSize<T> == 0;
}

// Forward, the row kernels starve the chip where a sample has few rows and no cluster holds one:
// eight blocks a row, which read it twice. Nothing here depends on the number of samples.
template <typename T>
bool planes_take_rows_fwd(const NormConfig& config, bool residual, const DeviceLimits& device) {
  if (config.prologue) return false;
  const View& v = config.view;
  const int64_t cluster = device.clusters ? kRowCluster : 1;
  const int64_t room = cluster * (static_cast<int64_t>(device.max_shared) - kScratchRoom);
  const int64_t bytes = v.reduce_inner * static_cast<int64_t>(sizeof(T)) * (residual ? 2 : 1);
  return chunks_rows<T>(v) && bytes > room && v.kept * cluster < kProcessors / 2;
}

// Backward, they need a pass of their own for the channels' gradients: 5 E b where the planes are
// resident in 3 E b or else chunked in (5 - 2f) E b.
template <typename T>
bool planes_take_rows_bwd(const NormConfig& config, const DeviceLimits& device) {
  if (config.prologue) return false;
  return chunks_rows<T>(config.view) || plane_resident_bwd_workspace_bytes<T>(config, device) > 0;
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
