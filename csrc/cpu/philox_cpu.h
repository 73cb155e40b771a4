// Dropout masks by the vector: the bits of common/philox.h, many counters at a time.
//
// Each 64-bit lane holds one counter's word in its lower half; what is above is never read,
// because the widening multiply takes lower halves only. A round is then two multiplies, two
// shifts and four xors for all lanes:
//
//   p0 = M0 c0, p1 = M1 c2;  (c0, c1, c2, c3) <- (hi(p1) ^ c1 ^ k0, p1, hi(p0) ^ c3 ^ k1, p0)
//
// In the first round c2 = c3 = 0. Lanes start in such an order that interleaving the four words
// within each 128 bits gives the 16-bit values of consecutive elements.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/philox.h"
#include "cpu/scale_cpu.h"

namespace fastnorm::cpu {

// Masks of at most this many elements lie on the stack at a time.
inline constexpr int64_t kMaskBlock = 512;

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define FASTNORM_PHILOX_VECTOR 1
struct PhiloxLanes {
  using V = __m512i;
  static constexpr int kCounters = 8;
  static V first() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
  static V set(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static V mul(V a, V b) { return _mm512_mul_epu32(a, b); }
  static V high(V a) { return _mm512_srli_epi64(a, 32); }
  static V xor_(V a, V b) { return _mm512_xor_si512(a, b); }
  static V pair(V low, V high) {
    return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, _MM_PERM_CCAA);
  }
  static V interleave_low(V a, V b) { return _mm512_unpacklo_epi64(a, b); }
  static V interleave_high(V a, V b) { return _mm512_unpackhi_epi64(a, b); }
  static V set16(uint16_t x) { return _mm512_set1_epi16(static_cast<short>(x)); }
  static void store_not_above(KeepMask* out, V bits, V limit) {
    _mm512_storeu_si512(out, _mm512_movm_epi16(_mm512_cmple_epu16_mask(bits, limit)));
  }
};
#elif defined(__AVX2__)
#define FASTNORM_PHILOX_VECTOR 1
struct PhiloxLanes {
  using V = __m256i;
  static constexpr int kCounters = 4;
  static V first() { return _mm256_setr_epi64x(0, 2, 1, 3); }
  static V set(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static V add(V a, V b) { return _mm256_add_epi64(a, b); }
  static V mul(V a, V b) { return _mm256_mul_epu32(a, b); }
  static V high(V a) { return _mm256_srli_epi64(a, 32); }
  static V xor_(V a, V b) { return _mm256_xor_si256(a, b); }
  static V pair(V low, V high) {
    return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
  }
  static V interleave_low(V a, V b) { return _mm256_unpacklo_epi64(a, b); }
  static V interleave_high(V a, V b) { return _mm256_unpackhi_epi64(a, b); }
  static V set16(uint16_t x) { return _mm256_set1_epi16(static_cast<short>(x)); }
  static void store_not_above(KeepMask* out, V bits, V limit) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_cmpeq_epi16(_mm256_min_epu16(bits, limit), bits));
  }
};
#endif

#ifdef FASTNORM_PHILOX_VECTOR
// Masks of consecutive counters with the same upper half, those of two vectors at a time: two
// chains of dependent multiplies in flight.
class KeepMaskStream {
  using L = PhiloxLanes;
  using V = L::V;

 public:
  static constexpr int64_t kCounters = 2 * L::kCounters;
  static constexpr int64_t kElements = 8 * kCounters;

  KeepMaskStream(uint64_t counter, uint64_t seed, uint32_t threshold) {
    const V weyl0 = L::set(0x9E3779B9u), weyl1 = L::set(0xBB67AE85u);
    k0_[0] = L::set(static_cast<uint32_t>(seed));
    k1_[0] = L::set(static_cast<uint32_t>(seed >> 32));
    for (int r = 1; r < 10; ++r) {
      k0_[r] = L::add(k0_[r - 1], weyl0);
      k1_[r] = L::add(k1_[r - 1], weyl1);
    }
    // c2 = c3 = 0 and a common c1 leave the first product of round 1 the same for all lanes.
    const uint64_t common = uint64_t(0xD2511F53u) *
                            (static_cast<uint32_t>(counter >> 32) ^ static_cast<uint32_t>(seed));
    c2_round1_ = L::xor_(L::set(common >> 32), k1_[1]);
    k1_[2] = L::xor_(k1_[2], L::set(static_cast<uint32_t>(common)));
    limit_ = L::set16(static_cast<uint16_t>(threshold - 1));
    index_[0] = L::add(L::set(counter), L::first());
    index_[1] = L::add(L::set(counter + L::kCounters), L::first());
  }

  // Writes kElements masks.
  void next(KeepMask* out) {
    const V m0 = L::set(0xD2511F53u), m1 = L::set(0xCD9E8D57u), step = L::set(kCounters);
    V c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {  // rounds 0, 1 and 2
      const V p0 = L::mul(index_[u], m0);
      index_[u] = L::add(index_[u], step);
      const V p1 = L::mul(L::xor_(L::high(p0), k1_[0]), m1);
      const V q0 = L::mul(L::xor_(L::high(p1), k0_[1]), m0);
      const V q1 = L::mul(L::xor_(p0, c2_round1_), m1);
      c0[u] = L::xor_(L::high(q1), L::xor_(p1, k0_[2]));
      c2[u] = L::xor_(L::high(q0), k1_[2]);
      c1[u] = q1;
      c3[u] = q0;
    }
#pragma GCC unroll 7
    for (int r = 3; r < 10; ++r) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const V p0 = L::mul(c0[u], m0), p1 = L::mul(c2[u], m1);
        c0[u] = L::xor_(L::high(p1), L::xor_(c1[u], k0_[r]));
        c2[u] = L::xor_(L::high(p0), L::xor_(c3[u], k1_[r]));
        c1[u] = p1;
        c3[u] = p0;
      }
    }
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const V low = L::pair(c0[u], c1[u]), high = L::pair(c2[u], c3[u]);
      L::store_not_above(out, L::interleave_low(low, high), limit_);
      L::store_not_above(out + 4 * L::kCounters, L::interleave_high(low, high), limit_);
      out += 8 * L::kCounters;
    }
  }

 private:
  V k0_[10], k1_[10], c2_round1_, limit_, index_[2];
};
#else
class KeepMaskStream {
 public:
  static constexpr int64_t kCounters = 1;
  static constexpr int64_t kElements = 8;

  KeepMaskStream(uint64_t counter, uint64_t seed, uint32_t threshold)
      : counter_(counter), seed_(seed), threshold_(threshold) {}

  void next(KeepMask* out) {
    const Philox4 bits = philox4x32_10(counter_++, seed_);
    for (int j = 0; j < 8; ++j) out[j] = bits.bits16(j) < threshold_ ? 0xffff : 0;
  }

 private:
  uint64_t counter_, seed_;
  uint32_t threshold_;
};
#endif

// Whether a KeepMaskStream can serve `counters` counters from `counter` on.
inline bool streams(uint64_t counter, int64_t counters, uint32_t threshold) {
  const uint64_t last = counter + static_cast<uint64_t>(counters) + KeepMaskStream::kCounters;
  return threshold > 0 && counter >> 32 == last >> 32;
}

// Masks of elements first_index .. first_index + n - 1 of a block (n <= kMaskBlock). Returns
// where in `data` they begin: a counter is never split, so up to 7 elements before them and some
// behind are written too.
struct MaskBuffer {
  alignas(64) KeepMask data[kMaskBlock + 8 + KeepMaskStream::kElements];

  const KeepMask* fill(uint64_t first_index, int64_t n, uint64_t seed, uint32_t threshold) {
    const uint64_t counter = first_index / 8;
    const int64_t offset = static_cast<int64_t>(first_index % 8);
    const int64_t counters = (offset + n + 7) / 8;
    if (threshold == 0) {
      std::fill_n(data, n, KeepMask(0));
      return data;
    }
    if (streams(counter, counters, threshold)) {
      KeepMaskStream stream(counter, seed, threshold);
      for (int64_t c = 0; c < counters; c += KeepMaskStream::kCounters) stream.next(data + 8 * c);
    } else {
      for (int64_t c = 0; c < counters; ++c) {
        const Philox4 bits = philox4x32_10(counter + static_cast<uint64_t>(c), seed);
        for (int j = 0; j < 8; ++j) data[8 * c + j] = bits.bits16(j) < threshold ? 0xffff : 0;
      }
    }
    return data + offset;
  }
};

// Calls f(i, m, mask) for stretches of n elements from first_index on, in order: `mask` has the m
// of element first_index + i and those behind it. Bits are drawn a few vectors ahead of their use,
// so that the multiplies of the one fill the memory latency of the other.
template <typename F>
void for_each_mask(int64_t n, uint64_t first_index, const Dropout& dropout, F&& f) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  constexpr int64_t kStep = KeepMaskStream::kElements;
  MaskBuffer buffer;
  int64_t i = 0;
  while (i < n) {
    const uint64_t index = first_index + static_cast<uint64_t>(i);
    if (index % 8 == 0 && n - i >= kStep && streams(index / 8, n / 8, dropout.threshold)) {
      KeepMaskStream stream(index / 8, seed, dropout.threshold);
      for (; i + kStep <= n; i += kStep) {
        stream.next(buffer.data);
        f(i, kStep, buffer.data);
      }
    } else {
      // Up to the next multiple of 8, unless that is all there is.
      const int64_t size = std::min(n - i, kMaskBlock - static_cast<int64_t>(index % 8));
      f(i, size, buffer.fill(index, size, seed, dropout.threshold));
      i += size;
    }
  }
}

// out[i] = in[i] * scale where element first_index + i is kept, +0 elsewhere; in and out may be
// the same.
template <typename T>
void apply_dropout(const T* in, T* out, int64_t n, uint64_t first_index, const Dropout& dropout) {
  const auto scale = static_cast<acc_t<T>>(dropout.scale);
  for_each_mask(n, first_index, dropout, [&](int64_t i, int64_t m, const KeepMask* mask) {
    scale_kept(in + i, out + i, mask, m, scale);
  });
}

template <typename A>
void apply_dropout(A* values, int64_t n, uint64_t first_index, const Dropout& dropout) {
  apply_dropout(static_cast<const A*>(values), values, n, first_index, dropout);
}

}  // namespace fastnorm::cpu
