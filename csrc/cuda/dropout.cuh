// Dropout on CUDA: one thread per pack of 16 bytes, one Philox call per thread.
//
// A pack of n elements (n divides 8) that starts at a multiple of n has all its bits in one call,
// whose counter is the element index / 8: the bits do not depend on the launch. Masks that
// elements share (common/dropout.h) need a call per element only where a pack straddles two of
// their rows. Forward and backward are one kernel, as on the CPU: the backward pass drops
// dy * activation'(x + bias), in this order, so that a dropped element's gradient is 0 even at inf.
#pragma once

#include "cuda/dropout_cuda.h"
#include "cuda/elementwise.cuh"

namespace fastnorm::cuda {

// 16 bits each of elements index .. index + n - 1; index is a multiple of n.
template <int n>
FASTNORM_DEVICE void random_bits(uint64_t index, uint64_t seed, uint32_t (&bits)[n]) {
  const Philox4 words = philox4x32_10(index / 8, seed);
  if constexpr (n == 8) {
#pragma unroll
    for (int e = 0; e < n; ++e) bits[e] = words.bits16(e);
  } else {
    // A runtime index into the four words would put them into local memory.
    const int first = static_cast<int>(index % 8);
    const uint64_t low = words.word[0] | static_cast<uint64_t>(words.word[1]) << 32;
    const uint64_t high = words.word[2] | static_cast<uint64_t>(words.word[3]) << 32;
    const uint64_t half = (first < 4 ? low : high) >> (16 * (first % 4));
#pragma unroll
    for (int e = 0; e < n; ++e) bits[e] = static_cast<uint32_t>(half >> (16 * e)) & 0xffffu;
  }
}

// The same of the mask that elements i .. i + n - 1 of the tensor share with others.
template <int n>
FASTNORM_DEVICE void shared_bits(const MaskView& view, int64_t i, uint64_t seed,
                                 uint32_t (&bits)[n]) {
  const int64_t row = divide(i, view.inner);  // (o, s)
  const int64_t column = i - row * view.inner;
  const int64_t o = divide(row, view.shared);
  const int64_t index = o * view.inner + column;
  if (view.inner % n == 0) return random_bits(static_cast<uint64_t>(index), seed, bits);
  if (view.inner == 1 && divide(i + n - 1, view.shared) == o) {
    uint32_t one[1];
    random_bits(static_cast<uint64_t>(o), seed, one);
#pragma unroll
    for (int e = 0; e < n; ++e) bits[e] = one[0];
    return;
  }
#pragma unroll
  for (int e = 0; e < n; ++e) {
    const int64_t r = divide(i + e, view.inner);
    const int64_t shared_index = divide(r, view.shared) * view.inner + (i + e - r * view.inner);
    uint32_t one[1];
    random_bits(static_cast<uint64_t>(shared_index), seed, one);
    bits[e] = one[0];
  }
}

template <int n, typename T>
FASTNORM_DEVICE void load_wide(const T* p, Accumulate<T> (&v)[n]) {
  const Pack<T, n> pack = load_streaming<n>(p);
#pragma unroll
  for (int e = 0; e < n; ++e) v[e] = widen(pack.v[e]);
}

template <int n, typename T>
FASTNORM_DEVICE void add_bias(const DropoutPass<T>& p, int64_t i, Accumulate<T> (&v)[n]) {
  if (p.bias == nullptr) return;
  int64_t column = i - divide(i, p.columns) * p.columns;
#pragma unroll
  for (int e = 0; e < n; ++e) {
    v[e] += widen(load(p.bias + column));
    if (++column == p.columns) column = 0;
  }
}

template <int n, typename T>
FASTNORM_DEVICE void dropout_pack(const DropoutPass<T>& p, int64_t i) {
  using A = Accumulate<T>;
  const DropoutConfig& config = p.config;
  A v[n];
  load_wide<n>(p.in + i, v);
  if (p.x != nullptr) {
    A pre[n];
    load_wide<n>(p.x + i, pre);
    add_bias<n>(p, i, pre);
    activate_backward<false>(v, pre, config.activation);
  } else {
    add_bias<n>(p, i, v);
    activate(v, config.activation);
  }
  if (config.dropout.seed != nullptr) {
    const uint64_t seed = static_cast<uint64_t>(load(config.dropout.seed));
    uint32_t bits[n];
    if (config.view.shared == 1) {
      random_bits(static_cast<uint64_t>(i), seed, bits);
    } else {
      shared_bits(config.view, i, seed, bits);
    }
    const A scale = static_cast<A>(config.dropout.scale);
    const A shift = static_cast<A>(config.shift), dropped = static_cast<A>(config.dropped);
    const bool shifted = shift != A(0) || dropped != A(0);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      A kept = v[e] * scale;
      if (shifted) kept += shift;
      v[e] = bits[e] < config.dropout.threshold ? kept : dropped;
    }
  }
  if (p.residual != nullptr) {
    A residual[n];
    load_wide<n>(p.residual + i, residual);
#pragma unroll
    for (int e = 0; e < n; ++e) v[e] += residual[e];
  }
  Pack<T, n> out;
#pragma unroll
  for (int e = 0; e < n; ++e) out.v[e] = narrow<T>(v[e]);
  store_streaming(p.out + i, out);
}

constexpr int kDropoutThreads = 256;

template <typename T, int n>
__global__ void __launch_bounds__(kDropoutThreads, 1) dropout_kernel(DropoutPass<T> p) {
  const int64_t numel = p.config.view.numel();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kDropoutThreads + threadIdx.x) * n;
  if (i + n <= numel) return dropout_pack<n>(p, i);
  for (int64_t j = i; j < numel; ++j) dropout_pack<1>(p, j);
}

// Packs of 16 bytes where every pointer allows them, single elements otherwise.
template <typename T, typename Launch>
void dropout(const DropoutPass<T>& p, const Launch& launch) {
  const int64_t numel = p.config.view.numel();
  if (numel == 0) return;
  const auto shape = [&](int n) {
    const int64_t elements = static_cast<int64_t>(kDropoutThreads) * n;
    return LaunchShape{static_cast<unsigned>((numel + elements - 1) / elements), kDropoutThreads};
  };
  constexpr int n = kPackSize<T>;
  if (aligned_to_16({p.in, p.x, p.residual, p.out})) {
    launch("dropout", shape(n), dropout_kernel<T, n>, p);
  } else {
    launch("dropout unaligned", shape(1), dropout_kernel<T, 1>, p);
  }
}

}  // namespace fastnorm::cuda
