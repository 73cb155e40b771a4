// What the CUDA entries of all operators need: the kernels' types, and the limits of a device.
#pragma once

#include <c10/cuda/CUDAException.h>

#include <mutex>
#include <vector>

#include "cuda/norm_cuda.h"
#include "torch_utils.h"

namespace fastnorm::cuda {

// The kernels' name of a storage type.
template <typename T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<c10::Half> {
  using type = __half;
};
template <>
struct DeviceType<c10::BFloat16> {
  using type = __nv_bfloat16;
};

template <typename F>
void visit_device_dtype(at::ScalarType dtype, F&& f) {
  visit_dtype(dtype, [&](auto zero) { f(typename DeviceType<decltype(zero)>::type{}); });
}

// Asked once per device: an attribute query per call would be a tenth of a small launch.
inline DeviceLimits limits_of(int device) {
  static std::mutex mutex;
  static std::vector<DeviceLimits> known;
  std::lock_guard<std::mutex> lock(mutex);
  while (static_cast<int>(known.size()) <= device) {
    const int index = static_cast<int>(known.size());
    int major = 0, shared = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    known.push_back({major >= 9, static_cast<size_t>(shared)});
  }
  return known[static_cast<size_t>(device)];
}

}  // namespace fastnorm::cuda
