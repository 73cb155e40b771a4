// How the column form divides its work; why is at the top of column_norm_cpu.cpp.
#pragma once

#include <numeric>

#include "cpu/column_cpu.h"

namespace fastnorm::cpu {

constexpr int64_t kTile = 4096;        // columns of a task
constexpr int64_t kFoldedWidth = 256;  // that narrow rows are folded to
constexpr int64_t kMinColumns = 128;   // of a range: 512 bytes of float in a row
constexpr int64_t kMaxSample = 512 * 1024;
constexpr int64_t kSampleBlocks = 64;  // partial sums of the parameter gradients

enum class Visit { Samples, Columns, Split };

struct Tiling {
  int64_t row, fold, width, chunk_rows, chunks, tile;
  Visit visit;

  // `one_pass`: nothing is summed.
  explicit Tiling(const View& v, bool one_pass = false) {
    row = v.row_size();
    const int64_t rows = v.reduce_outer, size = rows * row;
    fold = std::max<int64_t>(1, std::min(ceil_div(kFoldedWidth, row), rows / kRowGroup));
    // A width in whole vectors, where that stays small.
    const int64_t whole = round_up(fold, 16 / std::gcd<int64_t>(row, 16));
    if (fold > 1 && whole * row <= 4 * kFoldedWidth && whole * kRowGroup <= rows) fold = whole;
    width = fold * row;
    const int64_t folded_rows = ceil_div(rows, fold);
    // At most about 128 rows, in a number that threads divide evenly.
    chunks = round_up(ceil_div(folded_rows, 128), 8);
    chunk_rows = std::max<int64_t>(32, round_up(ceil_div(folded_rows, chunks), kRowGroup));
    chunks = std::max<int64_t>(1, ceil_div(folded_rows, chunk_rows));
    tile = width;
    visit = Visit::Split;
    if (size <= kResident / 4 || (v.outer >= 8 && size <= kMaxSample)) {
      visit = Visit::Samples;
    } else if (fold == 1) {
      const int64_t step = v.reduce_inner;
      tile = std::max<int64_t>(1, std::min(kTile, kResident / rows) / step) * step;
      if (tile >= kMinColumns && tile * rows <= kResident) {
        visit = Visit::Columns;
      } else {
        tile = std::max<int64_t>(1, kTile / step) * step;
      }
      tile = std::min(tile, width);
    }
    // One pass goes through memory in order; the parameters of a row stay in cache from row to row.
    if (one_pass && fold == 1 && v.inner > 1) {
      visit = Visit::Split;
      chunk_rows = 4;
      chunks = ceil_div(rows, chunk_rows);
    }
  }
  int64_t tiles() const { return ceil_div(width, tile); }
  int64_t tile_size(int64_t first) const { return std::min(tile, width - first); }
};

// f(o, o_end): blocks that are visited twice before the next ones are, as many as the last level
// cache keeps from the first visit to the second.
template <typename F>
void for_each_wave(const View& v, int64_t element_bytes, F&& f) {
  constexpr int64_t kWaveBytes = 8 * 1024 * 1024;
  const int64_t bytes = v.reduce_outer * v.row_size() * element_bytes;
  const int64_t wave = std::max<int64_t>(1, kWaveBytes / bytes);
  for (int64_t o = 0; o < v.outer; o += wave) f(o, std::min(o + wave, v.outer));
}

// f(block, chunk, first column, columns) for the tiles of blocks [o, o_end), in parallel.
template <typename F>
void for_each_tile(const Tiling& t, int64_t o, int64_t o_end, int64_t element_bytes, F&& f) {
  const int64_t tiles = t.tiles();
  parallel_tasks((o_end - o) * t.chunks * tiles, t.chunk_rows * t.tile * element_bytes,
                 [&](int64_t task) {
                   const int64_t first = task % tiles * t.tile, chunk = task / tiles;
                   f(o + chunk / t.chunks, chunk % t.chunks, first, t.tile_size(first));
                 });
}

// f(block, first column, columns) for the tiles' columns of blocks [o, o_end), in parallel.
template <typename F>
void for_each_range(const Tiling& t, int64_t o, int64_t o_end, F&& f) {
  const int64_t tiles = t.tiles(), bytes = t.tile * t.chunks * int64_t(sizeof(double));
  parallel_tasks((o_end - o) * tiles, bytes, [&](int64_t task) {
    const int64_t first = task % tiles * t.tile;
    f(o + task / tiles, first, t.tile_size(first));
  });
}

// A chunk: `full` folded rows and, behind them, `rest` columns of one more.
struct Chunk {
  int64_t offset, full, rest, count;  // count: rows of the tensor

  Chunk(const View& v, const Tiling& t, int64_t o, int64_t chunk) {
    const int64_t step = t.chunk_rows * t.fold, begin = std::min(chunk * step, v.rows_of(o));
    count = std::min(v.rows_of(o) - begin, step);
    full = count / t.fold;
    rest = (count % t.fold) * t.row;
    offset = (o * v.reduce_outer + begin) * t.row;
  }
  int64_t rows() const { return full + (rest > 0); }
  // Columns of folded row r within [first, first + n).
  int64_t columns(int64_t r, int64_t first, int64_t n) const {
    return r < full ? n : std::clamp<int64_t>(rest - first, 0, n);
  }
};

// What maps a column, per column of the folded matrix: y = (x - mean) scale + bias and
// dx = scale g + c (x - mean) + e.
template <typename A>
struct Columns {
  A *mean, *scale, *bias, *c, *e;

  Columns(A* memory, int64_t width)
      : mean(memory),
        scale(memory + width),
        bias(memory + 2 * width),
        c(memory + 3 * width),
        e(memory + 4 * width) {}
  static int64_t size(int64_t width) { return 5 * width; }
};

// f(first column, statistic, channel) for the channels in columns [first, first + n) of a row;
// first starts a statistic.
template <typename F>
void for_each_channel_run(const View& v, int64_t first, int64_t n, F&& f) {
  int64_t j = first, channel = first / v.inner;
  for (int64_t k = first / v.reduce_inner; j < first + n; ++k) {
    for (int64_t c = 0; c < v.channels_per_kept(); ++c, ++channel, j += v.inner) f(j, k, channel);
  }
}

// Sets the n columns of a channel; mostly it is one.
template <typename A>
void set_channel(A* values, int64_t n, A value) {
  if (n > 1) return void(std::fill_n(values, n, value));
  *values = value;
}

template <typename A>
void repeat_fold(const Tiling& t, A* values) {
  for (int64_t f = 1; f < t.fold; ++f) std::copy_n(values, t.row, values + f * t.row);
}

template <typename A>
void expand_columns(const NormConfig& config, const Tiling& t, int64_t o, int64_t first, int64_t n,
                    const A* mean, const A* var, const A* weight, const A* bias, Columns<A> out) {
  const View& v = config.view;
  const int64_t row_columns = t.fold > 1 ? t.row : n;
  int64_t last = -1;
  double r = 0;
  for_each_channel_run(v, first, row_columns, [&](int64_t j, int64_t k, int64_t channel) {
    if (k != last) r = inverse_std(var[o * v.kept + k], config.eps);
    last = k;
    set_channel(out.mean + j, v.inner, mean != nullptr ? mean[o * v.kept + k] : A(0));
    set_channel(out.scale + j, v.inner,
                static_cast<A>(weight != nullptr ? r * weight[channel] : r));
    set_channel(out.bias + j, v.inner, bias != nullptr ? bias[channel] : A(0));
  });
  if (t.fold > 1) {
    repeat_fold(t, out.mean);
    repeat_fold(t, out.scale);
    repeat_fold(t, out.bias);
  }
}

}  // namespace fastnorm::cpu
