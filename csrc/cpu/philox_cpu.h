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

namespace fastnorm::cpu {

// 0xffff for a kept element, 0 for a dropped one.
using KeepMask = uint16_t;

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
// The mask of elements 8 * counter and on, for `groups` times the counters of two vectors (two
// chains of dependent multiplies in flight).
inline void keep_masks_vector(KeepMask* out, uint64_t counter, int64_t groups, uint64_t seed,
                              uint32_t threshold) {
  using L = PhiloxLanes;
  using V = L::V;
  V k0[10], k1[10];
  for (uint32_t r = 0; r < 10; ++r) {
    k0[r] = L::set(static_cast<uint32_t>(static_cast<uint32_t>(seed) + r * 0x9E3779B9u));
    k1[r] = L::set(static_cast<uint32_t>(static_cast<uint32_t>(seed >> 32) + r * 0xBB67AE85u));
  }
  const V m0 = L::set(0xD2511F53u), m1 = L::set(0xCD9E8D57u);
  const V limit = L::set16(static_cast<uint16_t>(threshold - 1));
  V index[2] = {L::add(L::set(counter), L::first()),
                L::add(L::set(counter + L::kCounters), L::first())};
  const V step = L::set(2 * L::kCounters);
  for (int64_t g = 0; g < groups; ++g) {
    V c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      c3[u] = L::mul(index[u], m0);
      c2[u] = L::xor_(L::high(c3[u]), k1[0]);
      c0[u] = L::xor_(L::high(index[u]), k0[0]);
      c1[u] = L::set(0);
      index[u] = L::add(index[u], step);
    }
    for (int r = 1; r < 10; ++r) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const V p0 = L::mul(c0[u], m0), p1 = L::mul(c2[u], m1);
        c0[u] = L::xor_(L::high(p1), L::xor_(c1[u], k0[r]));
        c2[u] = L::xor_(L::high(p0), L::xor_(c3[u], k1[r]));
        c1[u] = p1;
        c3[u] = p0;
      }
    }
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const V low = L::pair(c0[u], c1[u]), high = L::pair(c2[u], c3[u]);
      L::store_not_above(out, L::interleave_low(low, high), limit);
      L::store_not_above(out + 4 * L::kCounters, L::interleave_high(low, high), limit);
      out += 8 * L::kCounters;
    }
  }
}
#endif

// Masks of elements first_index .. first_index + n - 1 of a block (n <= kMaskBlock). Returns
// where in `buffer` they begin: a counter is never split, so up to 7 elements before them and
// some behind are written too.
struct MaskBuffer {
#ifdef FASTNORM_PHILOX_VECTOR
  static constexpr int64_t kGroup = 2 * PhiloxLanes::kCounters;
#else
  static constexpr int64_t kGroup = 1;
#endif
  alignas(64) KeepMask data[kMaskBlock + 8 + 8 * kGroup];

  const KeepMask* fill(uint64_t first_index, int64_t n, uint64_t seed, uint32_t threshold) {
    const uint64_t counter = first_index / 8;
    const int64_t offset = static_cast<int64_t>(first_index % 8);
    if (threshold == 0) {
      std::fill_n(data, n, KeepMask(0));
      return data;
    }
    const int64_t counters = (offset + n + 7) / 8;
#ifdef FASTNORM_PHILOX_VECTOR
    keep_masks_vector(data, counter, (counters + kGroup - 1) / kGroup, seed, threshold);
#else
    for (int64_t c = 0; c < counters; ++c) {
      const Philox4 bits = philox4x32_10(counter + static_cast<uint64_t>(c), seed);
      for (int j = 0; j < 8; ++j) data[8 * c + j] = bits.bits16(j) < threshold ? 0xffff : 0;
    }
#endif
    return data + offset;
  }
};

// out = mask ? in * scale : +0. A bitwise and, so that a dropped inf or NaN is +0 too.
inline void scale_kept(const float* in, float* out, const KeepMask* mask, int64_t n, float scale) {
  int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  for (; i + 16 <= n; i += 16) {
    const __m256i m = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + i));
    const __mmask16 keep = _mm512_test_epi32_mask(_mm512_cvtepi16_epi32(m), _mm512_set1_epi32(1));
    _mm512_storeu_ps(out + i,
                     _mm512_maskz_mul_ps(keep, _mm512_loadu_ps(in + i), _mm512_set1_ps(scale)));
  }
#elif defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    const __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i));
    const __m256 keep = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(m));
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(in + i), _mm256_set1_ps(scale));
    _mm256_storeu_ps(out + i, _mm256_and_ps(scaled, keep));
  }
#endif
  for (; i < n; ++i) {
    const float scaled = in[i] * scale;
    out[i] = mask[i] ? scaled : 0.0f;
  }
}

inline void scale_kept(const double* in, double* out, const KeepMask* mask, int64_t n,
                       double scale) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 4 <= n; i += 4) {
    const __m128i m = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask + i));
    const __m256d keep = _mm256_castsi256_pd(_mm256_cvtepi16_epi64(m));
    const __m256d scaled = _mm256_mul_pd(_mm256_loadu_pd(in + i), _mm256_set1_pd(scale));
    _mm256_storeu_pd(out + i, _mm256_and_pd(scaled, keep));
  }
#endif
  for (; i < n; ++i) {
    const double scaled = in[i] * scale;
    out[i] = mask[i] ? scaled : 0.0;
  }
}

// out[i] = in[i] * scale where element first_index + i is kept, +0 elsewhere. in == out is fine.
template <typename A>
void apply_dropout(const A* in, A* out, int64_t n, uint64_t first_index, const Dropout& dropout) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  MaskBuffer buffer;
  while (n > 0) {
    // A block ends at a multiple of 8, so that only the first one is unaligned.
    const int64_t size = std::min(n, kMaskBlock - static_cast<int64_t>(first_index % 8));
    const KeepMask* mask = buffer.fill(first_index, size, seed, dropout.threshold);
    scale_kept(in, out, mask, size, static_cast<A>(dropout.scale));
    in += size;
    out += size;
    n -= size;
    first_index += static_cast<uint64_t>(size);
  }
}

template <typename A>
void apply_dropout(A* values, int64_t n, uint64_t first_index, const Dropout& dropout) {
  apply_dropout(static_cast<const A*>(values), values, n, first_index, dropout);
}

}  // namespace fastnorm::cpu
