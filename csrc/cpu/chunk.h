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

// values = activation(values)
template <typename A>
inline void activate_chunk(Activation activation, A* values, int64_t n) {
  if (activation == Activation::None) return;
  visit_activation(activation, [&](auto f) {
    using F = decltype(f);
    for_each_wide<A>(
        n, [&](auto tag, int64_t i) { store(tag, values + i, F::forward(load(tag, values + i))); });
  });
}

// grad *= activation'(pre)
template <typename A>
inline void activate_chunk_backward(Activation activation, const A* pre, A* grad, int64_t n) {
  if (activation == Activation::None) return;
  visit_activation(activation, [&](auto f) {
    using F = decltype(f);
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      store(tag, grad + i, load(tag, grad + i) * F::derivative(load(tag, pre + i)));
    });
  });
}

// Calls f(first, count, channel) for the stretches of one channel that columns
// [first, first + n) of a row of `inner`-long channels are made of.
template <typename F>
inline void for_each_channel(int64_t first, int64_t n, int64_t inner, F&& f) {
  for (int64_t done = 0; done < n;) {
    const int64_t column = first + done;
    const int64_t channel = column / inner;
    const int64_t count = std::min(n - done, (channel + 1) * inner - column);
    f(done, count, channel);
    done += count;
  }
}

// Whether a chunk needs more than the affine map of the norm.
inline bool has_epilogue(const NormConfig& c, const void* residual) {
  return c.activation != Activation::None || residual != nullptr || c.dropout.seed != nullptr;
}

}  // namespace fastnorm::cpu
