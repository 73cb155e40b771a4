// Starts the kernels on a CUDA stream; the emulator of tests/simt has its own counterpart.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>

#include "cuda/norm_cuda.h"

namespace fastnorm::cuda {

struct StreamLaunch {
  cudaStream_t stream;
  size_t max_shared = 0;  // what the kernels may ask for: DeviceLimits::max_shared

  template <typename... P, typename... A>
  void operator()(const char*, const LaunchShape& shape, void (*kernel)(P...),
                  const A&... arguments) const {
    // Up to here a kernel may go without asking. The limit is the function's, not the launch's:
    // were it less than the most, another thread's launch could find it too low.
    constexpr size_t kDefaultShared = 48 * 1024;
    if (shape.shared > kDefaultShared) {
      C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(max_shared)));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.grid);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.cluster, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, P(arguments)...));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace fastnorm::cuda

// instantiate(T) for every dtype that has kernels.
#define FASTNORM_FOR_EACH_DTYPE(instantiate) \
  instantiate(float) instantiate(double) instantiate(__half) instantiate(__nv_bfloat16)
