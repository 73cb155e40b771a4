// The CUDA dropout kernel: what it is given. No Torch.
#pragma once

#include "common/dropout.h"
#include "cuda/norm_cuda.h"

namespace fastnorm::cuda {

template <typename T>
struct DropoutPass {
  DropoutConfig config;
  const T* in;        // x, or dy in the backward pass
  const T* x;         // backward pass through an activation; else null
  const T* bias;      // `columns` values, repeated along the memory
  const T* residual;  // forward pass alone
  T* out;             // may be `in`
  int64_t columns;
};

template <typename T>
void launch_dropout(const DropoutPass<T>& p, cudaStream_t stream);

}  // namespace fastnorm::cuda
