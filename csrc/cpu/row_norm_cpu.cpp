// Row geometry on the CPU: a statistic spans one contiguous row of n elements (layer and RMS norm
// in any layout; group and instance norm in NCHW).
//
//   forward    xhat = (x - mean) * rstd        rstd = 1 / sqrt(var + eps)
//              pre  = xhat * weight + bias [+ residual]
//              y    = dropout(activation(pre))
//   backward   d = dropout'(dy) * activation'(pre)         also the gradient of the residual
//              dbias += d, dweight += d * xhat, g = d * weight
//              dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//              (RMS norm has no mean(g); frozen statistics have neither mean)
//
// A row is cut into stretches of kStretch elements, which stay in L1 between the two passes of the
// variance; their moments are merged in order, in double. dweight and dbias are summed over
// kSumRows rows at a time, these sums over a block of rows, and the blocks in order. All cuts are
// functions of the shape alone, so every bit of the result is independent of the number of threads,
// and a row's of the other rows.
#include <ATen/Parallel.h>

#include <vector>

#include "common/stats.h"
#include "cpu/chunk.h"
#include "cpu/norm_cpu.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t kStretch = 4096;
constexpr int64_t kTaskBytes = 32 * 1024;

// Rows that are added one by one in float: 131,072 in a chain lost 5 times torch's precision.
constexpr int64_t kSumRows = 64;

// Two passes: a mean, then the deviations from it, whose own mean corrects it. The shift by the
// first element makes a constant row exact.
template <typename T>
Moments<double> stretch_moments(const T* x, int64_t n) {
  using A = acc_t<T>;
  const A shift = static_cast<A>(x[0]);
  const A sum = wide_sum<A>(n, [&](auto tag, int64_t i) { return load(tag, x + i) - shift; });
  const A center = shift + sum / static_cast<A>(n);
  const auto [off, square] = wide_sum_and_dot<A>(
      n, [&](auto tag, int64_t i, auto& d) { return d = load(tag, x + i) - center; });
  const double correction = static_cast<double>(off) / n;
  return {static_cast<double>(n), center + correction, std::max(0.0, square - off * correction)};
}

template <typename T>
double stretch_squares(const T* x, int64_t n) {
  using A = acc_t<T>;
  return wide_sum<A>(n, [&](auto tag, int64_t i) {
    const auto v = load(tag, x + i);
    return v * v;
  });
}

// Calls f(first, count) for the stretches of a row.
template <typename F>
void for_each_stretch(int64_t n, int64_t size, F&& f) {
  for (int64_t first = 0; first < n; first += size) f(first, std::min(size, n - first));
}

template <typename T>
struct RowStats {
  acc_t<T> mean, var;
};

template <typename T>
RowStats<T> row_stats(const T* x, int64_t n, Statistic statistic) {
  using A = acc_t<T>;
  if (statistic == Statistic::MeanSquare) {
    double squares = 0;
    for_each_stretch(n, kStretch,
                     [&](int64_t i, int64_t m) { squares += stretch_squares(x + i, m); });
    return {A(0), static_cast<A>(squares / n)};
  }
  Moments<double> all;
  for_each_stretch(n, kStretch,
                   [&](int64_t i, int64_t m) { all.merge(stretch_moments(x + i, m)); });
  return {static_cast<A>(all.mean), static_cast<A>(all.m2 / n)};
}

// What the chunks of one row share.
template <typename T>
struct Row {
  using A = acc_t<T>;
  const View& view;
  int64_t first_channel;  // of the row; parameters are indexed from here
  A mean, rstd;
  const A* weight;
  const A* bias;

  // xhat of columns [first, first + n)
  void center(const T* x, int64_t n, A* xhat) const {
    for_each_wide<A>(
        n, [&](auto tag, int64_t i) { store(tag, xhat + i, (load(tag, x + i) - mean) * rstd); });
  }

  // out = xhat * weight + bias, in one rounding; the backward pass repeats it bit for bit.
  void affine(const A* xhat, int64_t first, int64_t n, A* out) const {
    if (view.inner == 1) {
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
      return;
    }
    for_each_channel(first, n, view.inner, [&](int64_t at, int64_t count, int64_t channel) {
      const A w = weight ? weight[first_channel + channel] : A(1);
      const A b = bias ? bias[first_channel + channel] : A(0);
      for_each_wide<A>(count, [&](auto tag, int64_t i) {
        const auto v = load(tag, xhat + at + i);
        store(tag, out + at + i, fmadd(v, decltype(v)(w), decltype(v)(b)));
      });
    });
  }
};

template <typename T>
Row<T> make_row(const NormConfig& c, int64_t row, RowStats<T> s, const acc_t<T>* weight,
                const acc_t<T>* bias) {
  using A = acc_t<T>;
  const int64_t first_channel = (row % c.view.kept) * c.view.channels_per_kept();
  return {c.view, first_channel, s.mean, A(1) / std::sqrt(s.var + static_cast<A>(c.eps)),
          weight, bias};
}

// y = xhat * weight + bias with nothing after it and one parameter per column: no scratch.
template <typename T>
void apply_plain(const Row<T>& row, const T* x, int64_t n, T* y) {
  using A = acc_t<T>;
  const A *w = row.weight ? row.weight + row.first_channel : nullptr,
          *b = row.bias ? row.bias + row.first_channel : nullptr;
  const A mean = row.mean, rstd = row.rstd;
  const auto run = [&](auto&& affine) {
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
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

template <typename T>
void forward_row(const NormForward<T>& p, int64_t index) {
  using A = acc_t<T>;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner, at = index * n;
  A buffer[kChunk];
  const T* x = p.x + at;
  if (c.prologue) {
    T* sum = p.sum + at;
    for_each_stretch(n, kChunk, [&](int64_t i, int64_t m) {
      load_chunk(x + i, buffer, m);
      if (c.dropout.seed) apply_dropout(buffer, m, at + i, c.dropout);
      add_chunk(p.residual + at + i, buffer, m);
      store_chunk(buffer, sum + i, m);
    });
    x = sum;
  }
  RowStats<T> stats;
  if (c.frozen) {
    stats = {p.mean ? p.mean[index] : A(0), p.var[index]};
  } else {
    stats = row_stats(x, n, c.statistic);
    if (p.mean) p.mean[index] = stats.mean;
    p.var[index] = stats.var;
  }
  const Row<T> row = make_row(c, index, stats, p.weight, p.bias);
  const bool epilogue = !c.prologue && has_epilogue(c, p.residual);
  if (!epilogue && c.view.inner == 1) {
    apply_plain(row, x, n, p.y + at);
    return;
  }
  for_each_stretch(n, kChunk, [&](int64_t i, int64_t m) {
    row.center(x + i, m, buffer);
    row.affine(buffer, i, m, buffer);
    if (epilogue) {
      if (p.residual) add_chunk(p.residual + at + i, buffer, m);
      activate_chunk(c.activation, buffer, m);
      if (c.dropout.seed) apply_dropout(buffer, m, at + i, c.dropout);
    }
    store_chunk(buffer, p.y + at + i, m);
  });
}

// ---- backward ----

// Per-channel sums of one block of rows; null when not asked for.
template <typename A>
struct ChannelSums {
  A* dweight;
  A* dbias;
};

// Adds the chunk's d and d * xhat to the sums of its channels.
template <typename T>
void add_channel_sums(const Row<T>& row, const acc_t<T>* d, const acc_t<T>* xhat, int64_t first,
                      int64_t n, ChannelSums<acc_t<T>> sums) {
  using A = acc_t<T>;
  if (!sums.dweight && !sums.dbias) return;
  if (row.view.inner == 1) {
    A* dw = sums.dweight ? sums.dweight + row.first_channel + first : nullptr;
    A* db = sums.dbias ? sums.dbias + row.first_channel + first : nullptr;
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      const auto v = load(tag, d + i);
      if (dw) store(tag, dw + i, fmadd(v, load(tag, xhat + i), load(tag, dw + i)));
      if (db) store(tag, db + i, load(tag, db + i) + v);
    });
    return;
  }
  for_each_channel(first, n, row.view.inner, [&](int64_t at, int64_t count, int64_t channel) {
    if (sums.dweight) {
      sums.dweight[row.first_channel + channel] += wide_sum<A>(count, [&](auto tag, int64_t i) {
        return load(tag, d + at + i) * load(tag, xhat + at + i);
      });
    }
    if (sums.dbias) {
      sums.dbias[row.first_channel + channel] +=
          wide_sum<A>(count, [&](auto tag, int64_t i) { return load(tag, d + at + i); });
    }
  });
}

// d of a chunk: the gradient that reaches pre. `pre` is scratch.
template <typename T>
void epilogue_backward(const NormBackward<T>& p, const Row<T>& row, int64_t at, int64_t first,
                       int64_t n, const acc_t<T>* xhat, acc_t<T>* pre, acc_t<T>* d) {
  const NormConfig& c = p.config;
  load_chunk(p.dy + at + first, d, n);
  if (c.prologue) return;
  if (c.dropout.seed) apply_dropout(d, n, at + first, c.dropout);
  if (c.activation != Activation::None) {
    row.affine(xhat, first, n, pre);
    if (p.residual) add_chunk(p.residual + at + first, pre, n);
    activate_chunk_backward(c.activation, pre, d, n);
  }
}

// g = d * weight
template <typename T>
void times_weight(const Row<T>& row, const acc_t<T>* d, int64_t first, int64_t n, acc_t<T>* g) {
  using A = acc_t<T>;
  if (row.view.inner == 1 && row.weight) {
    const A* w = row.weight + row.first_channel + first;
    for_each_wide<A>(
        n, [&](auto tag, int64_t i) { store(tag, g + i, load(tag, d + i) * load(tag, w + i)); });
    return;
  }
  for_each_channel(first, n, row.view.inner, [&](int64_t at, int64_t count, int64_t channel) {
    const A w = row.weight ? row.weight[row.first_channel + channel] : A(1);
    for_each_wide<A>(
        count, [&](auto tag, int64_t i) { store(tag, g + at + i, load(tag, d + at + i) * w); });
  });
}

// Both passes with nothing around the norm and one parameter per column: no scratch. Which
// parameters there are is known to the compiler: as branches in the loop they doubled its time.
template <bool kWeight, bool kDweight, bool kDbias, typename T>
void backward_row_plain(const NormBackward<T>& p, const Row<T>& row, int64_t at,
                        ChannelSums<acc_t<T>> sums) {
  using A = acc_t<T>;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner;
  const T *x = p.x + at, *dy = p.dy + at;
  const A mean = row.mean, rstd = row.rstd;
  const A* w = kWeight ? row.weight + row.first_channel : nullptr;
  A* dw = kDweight ? sums.dweight + row.first_channel : nullptr;
  A* db = kDbias ? sums.dbias + row.first_channel : nullptr;
  BackwardSums<double> total;
  for_each_stretch(n, kStretch, [&](int64_t first, int64_t m) {
    const auto [g, gx] = wide_sum_and_dot<A>(m, [&](auto tag, int64_t j, auto& xhat) {
      const int64_t i = first + j;
      xhat = (load(tag, x + i) - mean) * rstd;
      auto d = load(tag, dy + i);
      if constexpr (kDweight) store(tag, dw + i, fmadd(d, xhat, load(tag, dw + i)));
      if constexpr (kDbias) store(tag, db + i, load(tag, db + i) + d);
      if constexpr (kWeight) d = d * load(tag, w + i);
      return d;
    });
    total.g += g;
    total.gx += gx;
  });
  if (!p.dx) return;
  const bool centered = c.statistic == Statistic::MeanVar;
  const A mean_g = c.frozen || !centered ? A(0) : static_cast<A>(total.g / n);
  const A mean_gx = c.frozen ? A(0) : static_cast<A>(total.gx / n);
  for_each_wide<A>(n, [&](auto tag, int64_t i) {
    const auto xhat = (load(tag, x + i) - mean) * rstd;
    auto g = load(tag, dy + i);
    if constexpr (kWeight) g = g * load(tag, w + i);
    store(tag, p.dx + at + i, (g - mean_g - xhat * mean_gx) * rstd);
  });
}

// The plain form, where it exists for the gradients that are asked for.
template <typename T>
bool backward_row_if_plain(const NormBackward<T>& p, const Row<T>& row, int64_t at,
                           ChannelSums<acc_t<T>> sums) {
  if (row.view.inner != 1) return false;
  if (row.weight && sums.dweight && sums.dbias) {
    backward_row_plain<true, true, true>(p, row, at, sums);
  } else if (row.weight && sums.dweight) {
    backward_row_plain<true, true, false>(p, row, at, sums);
  } else if (row.weight && !sums.dbias) {
    backward_row_plain<true, false, false>(p, row, at, sums);
  } else if (!row.weight && !sums.dweight && !sums.dbias) {
    backward_row_plain<false, false, false>(p, row, at, sums);
  } else {
    return false;
  }
  return true;
}

template <typename T>
void backward_row(const NormBackward<T>& p, int64_t index, ChannelSums<acc_t<T>> sums,
                  std::vector<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const NormConfig& c = p.config;
  const int64_t n = c.view.reduce_inner, at = index * n;
  const RowStats<T> stats{p.mean ? p.mean[index] : A(0), p.var[index]};
  const Row<T> row = make_row(c, index, stats, p.weight, p.bias);
  const bool epilogue = has_epilogue(c, p.residual) || c.prologue || p.dresidual;
  if (!epilogue && backward_row_if_plain(p, row, at, sums)) return;
  A xhat[kChunk], pre[kChunk], d[kChunk];
  scratch.resize(n);  // g of the whole row: an activation's derivative is not worth doing twice
  BackwardSums<double> total;
  for_each_stretch(n, kChunk, [&](int64_t first, int64_t m) {
    row.center(p.x + at + first, m, xhat);
    epilogue_backward(p, row, at, first, m, xhat, pre, d);
    if (p.dresidual && !c.prologue) store_chunk(d, p.dresidual + at + first, m);
    add_channel_sums(row, d, xhat, first, m, sums);
    A* g = scratch.data() + first;
    times_weight(row, d, first, m, g);
    total.g += wide_sum<A>(m, [&](auto tag, int64_t i) { return load(tag, g + i); });
    total.gx +=
        wide_sum<A>(m, [&](auto tag, int64_t i) { return load(tag, g + i) * load(tag, xhat + i); });
  });
  if (!p.dx && !(c.prologue && p.dresidual)) return;
  const bool centered = c.statistic == Statistic::MeanVar;
  const A mean_g = c.frozen || !centered ? A(0) : static_cast<A>(total.g / n);
  const A mean_gx = c.frozen ? A(0) : static_cast<A>(total.gx / n);
  for_each_stretch(n, kChunk, [&](int64_t first, int64_t m) {
    const T* x = p.x + at + first;
    const A* g = scratch.data() + first;
    for_each_wide<A>(m, [&](auto tag, int64_t i) {
      const auto v = (load(tag, x + i) - row.mean) * row.rstd;
      store(tag, d + i, (load(tag, g + i) - mean_g - v * mean_gx) * row.rstd);
    });
    if (c.prologue) {
      if (p.dsum) add_chunk(p.dsum + at + first, d, m);
      if (p.dresidual) store_chunk(d, p.dresidual + at + first, m);
      if (c.dropout.seed) apply_dropout(d, m, at + first, c.dropout);
    }
    if (p.dx) store_chunk(d, p.dx + at + first, m);
  });
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
  return std::max<int64_t>(1, kTaskBytes / (n * static_cast<int64_t>(sizeof(T))));
}

}  // namespace

template <typename T>
void row_norm_fwd(const NormForward<T>& p) {
  const View& view = p.config.view;
  if (view.numel() == 0) return;
  at::parallel_for(0, view.statistics(), rows_per_task<T>(view.reduce_inner),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) forward_row(p, row);
                   });
}

template <typename T>
void row_norm_bwd(const NormBackward<T>& p) {
  using A = acc_t<T>;
  const View& view = p.config.view;
  const int64_t rows = view.statistics(), channels = view.inner == 0 ? 0 : view.channels();
  if (view.numel() == 0) {
    if (p.dweight) std::fill_n(p.dweight, channels, A(0));
    if (p.dbias) std::fill_n(p.dbias, channels, A(0));
    return;
  }
  if (!p.dweight && !p.dbias) {
    at::parallel_for(0, rows, rows_per_task<T>(view.reduce_inner), [&](int64_t begin, int64_t end) {
      std::vector<A> scratch;
      for (int64_t row = begin; row < end; ++row) backward_row(p, row, {}, scratch);
    });
    return;
  }
  const int64_t blocks = row_blocks(rows), stride = 2 * channels;
  std::vector<A> partial(blocks * stride);
  at::parallel_for(0, blocks,
                   std::max<int64_t>(1, rows_per_task<T>(view.reduce_inner) * blocks / rows),
                   [&](int64_t begin, int64_t end) {
                     std::vector<A> scratch, few(stride);
                     const ChannelSums<A> sums{p.dweight ? few.data() : nullptr,
                                               p.dbias ? few.data() + channels : nullptr};
                     for (int64_t block = begin; block < end; ++block) {
                       A* mine = partial.data() + block * stride;
                       const int64_t last = rows * (block + 1) / blocks;
                       for (int64_t row = rows * block / blocks; row < last;) {
                         std::fill(few.begin(), few.end(), A(0));
                         const int64_t stop = std::min(last, row + kSumRows);
                         for (; row < stop; ++row) backward_row(p, row, sums, scratch);
                         add_chunk(few.data(), mine, stride);
                       }
                     }
                   });
  if (p.dweight) sum_blocks(partial.data(), blocks, stride, channels, p.dweight);
  if (p.dbias) sum_blocks(partial.data() + channels, blocks, stride, channels, p.dbias);
}

const char* row_norm_form(const View& view, int element_size) {
  return view.reduce_inner * element_size <= 256 * 1024 ? "row, resident in cache"
                                                        : "row, streaming";
}

#define FASTNORM_INSTANTIATE(T)                         \
  template void row_norm_fwd<T>(const NormForward<T>&); \
  template void row_norm_bwd<T>(const NormBackward<T>&);
FASTNORM_INSTANTIATE(float)
FASTNORM_INSTANTIATE(double)
FASTNORM_INSTANTIATE(c10::BFloat16)
FASTNORM_INSTANTIATE(c10::Half)
#undef FASTNORM_INSTANTIATE

}  // namespace fastnorm::cpu
