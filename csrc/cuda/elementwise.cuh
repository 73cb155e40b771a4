// What the norm kernels do to one pack of elements, whatever their geometry: dropout, activation
// and its derivative, and the parameters of the pack. Forward beside backward.
#pragma once

#include "common/epilogue.h"
#include "common/philox.h"
#include "cuda/pack.cuh"

#ifdef FASTNORM_SIMT
#define FASTNORM_NOINLINE __attribute__((noinline))
#else
#define FASTNORM_NOINLINE __device__ __noinline__
#endif

namespace fastnorm::cuda {

// Dropout of a launch, read once per thread.
template <typename A>
struct Drop {
  bool on;
  uint32_t threshold;
  uint64_t seed;
  A scale;

  static FASTNORM_DEVICE Drop of(const Dropout& dropout) {
    Drop d{dropout.seed != nullptr, dropout.threshold, 0, static_cast<A>(dropout.scale)};
    if (d.on) d.seed = static_cast<uint64_t>(load(dropout.seed));
    return d;
  }

  // v[e] = v[e] * scale where element index + e is kept, else 0. n divides 8 and index is a
  // multiple of n, so that one Philox call serves the pack.
  template <int n>
  FASTNORM_DEVICE void apply(A (&v)[n], int64_t index) const {
    if (!on) return;
    const Philox4 bits = philox4x32_10(static_cast<uint64_t>(index) / 8, seed);
    if constexpr (n == 8) {
#pragma unroll
      for (int e = 0; e < n; ++e) v[e] = bits.bits16(e) < threshold ? v[e] * scale : A(0);
    } else {
      // A runtime index into the four words would put them into local memory.
      const int first = static_cast<int>(index % 8);
      const uint64_t low = bits.word[0] | static_cast<uint64_t>(bits.word[1]) << 32;
      const uint64_t high = bits.word[2] | static_cast<uint64_t>(bits.word[3]) << 32;
      const uint64_t half = (first < 4 ? low : high) >> (16 * (first % 4));
#pragma unroll
      for (int e = 0; e < n; ++e) {
        v[e] = (half >> (16 * e) & 0xffffu) < threshold ? v[e] * scale : A(0);
      }
    }
  }
};

// Dropout for threads that own single elements: the block draws the bits of a run of neighbours
// into shared memory, once per call.
template <typename A>
struct StagedDrop {
  Drop<A> drop;
  uint8_t* bytes;  // one for each call from `first_call` on
  int64_t first_call = 0;

  static FASTNORM_HD size_t size(int count) { return (static_cast<size_t>(count) + 14) / 8; }

  // Of elements index .. index + count - 1; to be read after a barrier.
  FASTNORM_DEVICE void draw(int64_t index, int count) {
    if (!drop.on) return;
    first_call = index / 8;
    const int calls = static_cast<int>((index + count + 7) / 8 - first_call);
    for (int c = static_cast<int>(threadIdx.x); c < calls; c += static_cast<int>(blockDim.x)) {
      const Philox4 bits = philox4x32_10(static_cast<uint64_t>(first_call + c), drop.seed);
      uint32_t kept = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        kept |= static_cast<uint32_t>(bits.bits16(e) < drop.threshold) << e;
      }
      shared_store(bytes + c, static_cast<uint8_t>(kept));
    }
  }

  FASTNORM_DEVICE void apply(A (&v)[1], int64_t index) const {
    if (!drop.on) return;
    const uint32_t kept = shared_load(bytes + (index / 8 - first_call));
    v[0] = kept >> (index % 8) & 1u ? v[0] * drop.scale : A(0);
  }
};

// v = activation(v): one branch per pack, uniform over the launch.
template <typename A, int n>
FASTNORM_DEVICE void activate(A (&v)[n], Activation activation) {
  if (activation == Activation::None) return;
  visit_activation(activation, [&](auto f) {
#pragma unroll
    for (int e = 0; e < n; ++e) v[e] = decltype(f)::forward(v[e]);
  });
}

template <typename A>
FASTNORM_NOINLINE A activation_derivative(A x, Activation activation) {
  A result = A(1);
  visit_activation(activation, [&](auto f) { result = decltype(f)::derivative(x); });
  return result;
}

// grad *= activation'(pre). `called`: by a call per element, for kernels that unroll many packs,
// where eight derivatives in line would be most of the code (and half of the compile time).
template <bool called, typename A, int n>
FASTNORM_DEVICE void activate_backward(A (&grad)[n], const A (&pre)[n], Activation activation) {
  if (activation == Activation::None) return;
  if constexpr (called) {
    if (activation == Activation::Relu) {
#pragma unroll
      for (int e = 0; e < n; ++e) grad[e] *= Relu::derivative(pre[e]);
      return;
    }
#pragma unroll
    for (int e = 0; e < n; ++e) grad[e] *= activation_derivative(pre[e], activation);
    return;
  }
  visit_activation(activation, [&](auto f) {
#pragma unroll
    for (int e = 0; e < n; ++e) grad[e] *= decltype(f)::derivative(pre[e]);
  });
}

// Where the parameters of a row's columns are: column j has channel first + j / inner.
struct Channels {
  int64_t first, inner;

  // Of row `row` = (outer, kept) of the view.
  static FASTNORM_DEVICE Channels of_row(const View& view, int64_t row) {
    if (view.inner == 1 && view.kept == 1) return {0, 1};
    return {row % view.kept * view.channels_per_kept(), view.inner};
  }
};

// a / b for a >= 0, b > 0: a 64-bit division costs about 100 instructions, a 32-bit one 20.
FASTNORM_DEVICE int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Parameters of columns j .. j+n-1; `absent` where there are none.
template <typename T, int n>
FASTNORM_DEVICE void load_channels(const Parameter& parameter, const Channels& channels, int64_t j,
                                   Accumulate<T> absent, Accumulate<T> (&out)[n]) {
  if (parameter.data == nullptr) {
#pragma unroll
    for (int e = 0; e < n; ++e) out[e] = absent;
    return;
  }
  if (channels.inner == 1) {
    load_parameter<T>(parameter, channels.first + j, out);
    return;
  }
  // Neighbours mostly share a channel: one division, then a count to the channel's end.
  const int64_t within = divide(j, channels.inner);
  int64_t channel = channels.first + within;
  int64_t left = channels.inner - (j - within * channels.inner);
  Accumulate<T> value[1];
  load_parameter<T>(parameter, channel, value);
#pragma unroll
  for (int e = 0; e < n; ++e) {
    if (left == 0) {
      load_parameter<T>(parameter, ++channel, value);
      left = channels.inner;
    }
    --left;
    out[e] = value[0];
  }
}

}  // namespace fastnorm::cuda
