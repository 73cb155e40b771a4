// The CPU dropout kernels: what they are given. Every pointer is to dense memory in the order of
// common/dropout.h; a null pointer means "absent". Output and input may be the same memory.
#pragma once

#include "common/dropout.h"
#include "cpu/norm_cpu.h"

namespace fastnorm::cpu {

template <typename T>
struct DropoutForward {
  DropoutConfig config;
  const T* x;
  const acc_t<T>* bias;  // `columns` values, repeated along the memory
  const T* residual;
  T* y;
  int64_t columns;
};

template <typename T>
struct DropoutBackward {
  DropoutConfig config;
  const T* dy;
  const T* x;  // for an activation alone
  const acc_t<T>* bias;
  T* dx;
  int64_t columns;
};

template <typename T>
void dropout_fwd(const DropoutForward<T>& p);
template <typename T>
void dropout_bwd(const DropoutBackward<T>& p);

}  // namespace fastnorm::cpu
