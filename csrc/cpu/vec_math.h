// Vectors as the CPU kernels use them: a Wide<A> is two ATen vectors of the accumulation type,
// which is what one vector of a 16-bit type widens to. Loops run over whole Wides, then over
// single elements with the same body (for_each_wide), so a body is written once.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/macros/Macros.h>

#include <cstdint>
#include <utility>

#include "common/epilogue.h"
#include "cpu/norm_cpu.h"

namespace fastnorm::cpu {

template <typename A>
struct Wide {
  using Vec = at::vec::Vectorized<A>;
  static constexpr int64_t kSize = 2 * Vec::size();
  Vec lo, hi;

  Wide() : lo(A(0)), hi(A(0)) {}
  Wide(A x) : lo(x), hi(x) {}  // NOLINT: a scalar is a vector of equal values
  Wide(Vec l, Vec h) : lo(l), hi(h) {}

  friend Wide operator+(Wide a, Wide b) { return {a.lo + b.lo, a.hi + b.hi}; }
  friend Wide operator-(Wide a, Wide b) { return {a.lo - b.lo, a.hi - b.hi}; }
  friend Wide operator*(Wide a, Wide b) { return {a.lo * b.lo, a.hi * b.hi}; }
  friend Wide operator/(Wide a, Wide b) { return {a.lo / b.lo, a.hi / b.hi}; }
  Wide& operator+=(Wide b) { return *this = *this + b; }

  // The sum of the lanes, in an order that depends on the vector width alone.
  A sum() const {
    const Vec both = lo + hi;
    if constexpr (std::is_same_v<A, float>) {
      return at::vec::vec_reduce_all<A>([](Vec a, Vec b) { return a + b; }, both);
    }
    // ATen's takes 30 ns for double: it goes through memory, a lane at a time.
    alignas(64) A lanes[Vec::size()];
    both.store(lanes);
    for (int half = Vec::size() / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
};

// a * b + c, with one rounding in a vector and in the scalar tail alike.
template <typename A>
inline Wide<A> fmadd(Wide<A> a, Wide<A> b, Wide<A> c) {
  return {at::vec::fmadd(a.lo, b.lo, c.lo), at::vec::fmadd(a.hi, b.hi, c.hi)};
}
inline float fmadd(float a, float b, float c) { return std::fma(a, b, c); }
inline double fmadd(double a, double b, double c) { return std::fma(a, b, c); }

// Loads and stores convert between the storage type T and the accumulation type. The tag says
// how many elements: a Wide or a single one.
struct WideTag {};
struct OneTag {};

template <typename T>
inline Wide<acc_t<T>> load(WideTag, const T* p) {
  using Vec = at::vec::Vectorized<T>;
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto widen = [](const T* four) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(four));
      return at::vec::Vectorized<float>(
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
    };
    return {widen(p), widen(p + 8)};
  }
#endif
  if constexpr (sizeof(T) == 2) {
    auto [lo, hi] = at::vec::convert_to_float<T>(Vec::loadu(p));
    return {lo, hi};
  } else {
    return {Vec::loadu(p), Vec::loadu(p + Vec::size())};
  }
}

template <typename T>
inline acc_t<T> load(OneTag, const T* p) {
  return static_cast<acc_t<T>>(*p);
}

// Stores v and returns what was stored, in the accumulation type.
//
// Rounding to bfloat16 adds at most 0x8000 to the bits. It keeps infinity, and every NaN whose low
// bits are not all ones: those that the processor makes, and those of 16-bit numbers. So float
// parameters and statistics enter the kernels with their NaNs made canonical (norm_op_cpu.cpp).
template <typename T>
inline Wide<acc_t<T>> store(WideTag, T* p, Wide<acc_t<T>> v) {
  using Vec = at::vec::Vectorized<T>;
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto rounded = [](__m256 x) {
      const __m256i bits = _mm256_castps_si256(x);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    };
    const auto cut = [](__m256i bits) {
      return at::vec::Vectorized<float>(
          _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff0000))));
    };
    const __m256i lo = rounded(v.lo), hi = rounded(v.hi);
    const __m256i packed =
        _mm256_packus_epi32(_mm256_srli_epi32(lo, 16), _mm256_srli_epi32(hi, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
    return {cut(lo), cut(hi)};
  }
#endif
  if constexpr (sizeof(T) == 2) {
    const Vec out = at::vec::convert_from_float<T>(v.lo, v.hi);
    out.store(p);
    auto [lo, hi] = at::vec::convert_to_float<T>(out);
    return {lo, hi};
  } else {
    v.lo.store(p);
    v.hi.store(p + Vec::size());
    return v;
  }
}

template <typename T>
inline acc_t<T> store(OneTag, T* p, acc_t<T> v) {
  *p = static_cast<T>(v);
  return static_cast<acc_t<T>>(*p);
}

// Asks for a line that is read soon; p may lie outside of any object.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

// body(tag, i) for i in steps of Wide<A>::kSize while they fit, then one by one.
template <typename A, typename F>
inline void for_each_wide(int64_t n, F&& body) {
  int64_t i = 0;
  for (; i + Wide<A>::kSize <= n; i += Wide<A>::kSize) body(WideTag{}, i);
  for (; i < n; ++i) body(OneTag{}, i);
}

// The sum of term(tag, i) over i < n: four independent Wides hide the latency of the additions,
// and the order depends on n and the vector width alone.
template <typename A, typename F>
inline A wide_sum(int64_t n, F&& term) {
  constexpr int64_t kSize = Wide<A>::kSize;
  Wide<A> s0, s1, s2, s3;
  A rest = 0;
  int64_t i = 0;
  for (; i + 4 * kSize <= n; i += 4 * kSize) {
    s0 += term(WideTag{}, i);
    s1 += term(WideTag{}, i + kSize);
    s2 += term(WideTag{}, i + 2 * kSize);
    s3 += term(WideTag{}, i + 3 * kSize);
  }
  for (; i + kSize <= n; i += kSize) s0 += term(WideTag{}, i);
  for (; i < n; ++i) rest += term(OneTag{}, i);
  return ((s0 + s1) + (s2 + s3)).sum() + rest;
}

// a = term(tag, i, b) sets b too; the sums of a and of a * b over i < n, in one loop. (A pair as
// the result costs four times the time: g++ 12 passes it through memory.)
template <typename A, typename F>
inline std::pair<A, A> wide_sum_and_dot(int64_t n, F&& term) {
  constexpr int64_t kSize = Wide<A>::kSize;
  Wide<A> s0, s1, q0, q1;
  A s = 0, q = 0;
  int64_t i = 0;
  for (; i + 2 * kSize <= n; i += 2 * kSize) {
    Wide<A> b, d;
    const Wide<A> a = term(WideTag{}, i, b);
    const Wide<A> c = term(WideTag{}, i + kSize, d);
    s0 += a;
    s1 += c;
    q0 = fmadd(a, b, q0);
    q1 = fmadd(c, d, q1);
  }
  for (; i + kSize <= n; i += kSize) {
    Wide<A> b;
    const Wide<A> a = term(WideTag{}, i, b);
    s0 += a;
    q0 = fmadd(a, b, q0);
  }
  for (; i < n; ++i) {
    A b;
    const A a = term(OneTag{}, i, b);
    s += a;
    q = fmadd(a, b, q);
  }
  return {(s0 + s1).sum() + s, (q0 + q1).sum() + q};
}

// A Wide of which 16 bits will be stored: its exp is within 2^-17 of the value.
struct Rough : Wide<float> {
  using Wide<float>::Wide;
  Rough(Wide<float> v) : Wide<float>(v) {}  // NOLINT: the same numbers
};

// What an activation is worked out in when its result goes to storage type T.
template <typename T>
using Activated = std::conditional_t<sizeof(T) == 2, Rough, Wide<acc_t<T>>>;

// e^x within 2 ulp (kRough: 2^-17), 0 below -87.7 and inf above 88.4: Cephes' expf, inlined. ATen's
// exp is a call to Sleef, which takes longer than all the rest of an activation. Left to itself
// the compiler keeps these functions out of line, and passes their vectors through memory.
template <bool kRough = false>
C10_ALWAYS_INLINE at::vec::Vectorized<float> fast_exp(at::vec::Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  using at::vec::fmadd;
  using Vec = at::vec::Vectorized<float>;
  const Vec one(1.0f);
  // In units of 1.5 * 2^23 the last bit is worth one, so the sum is rounded to an integer, whose
  // low bits are the exponent of 2^n. The clamps return a NaN.
  const Vec magic(12582912.0f + 127.0f);
  const Vec v = at::vec::clamp_min(at::vec::clamp_max(x, Vec(88.7f)), Vec(-88.1f));
  const Vec biased = fmadd(v, Vec(1.44269504088896341f), magic), n = biased - magic;
#if defined(CPU_CAPABILITY_AVX512)
  const Vec power(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(biased), 23)));
#else
  const Vec power(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased), 23)));
#endif
  if constexpr (kRough) {
    const Vec r = fmadd(n, Vec(-0.69314718056f), v), r2 = r * r;
    const Vec p = fmadd(r2, Vec(4.1276970e-2f), fmadd(r, Vec(1.6753688e-1f), Vec(5.0005137e-1f)));
    return fmadd(p, r2, r + one) * power;
  }
  const Vec r = fmadd(n, Vec(2.12194440e-4f), fmadd(n, Vec(-0.693359375f), v)), r2 = r * r;
  const Vec p0 = fmadd(r, Vec(1.6666665459e-1f), Vec(5.0000001201e-1f));
  const Vec p2 = fmadd(r, Vec(8.3334519073e-3f), Vec(4.1665795894e-2f));
  const Vec p4 = fmadd(r, Vec(1.9875691500e-4f), Vec(1.3981999507e-3f));
  return fmadd(fmadd(fmadd(p4, r2, p2), r2, p0), r2, r + one) * power;
#else
  return x.exp();
#endif
}
template <bool kRough = false>
inline at::vec::Vectorized<double> fast_exp(at::vec::Vectorized<double> x) {
  return x.exp();
}

// Phi(x) and phi(x), with one exp for both. For float the tail q = Phi(-|x|) is formula 7.1.26 of
// Abramowitz and Stegun, "Handbook of mathematical functions" (absolute error 7.5e-8), which is
// ATen's erf too.
template <bool kRough = false>
C10_ALWAYS_INLINE void normal(at::vec::Vectorized<float> x, at::vec::Vectorized<float>& cdf,
                              at::vec::Vectorized<float>& pdf) {
  using Vec = at::vec::Vectorized<float>;
  const Vec one(1.0f);
  const Vec e = fast_exp<kRough>(x * x * Vec(-0.5f));
  const Vec t = one / at::vec::fmadd(x.abs(), Vec(0.3275911f * 0.70710678f), one);
  Vec poly = at::vec::fmadd(Vec(0.5f * 1.061405429f), t, Vec(-0.5f * 1.453152027f));
  poly = at::vec::fmadd(poly, t, Vec(0.5f * 1.421413741f));
  poly = at::vec::fmadd(poly, t, Vec(-0.5f * 0.284496736f));
  poly = at::vec::fmadd(poly, t, Vec(0.5f * 0.254829592f));
  const Vec q = poly * t * e;
  cdf = Vec::blendv(one - q, q, x < Vec(0.0f));
  pdf = e * Vec(0.39894228f);
}
template <bool kRough = false>
inline void normal(at::vec::Vectorized<double> x, at::vec::Vectorized<double>& cdf,
                   at::vec::Vectorized<double>& pdf) {
  using Vec = at::vec::Vectorized<double>;
  cdf = Vec(0.5) * (Vec(1.0) + (x * Vec(0.70710678118654752440)).erf());
  pdf = Vec(0.39894228040143267794) * (x * x * Vec(-0.5)).exp();
}

}  // namespace fastnorm::cpu

namespace fastnorm {

// The vector side of common/epilogue.h. ATen's erf and tanh are Sleef's, within 1 ulp.
template <typename V, bool kRough>
struct WideMath {
  using Vec = typename V::Vec;
  static C10_ALWAYS_INLINE V exp(V x) {
    return V(cpu::fast_exp<kRough>(x.lo), cpu::fast_exp<kRough>(x.hi));
  }
  static V erf(V x) { return V(x.lo.erf(), x.hi.erf()); }
  static V tanh(V x) { return V(x.lo.tanh(), x.hi.tanh()); }
  static C10_ALWAYS_INLINE V normal_cdf(V x) {
    V cdf, pdf;
    normal(x, cdf, pdf);
    return cdf;
  }
  static C10_ALWAYS_INLINE void normal(V x, V& cdf, V& pdf) {
    cpu::normal<kRough>(x.lo, cdf.lo, pdf.lo);
    cpu::normal<kRough>(x.hi, cdf.hi, pdf.hi);
  }
  static V where_nonpositive(V x, V a, V b) {
    const Vec zero(0);
    return V(Vec::blendv(b.lo, a.lo, x.lo <= zero), Vec::blendv(b.hi, a.hi, x.hi <= zero));
  }
};
template <typename A>
struct Math<cpu::Wide<A>> : WideMath<cpu::Wide<A>, false> {};
template <>
struct Math<cpu::Rough> : WideMath<cpu::Rough, true> {};

}  // namespace fastnorm
