// Rows of at most kShortRow elements, a block of kShortRows rows at a time. One by one such a row
// takes 30 to 60 ns, of which its elements account for a few: a root and a division wait for its
// sums, its last elements are worked on singly, and what is asked of the norm is asked again.
// In a block the rows' sums do not wait for each other, the roots and divisions of all rows are a
// few vectors, and an epilogue or a prologue takes the block as one chunk.
//
// A row is read in whole Wides, the last of which reaches into the next row: those lanes are zero
// in sums, and where they are written the next row comes after. A block whose last row has no kSize
// elements behind it is copied to where there is room. So a row's bits are the same wherever in a
// block it lies.
#pragma once

#include <memory>

#include "cpu/row_cpu.h"

namespace fastnorm::cpu {

constexpr int64_t kShortRow = 128;
constexpr int64_t kShortRows = 16;        // of a block, at most
constexpr int64_t kShortElements = 1024;  // of a block: x, dy, dx and what comes next stay in L1

inline bool is_short(const View& v) { return v.reduce_inner <= kShortRow; }

// The Wides of a row of n elements.
template <typename A>
class RowLanes {
 public:
  static constexpr int64_t kSize = Wide<A>::kSize;

  explicit RowLanes(int64_t n) : last_((n - 1) / kSize * kSize) {
    using Vec = typename Wide<A>::Vec;
    const Vec rest(static_cast<A>(n - last_));
    own_ = {Vec::arange(A(0), A(1)) < rest, Vec::arange(A(Vec::size()), A(1)) < rest};
  }

  // body(i, own) for each of them; own(v) is v with zero in the next row's lanes.
  template <typename F>
  void each(F&& body) const {
    body(last_, [this](Wide<A> v) { return Wide<A>(v.lo & own_.lo, v.hi & own_.hi); });
    for (int64_t i = 0; i < last_; i += kSize) body(i, [](Wide<A> v) { return v; });
  }

 private:
  int64_t last_;
  Wide<A> own_;
};

// Values of all columns with room for a Wide behind them. Parameters that are absent change no bit:
// 1 as the weight, -0 as the bias.
template <typename A>
class ShortParameters {
 public:
  ShortParameters(const View& v, const A* weight, const A* bias) {
    if (is_short(v)) {
      weight_ = padded(v, weight, A(1));
      bias_ = padded(v, bias, -A(0));
    }
  }
  const A* weight() const { return weight_.get(); }
  const A* bias() const { return bias_.get(); }

 private:
  static std::unique_ptr<A[]> padded(const View& v, const A* values, A absent) {
    const int64_t columns = v.kept * v.reduce_inner, room = columns + Wide<A>::kSize;
    std::unique_ptr<A[]> out(new A[room]);
    std::fill_n(out.get(), room, absent);
    if (values) std::copy_n(values, columns, out.get());
    return out;
  }

  std::unique_ptr<A[]> weight_, bias_;
};

// What the rows of a block share, and what each has of its own. `column` is that of the first
// row's parameters.
template <typename A>
struct ShortBlock {
  RowLanes<A> lanes;
  int64_t n, most, rows, columns, column;
  const A *weight, *bias;
  A mean[kShortRows], var[kShortRows], rstd[kShortRows];

  ShortBlock(const View& v, const ShortParameters<A>& parameters)
      : lanes(v.reduce_inner),
        n(v.reduce_inner),
        most(std::min(kShortRows, kShortElements / n)),
        rows(0),
        columns(v.kept * n),
        column(0),
        weight(parameters.weight()),
        bias(parameters.bias()),
        mean{},
        var{} {}

  void start(int64_t row, int64_t end) {
    rows = std::min(most, end - row);
    column = row * n % columns;
  }

  // body(r, c) for the rows, whose parameters begin at c
  template <typename F>
  void each_row(F&& body) const {
    int64_t c = column;
    for (int64_t r = 0; r < rows; ++r) {
      body(r, c);
      c = c + n == columns ? 0 : c + n;
    }
  }

  void set_rstd(double eps) {
    for (int64_t r = 0; r < kShortRows; ++r) rstd[r] = rstd_of(var[r], eps);
  }
};

// A block's elements, with room for a Wide behind them.
template <typename T>
struct ShortRoom {
  T values[kShortElements + Wide<acc_t<T>>::kSize];

  const T* copy(const T* from, int64_t n) {
    std::copy_n(from, n, values);
    return values;
  }
};

// Mean and variance (0 and mean square) of each row, as row_stats has them.
template <typename T>
void short_stats(const T* x, bool centered, ShortBlock<acc_t<T>>& block) {
  using A = acc_t<T>;
  const RowLanes<A> lanes = block.lanes;
  const A share = A(1) / static_cast<A>(block.n);
  for (int64_t r = 0; r < block.rows; ++r, x += block.n) {
    Wide<A> sum, off, square;
    if (!centered) {
      lanes.each([&](int64_t i, auto own) {
        const Wide<A> v = own(load(WideTag{}, x + i));
        square = fmadd(v, v, square);
      });
      block.var[r] = square.sum();
      continue;
    }
    const A shift = load(OneTag{}, x);
    lanes.each([&](int64_t i, auto own) { sum += own(load(WideTag{}, x + i) - Wide<A>(shift)); });
    const A center = shift + sum.sum() * share;
    lanes.each([&](int64_t i, auto own) {
      const Wide<A> d = own(load(WideTag{}, x + i) - Wide<A>(center));
      off += d;
      square = fmadd(d, d, square);
    });
    const A all = off.sum(), correction = all * share;
    block.mean[r] = center + correction;
    block.var[r] = std::max(A(0), square.sum() - all * correction);
  }
  for (int64_t r = 0; r < kShortRows; ++r) block.var[r] /= static_cast<A>(block.n);
}

// out = xhat * weight + bias
template <typename T, typename Out>
C10_NOINLINE void short_map(const T* x, const ShortBlock<acc_t<T>>& block, Out* out) {
  using A = acc_t<T>;
  const int64_t n = block.n;
  block.each_row([&](int64_t r, int64_t column) {
    const Wide<A> mean(block.mean[r]), rstd(block.rstd[r]);
    const A *w = block.weight + column, *b = block.bias + column;
    for (int64_t i = 0; i < n; i += Wide<A>::kSize) {
      prefetch(x + i + block.most * n);
      const Wide<A> xhat = (load(WideTag{}, x + i) - mean) * rstd;
      store(WideTag{}, out + i, fmadd(xhat, load(WideTag{}, w + i), load(WideTag{}, b + i)));
    }
    x += n;
    out += n;
  });
}

// Rows [begin, end)
template <typename T>
C10_NOINLINE void short_rows_fwd(const NormForward<T>& p,
                                 const ShortParameters<acc_t<T>>& parameters, int64_t begin,
                                 int64_t end) {
  using A = acc_t<T>;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner;
  const bool epilogue = !c.prologue && has_epilogue(c, p.residual);
  ShortBlock<A> block(c.view, parameters);
  ShortRoom<T> in, out;
  ShortRoom<A> values;
  for (int64_t row = begin; row < end; row += block.most) {
    block.start(row, end);
    const int64_t at = row * n, size = block.rows * n;
    const bool room = at + size + Wide<A>::kSize <= end * n;
    if (c.prologue) add_prologue(p, at, size);
    const T* x = (c.prologue ? p.sum : p.x) + at;
    if (!room) x = in.copy(x, size);
    short_stats(x, c.statistic == Statistic::MeanVar, block);
    block.set_rstd(c.eps);
    if (p.mean) std::copy_n(block.mean, block.rows, p.mean + row);
    std::copy_n(block.var, block.rows, p.var + row);
    if (epilogue) {
      short_map(x, block, values.values);
      apply_epilogue(p, at, size, values.values);
    } else {
      short_map(x, block, room ? p.y + at : out.values);
      if (!room) std::copy_n(out.values, size, p.y + at);
    }
  }
}

// dx (if not null) from d, whose sums and those of d * xhat are added to the columns'.
template <typename T, typename D>
C10_NOINLINE void short_dx(const T* x, const D* d, const ShortBlock<acc_t<T>>& block, bool centered,
                           ChannelSums<acc_t<T>> sums, D* dx) {
  using A = acc_t<T>;
  const RowLanes<A> lanes = block.lanes;
  const int64_t n = block.n;
  A g_sum[kShortRows], gx_sum[kShortRows];
  block.each_row([&](int64_t r, int64_t column) {
    const Wide<A> mean(block.mean[r]), rstd(block.rstd[r]);
    const A* w = block.weight + column;
    A *dw = sums.dweight + column, *db = sums.dbias + column;
    const T* x_row = x + r * n;
    const D* d_row = d + r * n;
    Wide<A> g_lanes, gx_lanes;
    lanes.each([&](int64_t i, auto own) {
      const Wide<A> xhat = own((load(WideTag{}, x_row + i) - mean) * rstd);
      const Wide<A> v = own(load(WideTag{}, d_row + i));
      const Wide<A> g = own(v * load(WideTag{}, w + i));
      store(WideTag{}, dw + i, fmadd(v, xhat, load(WideTag{}, dw + i)));
      store(WideTag{}, db + i, load(WideTag{}, db + i) + v);
      g_lanes += g;
      gx_lanes = fmadd(g, xhat, gx_lanes);
    });
    g_sum[r] = g_lanes.sum();
    gx_sum[r] = gx_lanes.sum();
  });
  if (!dx) return;
  const A share = A(1) / static_cast<A>(n), g_share = centered ? share : A(0);
  block.each_row([&](int64_t r, int64_t column) {
    const Wide<A> mean(block.mean[r]), rstd(block.rstd[r]), g_mean(g_sum[r] * g_share),
        gx_mean(gx_sum[r] * share);
    const A* w = block.weight + column;
    for (int64_t i = 0; i < n; i += Wide<A>::kSize) {
      prefetch(x + i + block.most * n);
      prefetch(d + i + block.most * n);
      const Wide<A> xhat = (load(WideTag{}, x + i) - mean) * rstd;
      const Wide<A> g = load(WideTag{}, d + i) * load(WideTag{}, w + i);
      store(WideTag{}, dx + i, (g - g_mean - xhat * gx_mean) * rstd);
    }
    x += n;
    d += n;
    dx += n;
  });
}

// Rows [begin, end) of a task that goes on to `last`. The sums have room for a Wide behind them.
template <typename T>
C10_NOINLINE void short_rows_bwd(const NormBackward<T>& p,
                                 const ShortParameters<acc_t<T>>& parameters, int64_t begin,
                                 int64_t end, int64_t last, ChannelSums<acc_t<T>> sums) {
  using A = acc_t<T>;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner;
  const bool centered = c.statistic == Statistic::MeanVar;
  const bool several = c.prologue ? p.dsum || p.dx : has_epilogue(c, p.residual) || p.dresidual;
  T* const only = c.prologue ? p.dresidual : p.dx;
  ShortBlock<A> block(c.view, parameters);
  ShortRoom<T> in, grad, out;
  ShortRoom<A> pre, d;
  for (int64_t row = begin; row < end; row += block.most) {
    block.start(row, end);
    const int64_t at = row * n, size = block.rows * n;
    const bool room = at + size + Wide<A>::kSize <= last * n;
    const T* x = room ? p.x + at : in.copy(p.x + at, size);
    if (p.mean) std::copy_n(p.mean + row, block.rows, block.mean);
    std::copy_n(p.var + row, block.rows, block.var);
    block.set_rstd(c.eps);
    if (!several && p.dy) {
      const T* dy = room ? p.dy + at : grad.copy(p.dy + at, size);
      T* dx = only && !room ? out.values : only ? only + at : nullptr;
      short_dx(x, dy, block, centered, sums, dx);
      if (only && !room) std::copy_n(out.values, size, only + at);
      continue;
    }
    if (needs_pre(p)) short_map(x, block, pre.values);
    epilogue_backward(p, at, size, pre.values, d.values);
    if (p.dresidual && !c.prologue) store_chunk(d.values, p.dresidual + at, size);
    if (!p.dx && !(c.prologue && p.dresidual)) {
      short_dx<T, A>(x, d.values, block, centered, sums, nullptr);
      continue;
    }
    short_dx(x, d.values, block, centered, sums, pre.values);
    write_dx(p, at, size, pre.values);
  }
}

}  // namespace fastnorm::cpu
