// The CUDA norm kernels: what they are given, and where each lives. No Torch.
//
// Every pointer is to dense device memory in the order of common/norm.h; statistics and partial
// sums are in the accumulate type. A null pointer means "absent" or "not asked for". T is float,
// double, __half or __nv_bfloat16.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/pack.cuh"

namespace fastnorm::cuda {

template <typename T>
struct NormForward {
  NormConfig config;
  const T* x;
  const T* residual;
  Parameter weight, bias;
  T* y;
  T* sum;                    // prologue only: residual + dropout(x)
  Accumulate<T>* mean;       // [outer][kept]; outputs, or inputs when the statistics are frozen
  Accumulate<T>* var;        // never null; mean is null for MeanSquare
  unsigned char* workspace;  // as many bytes as the geometry's *_fwd_workspace says
};

template <typename T>
struct NormBackward {
  NormConfig config;
  const T* dy;        // null (prologue only): zero
  const T* dsum;      // prologue only: gradient of the sum; null: zero
  const T* x;         // the sum, for the prologue
  const T* residual;  // when an activation needs it
  Parameter weight, bias;
  const Accumulate<T>* mean;
  const Accumulate<T>* var;
  T* dx;
  T* dresidual;
  void* dweight;  // [channels], written in full, in the type of weight or bias
  void* dbias;
  bool dweight_wide, dbias_wide;  // stored in the accumulate type, as in Parameter
  unsigned char* workspace;
};

// What the launch shapes may use of the device.
struct DeviceLimits {
  bool clusters;      // clusters_fit
  size_t max_shared;  // bytes of dynamic shared memory per block, opted in
};

// Whether the kernels can have clusters of kRowCluster blocks with so much shared memory each, on
// the current device.
bool clusters_fit(int device, size_t max_shared);

struct LaunchShape {
  unsigned grid;
  unsigned threads;
  size_t shared = 0;
  unsigned cluster = 1;
};

// Row geometry: config.view.reduce_outer == 1. Workspace in bytes.
size_t row_norm_bwd_workspace(const View& view, size_t element_size);
template <typename T>
void launch_row_norm_fwd(const NormForward<T>& p, const DeviceLimits& device, cudaStream_t stream);
template <typename T>
void launch_row_norm_bwd(const NormBackward<T>& p, const DeviceLimits& device, cudaStream_t stream);

// Column geometry: everything else.
size_t column_norm_fwd_workspace(const View& view, size_t element_size);
template <typename T>
size_t column_norm_bwd_workspace(const NormConfig& config, const DeviceLimits& device);
// Whether the column geometry is the better one for a row norm: group and instance norm of NCHW;
// backward, where dx is asked for.
template <typename T>
bool column_takes_row_norm_fwd(const NormConfig& config, bool residual, const DeviceLimits& device);
template <typename T>
bool column_takes_row_norm_bwd(const NormConfig& config, const DeviceLimits& device);
template <typename T>
void launch_column_norm_fwd(const NormForward<T>& p, const DeviceLimits& device,
                            cudaStream_t stream);
template <typename T>
void launch_column_norm_bwd(const NormBackward<T>& p, const DeviceLimits& device,
                            cudaStream_t stream);

}  // namespace fastnorm::cuda
