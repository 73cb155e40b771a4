// The CUDA cross-entropy kernels: what they are given. No Torch.
#pragma once

#include "cuda/norm_cuda.h"

namespace fastnorm::cuda {

template <typename T>
struct CrossEntropy {
  int64_t rows, classes;
  const T* x;                   // [rows][classes]
  const int64_t* target;        // [rows]
  const Accumulate<T>* weight;  // [classes], null: ones
  const Accumulate<T>* prior;   // [classes], null: ones
  double smoothing;
  int64_t ignore_index;
  bool mean, torch_mean;
  double* totals;         // of ClassTotals
  Accumulate<T>* losses;  // [rows]
  Accumulate<T>* mass;    // [rows]
  T* grad;                // [rows][classes], null: not asked for
  Accumulate<T>* loss;    // mean or sum of the losses, null: not asked for
  Accumulate<T>* scale;   // what the gradient is still to be multiplied by

  bool uniform() const { return weight == nullptr && prior == nullptr; }
};

// Indices into `totals`.
enum ClassTotals : int { kPriors = 0, kWeighted = 1, kDivisor = 2, kClassTotals = 3 };

template <typename T>
void launch_cross_entropy(const CrossEntropy<T>& p, const DeviceLimits& device,
                          cudaStream_t stream);

// grad *= factor, unless that is 1.
template <typename T>
void launch_scale_gradient(T* grad, int64_t numel, const Accumulate<T>* factor,
                           cudaStream_t stream);

}  // namespace fastnorm::cuda
