// The CPU norm kernels: what they are given, and where each lives.
//
// Parameters and statistics are in the accumulation type (float, or double for double); the
// caller has added weight_offset to the weight. Every pointer is to dense memory in the order
// of common/norm.h. A null pointer means "absent" or "not asked for".
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/norm.h"

namespace fastnorm::cpu {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct NormForward {
  NormConfig config;
  const T* x;
  const T* residual;
  const acc_t<T>* weight;
  const acc_t<T>* bias;
  T* y;
  T* sum;          // prologue only: residual + dropout(x)
  acc_t<T>* mean;  // [outer][kept]; outputs, or inputs when the statistics are frozen.
  acc_t<T>* var;   // never null; mean is null for MeanSquare
};

template <typename T>
struct NormBackward {
  NormConfig config;
  const T* dy;
  const T* dsum;      // prologue only: gradient of the sum; null: zero
  const T* x;         // the sum, for the prologue
  const T* residual;  // when an activation needs it
  const acc_t<T>* weight;
  const acc_t<T>* bias;
  const acc_t<T>* mean;
  const acc_t<T>* var;
  T* dx;
  T* dresidual;
  acc_t<T>* dweight;  // [channels], written in full
  acc_t<T>* dbias;
};

// Whether statistics are those of contiguous planes of one channel each, long enough to pay for
// each plane. Many short ones go to the column form: it pays for each column, an eighth as much,
// and reads in longer runs.
inline bool is_plane(const View& v) {
  const int64_t rows = v.reduce_outer;
  return v.inner >= std::clamp<int64_t>(8 * rows, 16, 256) &&
         (v.inner == v.reduce_inner || rows == 1);
}

// Row geometry: config.is_row(), and not is_plane().
template <typename T>
void row_norm_fwd(const NormForward<T>& p);
template <typename T>
void row_norm_bwd(const NormBackward<T>& p);

// Column geometry: everything else (batch, group and instance norm in both layouts, layer norm over
// the channels of NCHW).
template <typename T>
void column_norm_fwd(const NormForward<T>& p);
template <typename T>
void column_norm_bwd(const NormBackward<T>& p);

// The form that a call takes, for fastnorm.explain: "row, resident" and the like.
const char* row_norm_form(const View& view, int element_size);
const char* column_norm_form(const View& view, int element_size);

}  // namespace fastnorm::cpu

// instantiate(T) for every dtype that has kernels.
#define FASTNORM_FOR_EACH_DTYPE(instantiate) \
  instantiate(float) instantiate(double) instantiate(c10::BFloat16) instantiate(c10::Half)
