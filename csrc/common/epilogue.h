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

#define FASTNORM_SCALAR_MATH(T, suffix)                                                 \
  template <>                                                                           \
  struct Math<T> {                                                                      \
    static FASTNORM_HD T exp(T x) { return ::exp##suffix(x); }                          \
    static FASTNORM_HD T erf(T x) { return ::erf##suffix(x); }                          \
    static FASTNORM_HD T tanh(T x) { return ::tanh##suffix(x); }                        \
    /* a where x <= 0, otherwise (and for NaN) b */                                     \
    static FASTNORM_HD T where_nonpositive(T x, T a, T b) { return x <= T(0) ? a : b; } \
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
    return x * V(0.5) * (V(1) + Math<V>::erf(x * V(0.70710678118654752440)));
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    const V cdf = V(0.5) * (V(1) + Math<V>::erf(x * V(0.70710678118654752440)));
    const V pdf = V(0.39894228040143267794) * Math<V>::exp(x * x * V(-0.5));
    return cdf + x * pdf;
  }
};

struct GeluTanh {  // 0.5 x (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3)
  template <typename V>
  static FASTNORM_HD V inner(V x) {
    return V(0.79788456080286535588) * (x + V(0.044715) * x * x * x);
  }
  template <typename V>
  static FASTNORM_HD V forward(V x) {
    return V(0.5) * x * (V(1) + Math<V>::tanh(inner(x)));
  }
  template <typename V>
  static FASTNORM_HD V derivative(V x) {
    const V t = Math<V>::tanh(inner(x));
    const V du = V(0.79788456080286535588) * (V(1) + V(3 * 0.044715) * x * x);
    return V(0.5) * (V(1) + t) + V(0.5) * x * (V(1) - t * t) * du;
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
