// Launches of the row kernels, forward.
#include "cuda/launch.h"
#include "cuda/row_norm_ragged.cuh"

namespace fastnorm::cuda {

template <typename T>
void launch_row_norm_fwd(const NormForward<T>& p, const DeviceLimits& device, cudaStream_t stream) {
  row_norm_fwd(p, device, StreamLaunch{stream, device.max_shared});
}

// Not on a device before 9.0; nor where PTX of an older architecture was compiled for this device
// when it was loaded, nor where the process has been given few of its multiprocessors.
bool clusters_fit(int device, size_t max_shared) {
  const auto kernel = row_norm_fwd_staged_kernel<float, 4>;
  const auto shared = static_cast<int>(max_shared);
  int major = 0;
  cudaFuncAttributes compiled{};
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaFuncGetAttributes(&compiled, kernel));
  if (major < 9 || compiled.ptxVersion < 90) return false;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kRowCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kRowCluster);
  config.blockDim = dim3(kRowThreads);
  config.dynamicSmemBytes = max_shared;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int resident = 0;
  if (cudaOccupancyMaxActiveClusters(&resident, kernel, &config) == cudaSuccess) {
    return resident > 0;
  }
  static_cast<void>(cudaGetLastError());
  return false;
}

#define FASTNORM_INSTANTIATE(T) \
  template void launch_row_norm_fwd<T>(const NormForward<T>&, const DeviceLimits&, cudaStream_t);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)

}  // namespace fastnorm::cuda
