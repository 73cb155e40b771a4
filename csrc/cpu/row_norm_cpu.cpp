// Row geometry on the CPU: a statistic spans one contiguous row of n elements, with a parameter for
// every column (layer and RMS norm in any layout; group norm of planes too short for the plane
// form, whose parameters are repeated).
//
//   forward    xhat = (x - mean) * rstd        rstd = 1 / sqrt(var + eps)
//              pre  = xhat * weight + bias [+ residual]
//              y    = dropout(activation(pre))
//   backward   d = dropout'(dy) * activation'(pre)         also the gradient of the residual
//              dbias += d, dweight += d * xhat, g = d * weight
//              dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//              (RMS norm has no mean(g); frozen statistics never take this geometry)
//
// Rows of at most 128 elements go to short_rows.h. A longer one is cut into stretches of kStretch
// elements, which stay in L1 between the two passes of the variance; their moments are merged in
// order, in double. A 16-bit row is widened once, into scratch, where it is short enough to stay in
// L2; the next row is fetched while this one is written, because the passes in between leave the
// memory idle (10 to 25 % of the whole). dweight and dbias are summed over kSumRows rows at a time,
// these sums over a block of rows, and the blocks in order. All cuts are functions of the shape
// alone, so every bit of the result is independent of the number of threads, and a row's of the
// other rows.
#include <ATen/Parallel.h>

#include <memory>
#include <vector>

#include "cpu/short_rows.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t kTaskBytes = 32 * 1024;
constexpr int64_t kRowCost = 64;  // columns whose time a row takes that has none

// Rows that are added one by one in float: 131,072 in a chain lost 5 times torch's precision.
constexpr int64_t kSumRows = 64;

// y = xhat * weight + bias of columns [first, first + n). `next` is what the following row reads.
template <typename T, typename Out>
void apply(const Row<T>& row, const acc_t<T>* x, int64_t first, int64_t n, Out* y, const T* next) {
  using A = acc_t<T>;
  const A *w = row.weight ? row.weight + row.first_channel + first : nullptr,
          *b = row.bias ? row.bias + row.first_channel + first : nullptr;
  const A mean = row.mean, rstd = row.rstd;
  const auto run = [&](auto&& affine) {
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      prefetch(next + i);
      store(tag, y + i, affine(tag, i, (load(tag, x + i) - mean) * rstd));
    });
  };
  if (w && b) {
    run([&](auto tag, int64_t i, auto v) { return fmadd(v, load(tag, w + i), load(tag, b + i)); });
  } else if (w) {
    run([&](auto tag, int64_t i, auto v) { return v * load(tag, w + i); });
  } else if (b) {
    run([&](auto tag, int64_t i, auto v) { return v + load(tag, b + i); });
  } else {
    run([](auto, int64_t, auto v) { return v; });
  }
}

// `scratch` has room for min(n, kScratch) values; only 16-bit rows need it.
template <typename T>
void forward_row(const NormForward<T>& p, int64_t index, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner, at = index * n;
  const bool keep = n <= kScratch;
  T* x = c.prologue ? p.sum + at : const_cast<T*>(p.x) + at;  // written only as the sum
  RowStats<T> stats;
  if (c.prologue && !c.dropout.seed) {
    stats = row_stats<true>(p, at, x, scratch, keep);
  } else {
    if (c.prologue) add_prologue(p, at, n);
    stats = row_stats<false>(p, at, x, scratch, keep);
  }
  if (p.mean) p.mean[index] = stats.mean;
  p.var[index] = stats.var;
  const A rstd = rstd_of(stats.var, c.eps);
  const Row<T> row = make_row<T>(c, index, stats.mean, rstd, p.weight, p.bias);
  const bool epilogue = !c.prologue && has_epilogue(c, p.residual);
  for_each_stretch(n, epilogue ? kChunk : kStretch, [&](int64_t i, int64_t m) {
    const A* values = scratch + i;
    if (!keep || std::is_same_v<T, A>) values = widened(x + i, m, scratch);
    T* y = p.y + at + i;
    const T* next = p.x + at + n + i;
    if (!epilogue) return apply(row, values, i, m, y, next);
    A buffer[kChunk];
    apply(row, values, i, m, buffer, next);
    apply_epilogue(p, at + i, m, buffer);
  });
}

// ---- backward ----

// The means of g and of g * xhat over a row, which dx subtracts.
template <typename A>
struct RowMeans {
  A g, gx;
  RowMeans(const NormConfig& c, const BackwardSums<double>& sums) {
    const double share = 1.0 / c.view.reduce_inner;
    g = c.statistic == Statistic::MeanSquare ? A(0) : static_cast<A>(sums.g * share);
    gx = static_cast<A>(sums.gx * share);
  }
};

// use(tag, i, dx [+ dsum]) for the columns of a row; values(tag, i, xhat) gives g and xhat. `next`
// is what the following row reads.
template <typename T, typename F, typename Use>
void for_each_dx(const Row<T>& row, RowMeans<acc_t<T>> mean, int64_t n, const T* dsum,
                 const T* next, F&& values, Use&& use) {
  using A = acc_t<T>;
  const A rstd = row.rstd;
  const auto run = [&](auto&& plus) {
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      prefetch(next + i);
      decltype(load(tag, next)) xhat;
      const auto g = values(tag, i, xhat);
      use(tag, i, plus(tag, i, (g - mean.g - xhat * mean.gx) * rstd));
    });
  };
  if (dsum) {
    run([&](auto tag, int64_t i, auto v) { return v + load(tag, dsum + i); });
  } else {
    run([](auto, int64_t, auto v) { return v; });
  }
}

// Both passes with nothing after the norm; before it perhaps dropout and a residual, whose gradient
// is that of the sum. Which parameters there are is known to the compiler: as branches in the loop
// they doubled its time. `scratch` keeps xhat and g of a 16-bit row.
template <bool kWeight, bool kDweight, bool kDbias, typename T>
C10_NOINLINE void backward_row_plain(const NormBackward<T>& p, const Row<T>& row, int64_t at,
                                     ChannelSums<acc_t<T>> sums, std::vector<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner;
  const T *x = p.x + at, *dy = p.dy + at;
  const A mean = row.mean, rstd = row.rstd;
  const A* w = kWeight ? row.weight + row.first_channel : nullptr;
  A* dw = kDweight ? sums.dweight + row.first_channel : nullptr;
  A* db = kDbias ? sums.dbias + row.first_channel : nullptr;
  const bool wanted = p.dx || p.dresidual;
  const bool keep = !std::is_same_v<T, A> && n <= kScratch && wanted;
  if (keep) scratch.resize(2 * n);
  A *kept_xhat = scratch.data(), *kept_g = scratch.data() + n;
  BackwardSums<double> total;
  const auto sum_stretch = [&](int64_t first, int64_t m, auto&& use) {
    const auto [g, gx] = wide_sum_and_dot<A>(m, [&](auto tag, int64_t j, auto& xhat) {
      const int64_t i = first + j;
      xhat = (load(tag, x + i) - mean) * rstd;
      auto d = load(tag, dy + i);
      if constexpr (kDweight) store(tag, dw + i, fmadd(d, xhat, load(tag, dw + i)));
      if constexpr (kDbias) store(tag, db + i, load(tag, db + i) + d);
      if constexpr (kWeight) d = d * load(tag, w + i);
      use(tag, i, xhat, d);
      return d;
    });
    total.g += g;
    total.gx += gx;
  };
  for_each_stretch(n, kStretch, [&](int64_t first, int64_t m) {
    if (keep) {
      sum_stretch(first, m, [&](auto tag, int64_t i, auto xhat, auto g) {
        store(tag, kept_xhat + i, xhat);
        store(tag, kept_g + i, g);
      });
    } else {
      sum_stretch(first, m, [](auto, int64_t, auto, auto) {});
    }
  });
  if (!wanted) return;
  const RowMeans<A> means(c, total);
  const auto each_dx = [&](int64_t first, int64_t m, auto&& use) {
    const T* dsum = p.dsum ? p.dsum + at + first : nullptr;
    const T* next = x + n + first;
    if (keep) {
      const auto values = [&](auto tag, int64_t i, auto& xhat) {
        prefetch(dy + n + first + i);  // 6 to 8 % of a 16-bit backward pass, nothing in float
        xhat = load(tag, kept_xhat + first + i);
        return load(tag, kept_g + first + i);
      };
      return for_each_dx(row, means, m, dsum, next, values, use);
    }
    const auto values = [&](auto tag, int64_t i, auto& xhat) {
      xhat = (load(tag, x + first + i) - mean) * rstd;
      auto g = load(tag, dy + first + i);
      if constexpr (kWeight) g = g * load(tag, w + first + i);
      return g;
    };
    for_each_dx(row, means, m, dsum, next, values, use);
  };
  if (!c.dropout.seed || !p.dx) {
    T* out = (c.prologue ? p.dresidual : p.dx) + at;
    return each_dx(0, n, [&](auto tag, int64_t i, auto v) { store(tag, out + i, v); });
  }
  const A scale = static_cast<A>(c.dropout.scale);
  for_each_mask(n, at, c.dropout, [&](int64_t first, int64_t m, const KeepMask* mask) {
    T* dx = p.dx + at + first;
    const auto write_dropped = [&](auto tag, int64_t i, auto v) {
      store(tag, dx + i, kept(tag, v * scale, mask + i));
    };
    if (!p.dresidual) return each_dx(first, m, write_dropped);
    T* dresidual = p.dresidual + at + first;
    each_dx(first, m, [&](auto tag, int64_t i, auto v) {
      store(tag, dresidual + i, v);
      write_dropped(tag, i, v);
    });
  });
}

// The plain form, where it exists for the gradients that are asked for.
template <typename T>
bool backward_row_if_plain(const NormBackward<T>& p, const Row<T>& row, int64_t at,
                           ChannelSums<acc_t<T>> sums, std::vector<acc_t<T>>& scratch) {
  const NormConfig& c = p.config;
  if (!p.dy) return false;
  if (c.prologue ? p.dx && !c.dropout.seed : has_epilogue(c, p.residual) || p.dresidual) {
    return false;
  }
  if (row.weight && sums.dweight && sums.dbias) {
    backward_row_plain<true, true, true>(p, row, at, sums, scratch);
  } else if (row.weight && sums.dweight) {
    backward_row_plain<true, true, false>(p, row, at, sums, scratch);
  } else if (row.weight) {
    backward_row_plain<true, false, false>(p, row, at, sums, scratch);
  } else if (sums.dbias) {
    backward_row_plain<false, true, true>(p, row, at, sums, scratch);
  } else if (sums.dweight) {
    return false;
  } else {
    backward_row_plain<false, false, false>(p, row, at, sums, scratch);
  }
  return true;
}

template <typename T>
void backward_row(const NormBackward<T>& p, int64_t index, acc_t<T> rstd,
                  ChannelSums<acc_t<T>> sums, std::vector<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner, at = index * n;
  const Row<T> row = make_row<T>(c, index, p.mean ? p.mean[index] : A(0), rstd, p.weight, p.bias);
  if (backward_row_if_plain(p, row, at, sums, scratch)) return;
  A xhat[kChunk], pre[kChunk], d[kChunk];
  scratch.resize(n);  // g of the whole row: an activation's derivative is not worth doing twice
  BackwardSums<double> total;
  for_each_stretch(n, kChunk, [&](int64_t first, int64_t m) {
    row.center(p.x + at + first, m, xhat);
    if (needs_pre(p)) row.affine(xhat, first, m, pre);
    epilogue_backward(p, at + first, m, pre, d);
    if (p.dresidual && !c.prologue) store_chunk(d, p.dresidual + at + first, m);
    add_sums(row, d, xhat, first, m, scratch.data() + first, sums, total);
  });
  if (!p.dx && !(c.prologue && p.dresidual)) return;
  const RowMeans<A> mean(c, total);
  for_each_stretch(n, kChunk, [&](int64_t first, int64_t m) {
    const T* x = p.x + at + first;
    const A* g = scratch.data() + first;
    const auto write = [&](auto* out) {
      for_each_wide<A>(m, [&](auto tag, int64_t i) {
        const auto v = (load(tag, x + i) - row.mean) * row.rstd;
        store(tag, out + i, (load(tag, g + i) - mean.g - v * mean.gx) * row.rstd);
      });
    };
    if (!c.prologue) return write(p.dx + at + first);
    write(d);
    write_dx(p, at + first, m, d);
  });
}

// The roots and divisions of many rows first: they leave the chain from row to row.
template <typename T>
void backward_rows(const NormBackward<T>& p, const ShortParameters<acc_t<T>>& parameters,
                   int64_t begin, int64_t end, int64_t last, ChannelSums<acc_t<T>> sums,
                   std::vector<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  if (is_short(p.config.view)) return short_rows_bwd(p, parameters, begin, end, last, sums);
  A rstd[kSumRows];
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min(kSumRows, end - row);
    for (int64_t i = 0; i < count; ++i) rstd[i] = rstd_of(p.var[row + i], p.config.eps);
    for (int64_t i = 0; i < count; ++i, ++row) backward_row(p, row, rstd[i], sums, scratch);
  }
}

// Blocks of rows whose channel sums are kept apart: enough for many threads, few enough that the
// partial sums stay small beside the rows.
int64_t row_blocks(int64_t rows) {
  return std::clamp<int64_t>(rows / 32, std::min<int64_t>(rows, 4), 64);
}

// out[c] = sum over blocks, in order, of partial[block][c]
template <typename A>
void sum_blocks(const A* partial, int64_t blocks, int64_t stride, int64_t channels, A* out) {
  at::parallel_for(0, channels, std::max<int64_t>(1, kTaskBytes / (blocks * sizeof(A))),
                   [&](int64_t begin, int64_t end) {
                     for_each_wide<A>(end - begin, [&](auto tag, int64_t i) {
                       auto total = load(tag, partial + begin + i);
                       for (int64_t block = 1; block < blocks; ++block) {
                         total = total + load(tag, partial + block * stride + begin + i);
                       }
                       store(tag, out + begin + i, total);
                     });
                   });
}

template <typename T>
int64_t rows_per_task(int64_t n) {
  return std::max<int64_t>(1, kTaskBytes / ((n + kRowCost) * static_cast<int64_t>(sizeof(T))));
}

// One value per column, from those of channels of `inner` columns.
template <typename A>
std::unique_ptr<A[]> per_column(const A* channel, const View& view) {
  if (!channel) return nullptr;
  const int64_t columns = view.kept * view.reduce_inner;
  std::unique_ptr<A[]> out(new A[columns]);
  for (int64_t i = 0; i < columns; ++i) out[i] = channel[i / view.inner];
  return out;
}

template <typename A>
void sum_columns(const A* column, const View& view, A* channel) {
  for (int64_t c = 0; channel && c < view.channels(); ++c) {
    channel[c] = A(0);
    for (int64_t i = 0; i < view.inner; ++i) channel[c] += column[c * view.inner + i];
  }
}

// Channels of a few columns each: as many channels of one.
template <typename T>
void backward_of_columns(const NormBackward<T>& p) {
  using A = acc_t<T>;
  const View& view = p.config.view;
  const int64_t columns = view.kept * view.reduce_inner;
  const auto weight = per_column(p.weight, view), bias = per_column(p.bias, view);
  std::unique_ptr<A[]> dweight(p.dweight ? new A[columns] : nullptr),
      dbias(p.dbias ? new A[columns] : nullptr);
  NormBackward<T> of_columns = p;
  of_columns.config.view.inner = 1;
  of_columns.weight = weight.get();
  of_columns.bias = bias.get();
  of_columns.dweight = dweight.get();
  of_columns.dbias = dbias.get();
  row_norm_bwd(of_columns);
  sum_columns(dweight.get(), view, p.dweight);
  sum_columns(dbias.get(), view, p.dbias);
}

}  // namespace

template <typename T>
void row_norm_fwd(const NormForward<T>& p) {
  using A = acc_t<T>;
  const View& view = p.config.view;
  if (view.inner > 1) {
    const auto weight = per_column(p.weight, view), bias = per_column(p.bias, view);
    NormForward<T> of_columns = p;
    of_columns.config.view.inner = 1;
    of_columns.weight = weight.get();
    of_columns.bias = bias.get();
    return row_norm_fwd(of_columns);
  }
  const int64_t n = view.reduce_inner;
  if (view.numel() == 0) return;
  if (is_short(view)) {
    const ShortParameters<A> parameters(view, p.weight, p.bias);
    return at::parallel_for(
        0, view.statistics(), rows_per_task<T>(n),
        [&](int64_t begin, int64_t end) { short_rows_fwd(p, parameters, begin, end); });
  }
  at::parallel_for(0, view.statistics(), rows_per_task<T>(n), [&](int64_t begin, int64_t end) {
    std::unique_ptr<A[]> scratch;
    if (sizeof(T) == 2) scratch.reset(new A[std::min(n, kScratch)]);
    for (int64_t row = begin; row < end; ++row) forward_row(p, row, scratch.get());
  });
}

template <typename T>
void row_norm_bwd(const NormBackward<T>& p) {
  using A = acc_t<T>;
  const View& view = p.config.view;
  if (view.inner > 1) return backward_of_columns(p);
  const int64_t rows = view.statistics(), channels = view.inner == 0 ? 0 : view.channels();
  if (view.numel() == 0) {
    if (p.dweight) std::fill_n(p.dweight, channels, A(0));
    if (p.dbias) std::fill_n(p.dbias, channels, A(0));
    return;
  }
  const bool brief = is_short(view);
  const ShortParameters<A> parameters(view, p.weight, p.bias);
  // dweight is summed even if dbias alone is asked for: dx must not round otherwise then, and the
  // plain form has one loop less. Short rows sum both, and reach behind them.
  const int64_t behind = brief ? Wide<A>::kSize : 0;
  const int64_t to_dbias = p.dbias || brief ? channels + behind : 0;
  const int64_t stride = to_dbias + channels + behind;
  const auto sums_at = [&](A* first) {
    return ChannelSums<A>{first, to_dbias ? first + to_dbias : nullptr};
  };
  const int64_t per_task = rows_per_task<T>(view.reduce_inner);
  if (!p.dweight && !p.dbias) {
    at::parallel_for(0, rows, per_task, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch, unused(brief ? stride : 0);
      const auto sums = brief ? sums_at(unused.data()) : ChannelSums<A>{};
      backward_rows(p, parameters, begin, end, end, sums, scratch);
    });
    return;
  }
  const int64_t blocks = rows <= std::min(per_task, kSumRows) ? 1 : row_blocks(rows);
  std::unique_ptr<A[]> partial(new A[blocks * stride]);
  at::parallel_for(0, blocks, std::max<int64_t>(1, per_task * blocks / rows),
                   [&](int64_t begin, int64_t end) {
                     std::vector<A> scratch, few;
                     const int64_t task_end = rows * end / blocks;
                     for (int64_t block = begin; block < end; ++block) {
                       A* mine = partial.get() + block * stride;
                       std::fill_n(mine, stride, A(0));
                       const int64_t last = rows * (block + 1) / blocks;
                       int64_t row = rows * block / blocks;
                       if (last - row <= kSumRows) {
                         backward_rows(p, parameters, row, last, task_end, sums_at(mine), scratch);
                         continue;
                       }
                       for (; row < last; row += kSumRows) {
                         few.assign(stride, A(0));
                         backward_rows(p, parameters, row, std::min(last, row + kSumRows), task_end,
                                       sums_at(few.data()), scratch);
                         add_chunk(few.data(), mine, stride);
                       }
                     }
                   });
  if (p.dweight) sum_blocks(partial.get(), blocks, stride, channels, p.dweight);
  if (p.dbias) sum_blocks(partial.get() + to_dbias, blocks, stride, channels, p.dbias);
}

const char* row_norm_form(const View& view, int element_size) {
  return view.reduce_inner * element_size <= 256 * 1024 ? "row, resident in cache"
                                                        : "row, streaming";
}

#define FASTNORM_INSTANTIATE(T)                         \
  template void row_norm_fwd<T>(const NormForward<T>&); \
  template void row_norm_bwd<T>(const NormBackward<T>&);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)
#undef FASTNORM_INSTANTIATE

}  // namespace fastnorm::cpu
