// The CPU cross-entropy kernel: what it is given. Class weights and prior are in the accumulation
// type; a null pointer means "absent": weights of 1, a uniform prior.
#pragma once

#include <cstdint>

#include "cpu/norm_cpu.h"

namespace fastnorm::cpu {

template <typename T>
struct CrossEntropy {
  int64_t rows, classes;
  const T* x;              // [rows][classes]
  const int64_t* target;   // [rows], checked; ignore_index leaves a row out
  const acc_t<T>* weight;  // [classes]
  const acc_t<T>* prior;   // [classes]
  double smoothing;
  int64_t ignore_index;
  acc_t<T> scale;  // of the gradient
  acc_t<T>* loss;  // [rows]
  acc_t<T>* mass;  // [rows]: sum over the classes of w t'
  T* grad;         // [rows][classes], null: not asked for
};

template <typename T>
void cross_entropy(const CrossEntropy<T>& p);

}  // namespace fastnorm::cpu
