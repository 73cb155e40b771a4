// The activations a norm or a dropout can end with: value and derivative side by side.
//
// Each is written once for any V that has Math<V>: float and double here (also on the GPU),
// vectors of them in cpu/vec_math.h. A new activation is one struct, one line in
// visit_activation, and one entry in fastnorm/epilogue.py.
#pragma once

#include <cmath>

#include "common/norm.h"

namespace fastnorm {

template <typename V>
struct Math;

#define FASTNORM_SCALAR_MATH(T, suffix)                                                     \
  template <>                                                                               \
  struct Math<T> {                                                                          \
    static FASTNORM_HD T exp(T x) { return ::exp##suffix(x); }                              \
    static FASTNORM_HD T erf(T x) { return ::erf##suffix(x); }                              \
    static FASTNORM_HD T tanh(T x) { return ::tanh##suffix(x); }                            \
    /* The standard normal distribution and its density; the vector side shares one exp. */ \
    static FASTNORM_HD T normal_cdf(T x) {                                                  \
      return T(0.5) * (T(1) + erf(x * T(0.70710678118654752440)));                          \
    }                                                                                       \
    static FASTNORM_HD void normal(T x, T& cdf, T& pdf) {                                   \
      cdf = normal_cdf(x);                                                                  \
      pdf = T(0.39894228040143267794) * exp(x * x * T(-0.5));                               \
    }                                                                                       \
    /* a where x <= 0, otherwise (and for NaN) b */                                         \
    static FASTNORM_HD T where_nonpositive(T x, T a, T b) { return x <= T(0) ? a : b; }     \
  };
FASTNORM_SCALAR_MATH(float, f)
FASTNORM_SCALAR_MATH(double, )
#undef FASTNORM_SCALAR_MATH

struct Identity {
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return x;
  }
  template <typename V>
  static FASTNORM_HD V derivative(V) {
    return V(1);
  }
};

struct Relu {
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return Math<V>::where_nonpositive(x, V(0), x);
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    return Math<V>::where_nonpositive(x, V(0), V(1));
  }
};

struct LeakyRelu {  // slope 0.01, torch's default
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return Math<V>::where_nonpositive(x, x * V(0.01), x);
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    return Math<V>::where_nonpositive(x, V(0.01), V(1));
  }
};

struct Gelu {  // x Phi(x); d/dx = Phi(x) + x phi(x)
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return x * Math<V>::normal_cdf(x);
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    V cdf(0), pdf(0);
    Math<V>::normal(x, cdf, pdf);
    return cdf + x * pdf;
  }
};

struct GeluTanh {  // 0.5 x (1 + tanh u) = x s(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
  template <typename V>
  static FASTNORM_HD V twice_u(V x) {
    return V(2 * 0.79788456080286535588) * (x + V(0.044715) * x * x * x);
  }
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return x / (V(1) + Math<V>::exp(V(0) - twice_u(x)));
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    // With e = exp(-|2u|), s and 1 - s are 1 / (1 + e) and e / (1 + e), neither by cancellation.
    const V z = twice_u(x);
    const V e = Math<V>::exp(Math<V>::where_nonpositive(z, z, V(0) - z));
    const V larger = V(1) / (V(1) + e), smaller = e * larger;
    const V dz = V(2 * 0.79788456080286535588) * (V(1) + V(3 * 0.044715) * x * x);
    return Math<V>::where_nonpositive(z, smaller, larger) + x * larger * smaller * dz;
  }
};

struct Sigmoid {
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return V(1) / (V(1) + Math<V>::exp(V(0) - x));
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    const V s = forward(x);
    return s * (V(1) - s);
  }
};

struct Silu {  // x s(x); d/dx = s (1 + x (1 - s))
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return x / (V(1) + Math<V>::exp(V(0) - x));
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    const V s = Sigmoid::forward(x);
    return s * (V(1) + x * (V(1) - s));
  }
};

struct Tanh {
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return Math<V>::tanh(x);
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    const V t = Math<V>::tanh(x);
    return V(1) - t * t;
  }
};

// Calls f(Struct{}) for the activation: one uniform branch, taken outside the element loop.
template <typename F>
FASTNORM_HD void visit_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::None:
      return f(Identity{});
    case Activation::Relu:
      return f(Relu{});
    case Activation::LeakyRelu:
      return f(LeakyRelu{});
    case Activation::Gelu:
      return f(Gelu{});
    case Activation::GeluTanh:
      return f(GeluTanh{});
    case Activation::Silu:
      return f(Silu{});
    case Activation::Sigmoid:
      return f(Sigmoid{});
    case Activation::Tanh:
      return f(Tanh{});
  }
}

}  // namespace fastnorm
