// What both directions of the row geometry (row_norm_cpu.cpp) are made of: stretches, the
// statistics of a row, and the affine map of its columns.
#pragma once

#include "common/stats.h"
#include "cpu/chunk.h"

namespace fastnorm::cpu {

constexpr int64_t kStretch = 4096;
constexpr int64_t kScratch = 32768;  // columns that are kept widened: 128 KB of float

// Calls f(first, count) for the stretches of a row.
template <typename F>
void for_each_stretch(int64_t n, int64_t size, F&& f) {
  for (int64_t first = 0; first < n; first += size) f(first, std::min(size, n - first));
}

// x[0, n) in the accumulation type: x itself, or widened into `scratch`.
template <typename T>
const acc_t<T>* widened(const T* x, int64_t n, acc_t<T>* scratch) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return x;
  } else {
    load_chunk(x, scratch, n);
    return scratch;
  }
}

// The moments of a stretch; its mean is center + correction.
template <typename A>
struct StretchMoments {
  A center, correction, m2;
};

// Two passes: a mean, then the deviations from it, whose own mean corrects it. The shift by the
// first element makes a constant row exact. source(tag, i) is called for all elements in order
// (and for the first once more), after which they are at `values`. share is 1 / n.
template <typename A, typename F>
StretchMoments<A> stretch_moments(int64_t n, A share, F&& source, const A* values) {
  const A shift = source(OneTag{}, 0);
  const A sum = wide_sum<A>(n, [&](auto tag, int64_t i) { return source(tag, i) - shift; });
  const A center = shift + sum * share;
  const auto [off, square] = wide_sum_and_dot<A>(
      n, [&](auto tag, int64_t i, auto& d) { return d = load(tag, values + i) - center; });
  const A correction = off * share;
  return {center, correction, std::max(A(0), square - off * correction)};
}

template <typename A, typename F>
A stretch_squares(int64_t n, F&& source) {
  return wide_sum<A>(n, [&](auto tag, int64_t i) {
    const auto v = source(tag, i);
    return v * v;
  });
}

template <typename T>
struct RowStats {
  acc_t<T> mean, var;
};

// Statistics of the row at x, or with kAdd of the sum that it writes: x = p.x + p.residual. A
// 16-bit row is widened into `scratch`, all of it or (not `keep`) stretch after stretch.
template <bool kAdd, typename T>
RowStats<T> row_stats(const NormForward<T>& p, int64_t at, T* x, acc_t<T>* scratch, bool keep) {
  using A = acc_t<T>;
  constexpr bool kWiden = !std::is_same_v<T, A>;
  const int64_t n = p.config.view.reduce_inner;
  const bool centered = p.config.statistic == Statistic::MeanVar;
  Moments<double> all;
  double squares = 0;
  RowStats<T> stats{A(0), A(0)};
  for_each_stretch(n, kStretch, [&](int64_t first, int64_t m) {
    A* wide = scratch + (keep ? first : 0);
    T* in = x + first;
    const T *a = kAdd ? p.x + at + first : in, *b = p.residual + at + first;
    const auto source = [&](auto tag, int64_t i) {
      auto v = load(tag, a + i);
      if constexpr (kAdd) v = store(tag, in + i, v + load(tag, b + i));
      if constexpr (kWiden) store(tag, wide + i, v);
      return v;
    };
    const A* values;
    if constexpr (kWiden) {
      values = wide;
    } else {
      values = in;
    }
    if (!centered) {
      squares += stretch_squares<A>(m, source);
      stats.var = static_cast<A>(squares / n);
      return;
    }
    const A share = A(1) / static_cast<A>(m);
    const auto s = stretch_moments<A>(m, share, source, values);
    if (m == n) {  // the merge of one, without its divisions
      stats = {s.center + s.correction, s.m2 * share};
      return;
    }
    all.merge({static_cast<double>(m), static_cast<double>(s.center) + s.correction, s.m2});
    stats = {static_cast<A>(all.mean), static_cast<A>(all.m2 / n)};
  });
  return stats;
}

// sum = residual + dropout(x) of elements [at, at + n)
template <typename T>
C10_NOINLINE void add_prologue(const NormForward<T>& p, int64_t at, int64_t n) {
  using A = acc_t<T>;
  const Dropout& dropout = p.config.dropout;
  const T *x = p.x + at, *residual = p.residual + at;
  T* sum = p.sum + at;
  if (!dropout.seed) {
    return for_each_wide<A>(n, [&](auto tag, int64_t i) {
      store(tag, sum + i, load(tag, x + i) + load(tag, residual + i));
    });
  }
  const A scale = static_cast<A>(dropout.scale);
  for_each_mask(n, at, dropout, [&](int64_t first, int64_t m, const KeepMask* mask) {
    for_each_wide<A>(m, [&](auto tag, int64_t j) {
      const int64_t i = first + j;
      store(tag, sum + i, kept(tag, load(tag, x + i) * scale, mask + j) + load(tag, residual + i));
    });
  });
}

// y = dropout(activation(values + residual)) of elements [at, at + n)
template <typename T>
C10_NOINLINE void apply_epilogue(const NormForward<T>& p, int64_t at, int64_t n, acc_t<T>* values) {
  const NormConfig& c = p.config;
  T* y = p.y + at;
  if (p.residual) add_chunk(p.residual + at, values, n);
  if (!c.dropout.seed && c.activation != Activation::None) {
    return activate_chunk(c.activation, values, y, n);
  }
  activate_chunk(c.activation, values, n);
  if (c.dropout.seed) apply_dropout(values, n, at, c.dropout);
  store_chunk(values, y, n);
}

// Whether the epilogue's gradient needs xhat * weight + bias again.
template <typename T>
bool needs_pre(const NormBackward<T>& p) {
  return p.dy && !p.config.prologue && p.config.activation != Activation::None;
}

// d of elements [at, at + n): the gradient that reaches pre, which becomes scratch.
template <typename T>
C10_NOINLINE void epilogue_backward(const NormBackward<T>& p, int64_t at, int64_t n, acc_t<T>* pre,
                                    acc_t<T>* d) {
  const NormConfig& c = p.config;
  if (!p.dy) {  // of the prologue, whose sum alone has a gradient
    std::fill_n(d, n, acc_t<T>(0));
    return;
  }
  const T* dy = p.dy + at;
  const bool activated = needs_pre(p);
  if (activated) {
    if (p.residual) add_chunk(p.residual + at, pre, n);
    if (!c.dropout.seed) return activate_chunk_backward(c.activation, pre, dy, d, n);
  }
  load_chunk(dy, d, n);
  if (c.dropout.seed && !c.prologue) apply_dropout(d, n, at, c.dropout);
  if (activated) activate_chunk_backward(c.activation, pre, d, n);
}

// Writes dx of elements [at, at + n), which is scratch afterwards; behind a prologue it is that of
// the sum.
template <typename T>
C10_NOINLINE void write_dx(const NormBackward<T>& p, int64_t at, int64_t n, acc_t<T>* dx) {
  const NormConfig& c = p.config;
  if (c.prologue) {
    if (p.dsum) add_chunk(p.dsum + at, dx, n);
    if (p.dresidual) store_chunk(dx, p.dresidual + at, n);
    if (c.dropout.seed) apply_dropout(dx, n, at, c.dropout);
  }
  if (p.dx) store_chunk(dx, p.dx + at, n);
}

// What the chunks of one row share.
template <typename T>
struct Row {
  using A = acc_t<T>;
  int64_t first_channel;  // of the row; parameters are indexed from here
  A mean, rstd;
  const A* weight;
  const A* bias;

  // xhat of n columns
  template <typename S>
  void center(const S* x, int64_t n, A* xhat) const {
    for_each_wide<A>(
        n, [&](auto tag, int64_t i) { store(tag, xhat + i, (load(tag, x + i) - mean) * rstd); });
  }

  // out = xhat * weight + bias, in one rounding; the backward pass repeats it bit for bit.
  void affine(const A* xhat, int64_t first, int64_t n, A* out) const {
    const A* w = weight ? weight + first_channel + first : nullptr;
    const A* b = bias ? bias + first_channel + first : nullptr;
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      auto v = load(tag, xhat + i);
      if (w && b) {
        v = fmadd(v, load(tag, w + i), load(tag, b + i));
      } else if (w) {
        v = v * load(tag, w + i);
      } else if (b) {
        v = v + load(tag, b + i);
      }
      store(tag, out + i, v);
    });
  }
};

template <typename A>
inline A rstd_of(A var, double eps) {
  return A(1) / std::sqrt(var + static_cast<A>(eps));
}

template <typename T>
inline Row<T> make_row(const NormConfig& c, int64_t row, acc_t<T> mean, acc_t<T> rstd,
                       const acc_t<T>* weight, const acc_t<T>* bias) {
  const View& v = c.view;
  const int64_t first_channel = v.kept == 1 ? 0 : (row % v.kept) * v.reduce_inner;
  return {first_channel, mean, rstd, weight, bias};
}

// Per-channel sums of one block of rows; null when not asked for.
template <typename A>
struct ChannelSums {
  A* dweight;
  A* dbias;
};

// What follows from d and xhat of a chunk: g = d * weight, and its share of the channels' sums and
// of the row's.
template <typename T>
void add_sums(const Row<T>& row, const acc_t<T>* d, const acc_t<T>* xhat, int64_t first, int64_t n,
              acc_t<T>* g, ChannelSums<acc_t<T>> sums, BackwardSums<double>& total) {
  using A = acc_t<T>;
  const int64_t column = row.first_channel + first;
  A* dw = sums.dweight ? sums.dweight + column : nullptr;
  A* db = sums.dbias ? sums.dbias + column : nullptr;
  if (dw || db) {
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      const auto v = load(tag, d + i);
      if (dw) store(tag, dw + i, fmadd(v, load(tag, xhat + i), load(tag, dw + i)));
      if (db) store(tag, db + i, load(tag, db + i) + v);
    });
  }
  const A* w = row.weight ? row.weight + column : nullptr;
  const auto [sum, dot] = wide_sum_and_dot<A>(n, [&](auto tag, int64_t i, auto& v) {
    v = load(tag, xhat + i);
    auto in = load(tag, d + i);
    if (w) in = in * load(tag, w + i);
    return store(tag, g + i, in);
  });
  total.g += sum;
  total.gx += dot;
}

}  // namespace fastnorm::cpu
