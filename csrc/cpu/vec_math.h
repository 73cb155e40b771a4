// Vectors as the CPU kernels use them: a Wide<A> is two ATen vectors of the accumulation type,
// which is what one vector of a 16-bit type widens to. Loops run over whole Wides, then over
// single elements with the same body (for_each_wide), so a body is written once.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

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
    A lanes[Vec::size()];
    (lo + hi).store(lanes);
    for (int width = Vec::size() / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
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

template <typename T>
inline void store(WideTag, T* p, Wide<acc_t<T>> v) {
  using Vec = at::vec::Vectorized<T>;
  if constexpr (sizeof(T) == 2) {
    at::vec::convert_from_float<T>(v.lo, v.hi).store(p);
  } else {
    v.lo.store(p);
    v.hi.store(p + Vec::size());
  }
}

template <typename T>
inline void store(OneTag, T* p, acc_t<T> v) {
  *p = static_cast<T>(v);
}

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

// The sums of term(tag, i) and of its square, in one loop.
template <typename A, typename F>
inline std::pair<A, A> wide_sum_and_squares(int64_t n, F&& term) {
  constexpr int64_t kSize = Wide<A>::kSize;
  Wide<A> s0, s1, q0, q1;
  A s = 0, q = 0;
  int64_t i = 0;
  for (; i + 2 * kSize <= n; i += 2 * kSize) {
    const Wide<A> a = term(WideTag{}, i), b = term(WideTag{}, i + kSize);
    s0 += a;
    s1 += b;
    q0 = fmadd(a, a, q0);
    q1 = fmadd(b, b, q1);
  }
  for (; i + kSize <= n; i += kSize) {
    const Wide<A> a = term(WideTag{}, i);
    s0 += a;
    q0 = fmadd(a, a, q0);
  }
  for (; i < n; ++i) {
    const A a = term(OneTag{}, i);
    s += a;
    q = fmadd(a, a, q);
  }
  return {(s0 + s1).sum() + s, (q0 + q1).sum() + q};
}

}  // namespace fastnorm::cpu

namespace fastnorm {

// The vector side of common/epilogue.h. ATen's exp, erf and tanh are Sleef's, within 1 ulp.
template <typename A>
struct Math<cpu::Wide<A>> {
  using V = cpu::Wide<A>;
  static V exp(V x) { return {x.lo.exp(), x.hi.exp()}; }
  static V erf(V x) { return {x.lo.erf(), x.hi.erf()}; }
  static V tanh(V x) { return {x.lo.tanh(), x.hi.tanh()}; }
  static V where_nonpositive(V x, V a, V b) {
    using Vec = typename V::Vec;
    const Vec zero(A(0));
    return {Vec::blendv(b.lo, a.lo, x.lo <= zero), Vec::blendv(b.hi, a.hi, x.hi <= zero)};
  }
};

}  // namespace fastnorm
