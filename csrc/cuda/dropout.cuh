// Dropout on CUDA: one thread per pack of 16 bytes, one Philox call per thread.
//
// A pack of n elements (n divides 8) that starts at a multiple of n has all its bits in one call,
// whose counter is the element index / 8: the bits do not depend on the launch. In a mask that
// elements share (common/dropout.h) a pack begins anywhere and may straddle rows of the mask: it
// makes each call that it spans once, up to four. Forward and backward are one kernel, as on the
// CPU: the backward pass drops dy * activation'(x + bias), in this order, so that a dropped
// element's gradient is 0 even at inf.
#pragma once

#include "cuda/dropout_cuda.h"
#include "cuda/elementwise.cuh"

namespace fastnorm::cuda {

// Bit e: whether element index + e is kept, for e < n; index is a multiple of n.
template <int n>
FASTNORM_DEVICE uint32_t kept_bits(int64_t index, uint64_t seed, uint32_t threshold) {
  const Philox4 words = philox4x32_10(static_cast<uint64_t>(index) / 8, seed);
  // A runtime index into the four words would put them into local memory.
  const int first = static_cast<int>(index % 8);
  const uint64_t low = words.word[0] | static_cast<uint64_t>(words.word[1]) << 32;
  const uint64_t high = words.word[2] | static_cast<uint64_t>(words.word[3]) << 32;
  uint32_t kept = 0;
#pragma unroll
  for (int e = 0; e < n; ++e) {
    const int at = n == 8 ? e : first + e;
    const uint64_t four = at < 4 ? low : high;
    kept |= uint32_t{(four >> (16 * (at % 4)) & 0xffffu) < threshold} << e;
  }
  return kept;
}

// The same of the mask that elements i .. i + n - 1 of the tensor share with others.
template <int n>
FASTNORM_DEVICE uint32_t shared_kept_bits(const MaskView& view, int64_t i, uint64_t seed,
                                          uint32_t threshold) {
  // By runs of elements begin .. end - 1 that are neighbours in the mask, or one element of it.
  const int step = view.inner == 1 ? 0 : 1;
  uint32_t kept = 0;
#pragma unroll 1
  for (int begin = 0; begin < n;) {
    const int64_t row = divide(i + begin, view.inner);  // (o, s)
    const int64_t column = i + begin - row * view.inner;
    const int64_t o = divide(row, view.shared);
    const int64_t first = o * view.inner + column;
    if (begin == 0 && view.inner % n == 0) return kept_bits<n>(first, seed, threshold);
    const int64_t left = step == 0 ? (o + 1) * view.shared - row : view.inner - column;
    const int end = left < n - begin ? begin + static_cast<int>(left) : n;
    const int64_t last = first + step * (end - begin - 1);
    // One call at a time: the words of several would cost the kernel its occupancy.
#pragma unroll 1
    for (int64_t call = first / 8; call <= last / 8; ++call) {
      const uint32_t eight = kept_bits<8>(call * 8, seed, threshold);
      const int offset = static_cast<int>(first - call * 8) - begin * step;
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const int at = offset + e * step;
        if (e >= begin && e < end && at >= 0 && at < 8) kept |= (eight >> at & 1u) << e;
      }
    }
    begin = end;
  }
  return kept;
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
    const uint32_t threshold = config.dropout.threshold;
    const uint32_t kept = config.view.shared == 1
                              ? kept_bits<n>(i, seed, threshold)
                              : shared_kept_bits<n>(config.view, i, seed, threshold);
    const A scale = static_cast<A>(config.dropout.scale);
    const A shift = static_cast<A>(config.shift), dropped = static_cast<A>(config.dropped);
    const bool shifted = shift != A(0) || dropped != A(0);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      A value = v[e] * scale;
      if (shifted) value += shift;
      v[e] = kept >> e & 1u ? value : dropped;
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

// Without being asked for 40 resident warps, 32 of 16-bit types, the compiler takes registers that
// it doesn't need: 24 warps with one pack each would have 12 KB under way.
template <typename T, int n>
__global__ void __launch_bounds__(kDropoutThreads, sizeof(T) == 4   ? 5
                                                   : sizeof(T) == 2 ? 4
                                                                    : 1)
    dropout_kernel(DropoutPass<T> p) {
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
