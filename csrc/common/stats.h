// Statistics that are built from pieces, and merged in a fixed order.
#pragma once

#include "common/norm.h"

namespace fastnorm {

// Count, mean and sum of squared deviations of a piece; merged as in Chan, Golub, LeVeque (1983).
template <typename A>
struct Moments {
  A count = 0, mean = 0, m2 = 0;

  FASTNORM_HD void merge(const Moments& other) {
    if (other.count == A(0)) return;
    const A total = count + other.count;
    const A delta = other.mean - mean;
    const A share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

// The two row sums of the backward pass, g being the gradient that reaches xhat:
//   MeanVar:    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//   MeanSquare: dx = rstd * (g - xhat * mean(g * xhat))
// Frozen statistics drop both means: dx = rstd * g.
template <typename A>
struct BackwardSums {
  A g = 0, gx = 0;
};

}  // namespace fastnorm
