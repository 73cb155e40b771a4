// What a norm kernel is told. Shared by the CPU and the CUDA kernels; knows nothing of Torch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTNORM_HD __host__ __device__ __forceinline__
#else
#define FASTNORM_HD inline
#endif

namespace fastnorm {

// The input, in memory order, is [outer][reduce_outer][kept][reduce_inner]. One statistic spans
// reduce_outer x reduce_inner elements; there are outer x kept of them, stored as [outer][kept].
//
//   norm               layout         outer   reduce_outer  kept  reduce_inner  inner
//   layer, RMS         any            M       1             1     N             1
//   group              NCHW           N       1             G     C/G * L       L
//   instance           NCHW           N       1             C     L             L
//   batch              NCHW           chunks  N             C     L             L
//   batch              NC, NHWC       chunks  N * L         C     1             1
//   group              NHWC           N       L             G     C/G           1
//   instance           NHWC           N       L             C     1             1
//   layer, RMS, dim=1  NCHW           N       C             L     1             0
//
// An element (o, r, k, i) belongs to channel k * (reduce_inner / inner) + i / inner, or, when
// inner is 0, to channel r. Weight, bias and their gradients have one value per channel.
// The last outer block has `tail` rows in place of reduce_outer (ghost batch norm's remainder).
struct View {
  int64_t outer, reduce_outer, kept, reduce_inner, inner, tail;

  FASTNORM_HD int64_t channels_per_kept() const { return reduce_inner / inner; }
  FASTNORM_HD int64_t channels() const {
    return inner == 0 ? reduce_outer : kept * channels_per_kept();
  }
  FASTNORM_HD int64_t rows_of(int64_t o) const { return o + 1 == outer ? tail : reduce_outer; }
  FASTNORM_HD int64_t row_size() const { return kept * reduce_inner; }
  FASTNORM_HD int64_t statistics() const { return outer * kept; }
  FASTNORM_HD int64_t numel() const {
    return outer == 0 ? 0 : ((outer - 1) * reduce_outer + tail) * row_size();
  }
};

// MeanVar: xhat = (x - mean) / sqrt(var + eps), var biased. MeanSquare: xhat = x / sqrt(var + eps)
// where var holds the mean square, and mean is not touched.
enum class Statistic : int { MeanVar = 0, MeanSquare = 1 };

// The numbers are those of fastnorm/epilogue.py.
enum class Activation : int {
  None = 0,
  Relu = 1,
  LeakyRelu = 2,
  Gelu = 3,
  GeluTanh = 4,
  Silu = 5,
  Sigmoid = 6,
  Tanh = 7,
};

// An element is kept when its 16 random bits are below threshold (philox.h); scale is
// 65536 / threshold, so that the expectation is exact for the probability actually used.
struct Dropout {
  uint32_t threshold = 65536;
  double scale = 1.0;
  const int64_t* seed = nullptr;  // one element, on the device of the input; null: no dropout

  static Dropout of(double p, const int64_t* seed) {
    Dropout d;
    if (seed == nullptr) return d;
    d.threshold = static_cast<uint32_t>(std::lrint((1.0 - p) * 65536.0));
    d.scale = d.threshold == 0 ? 0.0 : 65536.0 / d.threshold;
    d.seed = seed;
    return d;
  }
};

// forward:  y = dropout(activation((x - mean) * rstd * (weight + weight_offset) + bias + residual))
// With `prologue`, s = residual + dropout(x) is normalized (and returned) in place of x, and
// neither the residual nor the dropout come after the norm.
struct NormConfig {
  View view;
  Statistic statistic = Statistic::MeanVar;
  bool frozen = false;  // mean and var are inputs (running statistics), not functions of x
  bool prologue = false;
  double eps = 0.0;
  double weight_offset = 0.0;
  Activation activation = Activation::None;
  Dropout dropout;

  // Whether the row kernels take it. Frozen statistics are a batch norm's, whose batches of one
  // must round as the larger ones do.
  FASTNORM_HD bool is_row() const {
    return view.reduce_outer == 1 && view.tail == 1 && view.inner != 0 && !frozen;
  }
};

}  // namespace fastnorm
