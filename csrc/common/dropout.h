// What a dropout kernel is told. Shared by the CPU and the CUDA kernels; knows nothing of Torch.
#pragma once

#include "common/norm.h"

namespace fastnorm {

// The input, in memory order, is [outer][shared][inner]; element (o, s, i) is kept or dropped
// with element o * inner + i of the mask.
//
//   dropout                            layout          outer    shared   inner
//   element by element                 any             numel    1        1
//   channel (dropout1d/2d/3d)          NC, NCHW        N * C    H * W    1
//   channel                            NHWC            N        H * W    C
//   stochastic depth, "row"            any             N        numel/N  1
//   stochastic depth, "batch"          any             1        numel    1
struct MaskView {
  int64_t outer, shared, inner;

  FASTNORM_HD int64_t numel() const { return outer * shared * inner; }
};

// The numbers are those of fastnorm/_dropout.py.
enum class DropoutKind : int {
  Scaled = 0,    // kept elements are divided by the keep probability
  MaskOnly = 1,  // kept elements stay as they are
  Alpha = 2,     // dropped ones become SELU's lower limit, then mean and variance are restored
};

// forward:  y = residual + (keep ? scale * h + shift : dropped),  h = activation(x + bias)
// backward: dx = keep ? scale * dy * activation'(x + bias) : 0
// Bias and activation go with masks of single elements (shared == 1) alone.
struct DropoutConfig {
  MaskView view;
  Activation activation = Activation::None;
  Dropout dropout;  // its seed is null: everything is kept, with scale 1 and shift 0
  double shift = 0.0, dropped = 0.0;

  static DropoutConfig of(MaskView view, Activation activation, double p, DropoutKind kind,
                          const int64_t* seed) {
    DropoutConfig c;
    c.view = view;
    c.activation = activation;
    c.dropout = Dropout::of(p, seed);
    if (seed == nullptr) return c;
    if (kind == DropoutKind::MaskOnly) c.dropout.scale = 1.0;
    if (kind == DropoutKind::Alpha && c.dropout.threshold > 0) {
      // Klambauer et al., "Self-normalizing neural networks", NIPS 2017, section 3: with a
      // dropped value d = -lambda alpha and keep probability q, a (x or d) + b has the mean and
      // variance of x (0 and 1) for a = (q + d^2 q (1 - q))^-1/2, b = -a d (1 - q).
      const double limit = -1.7580993408473766;
      const double q = c.dropout.threshold / 65536.0;
      const double a = 1.0 / std::sqrt(q + limit * limit * q * (1.0 - q));
      c.dropout.scale = a;
      c.shift = -a * limit * (1.0 - q);
      c.dropped = a * limit + c.shift;
    }
    return c;
  }
};

}  // namespace fastnorm
