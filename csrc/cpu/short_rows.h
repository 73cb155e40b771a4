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
constexpr int64_t kShortRows = 16;

// The Wides of a row of n elements.
template <typename A>
class RowLanes {
 public:
  static constexpr int64_t kSize = Wide<A>::kSize;

  explicit RowLanes(int64_t n) : last_((n - 1) / kSize * kSize) {
    using Vec = typename Wide<A>::Vec;
    const A rest = static_cast<A>(n - last_);
    own_ = {Vec::arange(A(0), A(1)) < Vec(rest), Vec::arange(A(Vec::size()), A(1)) < Vec(rest)};
  }

  // The sum of term(i).
  template <typename F>
  A sum(F&& term) const {
    Wide<A> s = own(term(last_));
    for (int64_t i = 0; i < last_; i += kSize) s += term(i);
    return s.sum();
  }

  // a = term(i, b) sets b too: the sums of a and of a * b.
  template <typename F>
  std::pair<A, A> sum_and_dot(F&& term) const {
    Wide<A> b;
    Wide<A> s = own(term(last_, b)), q = s * own(b);
    for (int64_t i = 0; i < last_; i += kSize) {
      const Wide<A> a = term(i, b);
      s += a;
      q = fmadd(a, b, q);
    }
    return {s.sum(), q.sum()};
  }

 private:
  Wide<A> own(Wide<A> v) const { return {v.lo & own_.lo, v.hi & own_.hi}; }

  int64_t last_;
  Wide<A> own_;
};

// A parameter of `columns` columns with room to read a Wide behind them. Where there is none, one
// that changes no bit: 1 as the weight, -0 as the bias.
template <typename A>
std::unique_ptr<A[]> padded(const A* values, int64_t columns, A absent) {
  std::unique_ptr<A[]> out(new A[columns + Wide<A>::kSize]);
  std::fill_n(out.get(), columns + Wide<A>::kSize, absent);
  if (values) std::copy_n(values, columns, out.get());
  return out;
}

// Mean (0 for the mean square) and sum of squares of each row, as in row_stats.
template <typename T>
void short_sums(const T* x, int64_t rows, int64_t n, bool centered, acc_t<T>* mean,
                acc_t<T>* squares) {
  using A = acc_t<T>;
  const RowLanes<A> lanes(n);
  const A share = A(1) / static_cast<A>(n);
  for (int64_t r = 0; r < rows; ++r, x += n) {
    if (!centered) {
      mean[r] = A(0);
      squares[r] = lanes.sum([&](int64_t i) {
        const Wide<A> v = load(WideTag{}, x + i);
        return v * v;
      });
      continue;
    }
    const A shift = load(OneTag{}, x);
    const A sum = lanes.sum([&](int64_t i) { return load(WideTag{}, x + i) - Wide<A>(shift); });
    const A center = shift + sum * share;
    const auto [off, square] = lanes.sum_and_dot(
        [&](int64_t i, Wide<A>& d) { return d = load(WideTag{}, x + i) - Wide<A>(center); });
    const A correction = off * share;
    mean[r] = center + correction;
    squares[r] = std::max(A(0), square - off * correction);
  }
}

// out = xhat * weight + bias; `column` is that of the first row's parameters, of `columns`.
template <typename T, typename Out>
void short_map(const T* x, int64_t rows, int64_t n, const acc_t<T>* mean, const acc_t<T>* rstd,
               const acc_t<T>* weight, const acc_t<T>* bias, int64_t column, int64_t columns,
               Out* out) {
  using A = acc_t<T>;
  for (int64_t r = 0; r < rows; ++r, x += n, out += n) {
    const Wide<A> center(mean[r]), scale(rstd[r]);
    const A *w = weight + column, *b = bias + column;
    for (int64_t i = 0; i < n; i += Wide<A>::kSize) {
      const Wide<A> xhat = (load(WideTag{}, x + i) - center) * scale;
      store(WideTag{}, out + i, fmadd(xhat, load(WideTag{}, w + i), load(WideTag{}, b + i)));
    }
    column = column + n == columns ? 0 : column + n;
  }
}

// Rows [begin, end); weight and bias are padded.
template <typename T>
void short_rows_fwd(const NormForward<T>& p, const acc_t<T>* weight, const acc_t<T>* bias,
                    int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kRoom = kShortRows * kShortRow + Wide<A>::kSize;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner, columns = c.view.kept * n;
  const bool centered = c.statistic == Statistic::MeanVar;
  const bool epilogue = !c.prologue && has_epilogue(c, p.residual);
  T in[kRoom], out[kRoom];
  A values[kRoom], mean[kShortRows] = {}, var[kShortRows] = {}, rstd[kShortRows];
  for (int64_t row = begin; row < end; row += kShortRows) {
    const int64_t rows = std::min(kShortRows, end - row), at = row * n, size = rows * n;
    if (c.prologue) add_prologue(p, at, size);
    const T* x = (c.prologue ? p.sum : p.x) + at;
    const bool room = at + size + Wide<A>::kSize <= end * n;
    if (!room) {
      std::copy_n(x, size, in);
      x = in;
    }
    short_sums(x, rows, n, centered, mean, var);
    for (int64_t r = 0; r < kShortRows; ++r) {
      var[r] = var[r] / static_cast<A>(n);
      rstd[r] = rstd_of(var[r], c.eps);
    }
    if (p.mean) std::copy_n(mean, rows, p.mean + row);
    std::copy_n(var, rows, p.var + row);
    const int64_t column = at % columns;
    if (epilogue) {
      short_map(x, rows, n, mean, rstd, weight, bias, column, columns, values);
      apply_epilogue(p, at, size, values);
      continue;
    }
    short_map(x, rows, n, mean, rstd, weight, bias, column, columns, room ? p.y + at : out);
    if (!room) std::copy_n(out, size, p.y + at);
  }
}

}  // namespace fastnorm::cpu
