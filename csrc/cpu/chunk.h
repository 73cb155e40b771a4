// Work on a chunk: a stretch of a tensor that is held in L1 in the accumulation type, while one
// simple loop after another (normalize, add, activate, drop) passes over it. A feature that is
// off costs one branch per chunk, so kernels need no template parameter for it.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/philox_cpu.h"
#include "cpu/vec_math.h"

namespace fastnorm::cpu {

// Elements of a chunk: with three scratch rows of float it leaves half of a 32 KB L1 to the
// tensors.
constexpr int64_t kChunk = 512;

template <typename T>
inline void load_chunk(const T* in, acc_t<T>* out, int64_t n) {
  for_each_wide<acc_t<T>>(n, [&](auto tag, int64_t i) { store(tag, out + i, load(tag, in + i)); });
}

template <typename T>
inline void store_chunk(const acc_t<T>* in, T* out, int64_t n) {
  for_each_wide<acc_t<T>>(n, [&](auto tag, int64_t i) { store(tag, out + i, load(tag, in + i)); });
}

// values += in
template <typename T>
inline void add_chunk(const T* in, acc_t<T>* values, int64_t n) {
  for_each_wide<acc_t<T>>(n, [&](auto tag, int64_t i) {
    store(tag, values + i, load(tag, values + i) + load(tag, in + i));
  });
}

// y = activation(values); they may be the same. The last elements are worked out in a Wide of
// their own: one scalar exp costs more than a vector of them.
template <typename A, typename O>
inline void activate_chunk(Activation activation, const A* values, O* y, int64_t n) {
  constexpr int64_t kSize = Wide<A>::kSize;
  A in[kSize] = {};
  O out[kSize];
  const int64_t rest = n % kSize, whole = n - rest;
  std::copy_n(values + whole, rest, in);
  visit_activation(activation, [&](auto f) {
    for (int64_t i = 0; i < n; i += kSize) {
      const Activated<O> v = load(WideTag{}, i < whole ? values + i : in);
      store<O>(WideTag{}, i < whole ? y + i : out, decltype(f)::forward(v));
    }
  });
  std::copy_n(out, rest, y + whole);
}

template <typename A>
inline void activate_chunk(Activation activation, A* values, int64_t n) {
  if (activation != Activation::None) activate_chunk(activation, values, values, n);
}

// grad = dy * activation'(pre); dy and grad may be the same.
template <typename A, typename G>
inline void activate_chunk_backward(Activation activation, const A* pre, const G* dy, A* grad,
                                    int64_t n) {
  constexpr int64_t kSize = Wide<A>::kSize;
  A in[kSize] = {}, out[kSize];
  G factor[kSize] = {};
  const int64_t rest = n % kSize, whole = n - rest;
  std::copy_n(pre + whole, rest, in);
  std::copy_n(dy + whole, rest, factor);
  visit_activation(activation, [&](auto f) {
    for (int64_t i = 0; i < n; i += kSize) {
      const Activated<G> v = load(WideTag{}, i < whole ? pre + i : in);
      const Wide<A> derivative = decltype(f)::derivative(v);
      store(WideTag{}, i < whole ? grad + i : out,
            load(WideTag{}, i < whole ? dy + i : factor) * derivative);
    }
  });
  std::copy_n(out, rest, grad + whole);
}

template <typename A>
inline void activate_chunk_backward(Activation activation, const A* pre, A* grad, int64_t n) {
  if (activation != Activation::None) activate_chunk_backward(activation, pre, grad, grad, n);
}

// Whether a chunk needs more than the affine map of the norm.
inline bool has_epilogue(const NormConfig& c, const void* residual) {
  return c.activation != Activation::None || residual != nullptr || c.dropout.seed != nullptr;
}

}  // namespace fastnorm::cpu
