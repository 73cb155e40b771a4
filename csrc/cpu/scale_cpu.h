// Scaling and masking of a stretch of memory, in the storage type: all that plain dropout does.
//
// A result that is too large for the caches can be stored past them (`stream`): an ordinary
// store first reads the line it overwrites, a third of all traffic of a copy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/vec_math.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#define FASTNORM_X86_VECTOR 1
#endif

namespace fastnorm::cpu {

// 0xffff for a kept element, 0 for a dropped one.
using KeepMask = uint16_t;

// The elements that one step takes, as they lie in memory: a Wide, or the one vector of a 16-bit
// type that widens to it. The functions below are the steps; each has its twin for one element.
template <typename T>
using Lanes = std::conditional_t<sizeof(T) == 2, at::vec::Vectorized<T>, Wide<acc_t<T>>>;

template <typename T>
inline Lanes<T> load_lanes(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return Lanes<T>::loadu(p);
  } else {
    return load(WideTag{}, p);
  }
}

template <typename T>
inline void store_lanes(T* p, const Lanes<T>& v) {
  if constexpr (sizeof(T) == 2) {
    v.store(p);
  } else {
    store(WideTag{}, p, v);
  }
}

// value * scale
template <typename T>
inline Lanes<T> scale_lanes(const Lanes<T>& value, acc_t<T> scale) {
  if constexpr (sizeof(T) != 2) {
    return value * Wide<T>(scale);
  } else {
#if defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      // Rounds to nearest even as ATen does, without its care for NaN: the product of a bfloat16
      // NaN has zeros below its upper half, from which rounding cannot carry.
      const auto half = [&](__m256i bits) {
        const __m256i product =
            _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(scale)));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(product, 16), _mm256_set1_epi32(1));
        const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        return _mm256_srli_epi32(_mm256_add_epi32(product, bias), 16);
      };
      const __m256i zero = _mm256_setzero_si256(), v = value;
      return Lanes<T>(_mm256_packus_epi32(half(_mm256_unpacklo_epi16(zero, v)),
                                          half(_mm256_unpackhi_epi16(zero, v))));
    }
#endif
    const auto [lo, hi] = at::vec::convert_to_float<T>(value);
    const at::vec::Vectorized<float> factor(scale);
    return at::vec::convert_from_float<T>(lo * factor, hi * factor);
  }
}

// The value where kept, otherwise +0: a bitwise and, so that a dropped inf or NaN is +0 too.
template <typename T>
inline Lanes<T> mask_lanes(const Lanes<T>& value, const KeepMask* mask) {
#ifdef FASTNORM_X86_VECTOR
  if constexpr (sizeof(T) == 2) {
    const void* bits = mask;
    return value & Lanes<T>::loadu(bits);
  } else {
    using Vec = typename Wide<T>::Vec;
    const auto half = [&](const KeepMask* m) {
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (sizeof(T) == 4) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(m));
        return Vec(_mm512_castsi512_ps(_mm512_cvtepi16_epi32(bits)));
      } else {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(m));
        return Vec(_mm512_castsi512_pd(_mm512_cvtepi16_epi64(bits)));
      }
#else
      if constexpr (sizeof(T) == 4) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(m));
        return Vec(_mm256_castsi256_ps(_mm256_cvtepi16_epi32(bits)));
      } else {
        const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(m));
        return Vec(_mm256_castsi256_pd(_mm256_cvtepi16_epi64(bits)));
      }
#endif
    };
    return {value.lo & half(mask), value.hi & half(mask + Vec::size())};
  }
#else
  T lanes[Wide<acc_t<T>>::kSize];
  store_lanes(lanes, value);
  for (int64_t i = 0; i < Wide<acc_t<T>>::kSize; ++i) {
    if (mask[i] == 0) lanes[i] = T(0);
  }
  return load_lanes(lanes);
#endif
}

// The same by the tags of vec_math.h, in the accumulation type.
template <typename A>
inline Wide<A> kept(WideTag, const Wide<A>& value, const KeepMask* mask) {
  return mask_lanes<A>(value, mask);
}
template <typename A>
inline A kept(OneTag, A value, const KeepMask* mask) {
  return *mask ? value : A(0);
}

#ifdef FASTNORM_X86_VECTOR
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr size_t kStreamAlignment = 64;
inline void stream_vector(void* p, at::vec::Vectorized<float> v) {
  _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_castps_si512(v));
}
inline void stream_vector(void* p, at::vec::Vectorized<double> v) {
  _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_castpd_si512(v));
}
template <typename T>
inline void stream_vector(void* p, at::vec::Vectorized<T> v) {
  _mm512_stream_si512(static_cast<__m512i*>(p), v);
}
#else
inline constexpr size_t kStreamAlignment = 32;
inline void stream_vector(void* p, at::vec::Vectorized<float> v) {
  _mm256_stream_ps(static_cast<float*>(p), v);
}
inline void stream_vector(void* p, at::vec::Vectorized<double> v) {
  _mm256_stream_pd(static_cast<double*>(p), v);
}
template <typename T>
inline void stream_vector(void* p, at::vec::Vectorized<T> v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), v);
}
#endif
inline void end_streaming() { _mm_sfence(); }
#else
inline void end_streaming() {}
#endif

// out[i] = lanes(i) in steps of a Wide, one(i) for the rest.
template <typename T, typename LanesAt, typename OneAt>
inline void write_stretch(T* out, int64_t n, bool stream, LanesAt&& lanes, OneAt&& one) {
  constexpr int64_t kStep = Wide<acc_t<T>>::kSize;
  int64_t i = 0;
  if (n <= 0) return;
#ifdef FASTNORM_X86_VECTOR
  if (stream) {
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % kStreamAlignment != 0; ++i) {
      out[i] = one(i);
    }
    for (; i + kStep <= n; i += kStep) {
      const Lanes<T> v = lanes(i);
      if constexpr (sizeof(T) == 2) {
        stream_vector(out + i, v);
      } else {
        stream_vector(out + i, v.lo);
        stream_vector(out + i + kStep / 2, v.hi);
      }
    }
  }
#endif
  for (; i + kStep <= n; i += kStep) store_lanes(out + i, lanes(i));
  for (; i < n; ++i) out[i] = one(i);
}

// out = mask ? in * scale : +0; in and out may be the same.
template <typename T>
inline void scale_kept(const T* in, T* out, const KeepMask* mask, int64_t n, acc_t<T> scale,
                       bool stream = false) {
  write_stretch(
      out, n, stream,
      [&](int64_t i) { return mask_lanes<T>(scale_lanes<T>(load_lanes(in + i), scale), mask + i); },
      [&](int64_t i) { return mask[i] ? static_cast<T>(in[i] * scale) : T(0); });
}

// out = in * scale
template <typename T>
inline void scale_stretch(const T* in, T* out, int64_t n, acc_t<T> scale, bool stream) {
  write_stretch(
      out, n, stream, [&](int64_t i) { return scale_lanes<T>(load_lanes(in + i), scale); },
      [&](int64_t i) { return static_cast<T>(in[i] * scale); });
}

// out = in * scale + add
template <typename T>
inline void scale_add_stretch(const T* in, const T* add, T* out, int64_t n, acc_t<T> scale,
                              bool stream) {
  using A = acc_t<T>;
  write_stretch(
      out, n, stream,
      [&](int64_t i) {
        const Wide<A> sum = load(WideTag{}, in + i) * Wide<A>(scale) + load(WideTag{}, add + i);
        if constexpr (sizeof(T) == 2) {
          return at::vec::convert_from_float<T>(sum.lo, sum.hi);
        } else {
          return sum;
        }
      },
      [&](int64_t i) {
        return static_cast<T>(static_cast<A>(in[i]) * scale + static_cast<A>(add[i]));
      });
}

// out = +0
template <typename T>
inline void zero_stretch(T* out, int64_t n, bool stream) {
  const Lanes<T> zero(T(0));
  write_stretch(out, n, stream, [&](int64_t) { return zero; }, [&](int64_t) { return T(0); });
}

// out = in
template <typename T>
inline void copy_stretch(const T* in, T* out, int64_t n, bool stream) {
  write_stretch(
      out, n, stream, [&](int64_t i) { return load_lanes(in + i); },
      [&](int64_t i) { return in[i]; });
}

}  // namespace fastnorm::cpu
