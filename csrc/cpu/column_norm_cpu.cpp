// The column form: an outer block is a matrix [rows][row_size], and a statistic is that of
// reduce_inner neighbouring columns. Batch norm of NC and NHWC, batch norm of NCHW with small
// planes, group and instance norm of NHWC.
//
// Rows are folded: `fold` of them side by side make one row of a matrix that is wide enough for
// vectors, however narrow the tensor. The folded matrix is cut into chunks of rows, whose sums per
// column merge in index order: over the folds, the chunks, then the columns of the statistic.
//
// What is visited as one piece, so that DRAM is read once, depends on the shape:
//   samples   many outer blocks that fit in cache: one after the other, each thread its own
//   columns   few rows: a range of columns fits in L2
//   split     otherwise: all sums, then the map, backwards so that the cache still holds the end
#include "cpu/column_tiling.h"

namespace fastnorm::cpu {
namespace {

template <typename T>
class Forward {
  using A = acc_t<T>;

 public:
  explicit Forward(const NormForward<T>& p) : p_(p), v_(p.config.view), t_(v_, p.config.frozen) {}

  void run() {
    if (t_.visit == Visit::Samples) {
      const int64_t bytes = v_.reduce_outer * t_.row * static_cast<int64_t>(sizeof(T));
      parallel_tasks(v_.outer, bytes, [&](int64_t o) { visit(o, 0, t_.width); });
    } else if (t_.visit == Visit::Columns) {
      const int64_t tiles = t_.tiles();
      parallel_tasks(v_.outer * tiles, t_.tile * v_.reduce_outer * int64_t(sizeof(T)),
                     [&](int64_t task) {
                       const int64_t first = task % tiles * t_.tile;
                       visit(task / tiles, first, t_.tile_size(first));
                     });
    } else {
      const auto memory = uninitialized<A>(v_.outer * Columns<A>::size(t_.width));
      const auto of = [&](int64_t o) {
        return Columns<A>(memory.get() + o * Columns<A>::size(t_.width), t_.width);
      };
      const auto partial = uninitialized<double>(p_.config.frozen ? 0 : v_.outer * partial_size());
      for_each_wave(v_, sizeof(T), [&](int64_t first, int64_t end) {
        if (!p_.config.frozen) split_statistics(first, end, partial.get());
        for_each_range(t_, first, end,
                       [&](int64_t o, int64_t j, int64_t n) { expand(o, j, n, of(o)); });
        parallel_tasks_reversed((end - first) * t_.chunks,
                                t_.chunk_rows * t_.width * int64_t(sizeof(T)), [&](int64_t task) {
                                  const int64_t o = first + task / t_.chunks;
                                  map(Chunk(v_, t_, o, task % t_.chunks), 0, t_.width, of(o));
                                });
      });
    }
  }

 private:
  int64_t partial_size() const { return 2 * t_.chunks * t_.row; }

  void split_statistics(int64_t first, int64_t end, double* partial) {
    for_each_tile(t_, first, end, sizeof(T), [&](int64_t o, int64_t chunk, int64_t j, int64_t n) {
      chunk_moments(o, chunk, j, n, partial + o * partial_size());
    });
    for_each_range(t_, first, end, [&](int64_t o, int64_t j, int64_t n) {
      finish_statistics(o, j, n, partial + o * partial_size());
    });
  }

  // Statistics and output of columns [first, first + n) of block o.
  void visit(int64_t o, int64_t first, int64_t n) {
    Columns<A> columns(thread_scratch<A, Slot::Columns>(Columns<A>::size(t_.width)), t_.width);
    if (!p_.config.frozen) {
      double* partial = thread_scratch<double, Slot::Partial>(partial_size());
      for (int64_t chunk = 0; chunk < t_.chunks; ++chunk) {
        for (int64_t j = first; j < first + n; j += kTile) {
          const int64_t size = t_.fold > 1 ? n : std::min(kTile, first + n - j);
          chunk_moments(o, chunk, j, size, partial);
          if (t_.fold > 1) break;
        }
      }
      finish_statistics(o, first, n, partial);
    }
    expand(o, first, n, columns);
    for (int64_t chunk = t_.chunks; chunk-- > 0;) {
      map(Chunk(v_, t_, o, chunk), first, n, columns);
    }
  }

  void expand(int64_t o, int64_t first, int64_t n, Columns<A> out) {
    expand_columns(p_.config, t_, o, first, n, p_.mean, p_.var, p_.weight, p_.bias, out);
  }

  // Mean and squared deviations of the chunk, per column of a row, to `partial`.
  void chunk_moments(int64_t o, int64_t index, int64_t first, int64_t n, double* partial) {
    const Chunk chunk(v_, t_, o, index);
    if (chunk.count == 0) return;
    const bool centered = p_.config.statistic == Statistic::MeanVar;
    const T* x = p_.x + chunk.offset + first;
    A* shift = thread_scratch<A, Slot::Sums>(3 * n);
    A *sum = shift + n, *square = shift + 2 * n;
    if (chunk.full > 0) {
      column_moments(x, t_.width, chunk.full, n, centered, shift, sum, square);
      if (chunk.rest > 0)
        add_moments<1, false>(x + chunk.full * t_.width, 0, chunk.rest, shift, sum, square);
    } else {
      column_moments(x, 0, std::min<int64_t>(chunk.rest, 1), chunk.rest, centered, shift, sum,
                     square);
    }
    double* mean = partial + index * t_.row;
    double* m2 = partial + (t_.chunks + index) * t_.row;
    if (t_.fold == 1) {
      return finish_moments(shift, sum, square, chunk.full, n, centered, mean + first, m2 + first);
    }
    double* folds = thread_scratch<double, Slot::Folds>(2 * t_.width);
    const auto count = [&](int64_t f) { return chunk.full + (f * t_.row < chunk.rest); };
    for (int64_t f = 0; f < t_.fold; ++f) {
      const int64_t j = f * t_.row;
      finish_moments(shift + j, sum + j, square + j, count(f), t_.row, centered, folds + j,
                     folds + t_.width + j);
    }
    merge_pieces(t_.fold, t_.row, t_.row, count, folds, folds + t_.width);
    std::copy_n(folds, t_.row, mean);
    std::copy_n(folds + t_.width, t_.row, m2);
  }

  // From the chunks' moments of columns [first, first + size) to mean and var of block o.
  void finish_statistics(int64_t o, int64_t first, int64_t size, double* partial) {
    const int64_t n = t_.fold > 1 ? t_.row : size;
    double* mean = partial + first;
    double* m2 = partial + t_.chunks * t_.row + first;
    merge_pieces(
        t_.chunks, t_.row, n, [&](int64_t i) { return Chunk(v_, t_, o, i).count; }, mean, m2);
    const int64_t inner = v_.reduce_inner;
    const double rows = static_cast<double>(v_.rows_of(o));
    for (int64_t j = 0; j < n; j += inner) {
      merge_columns(inner, v_.rows_of(o), mean + j, m2 + j);
      const int64_t k = o * v_.kept + (first + j) / inner;
      if (p_.mean != nullptr) p_.mean[k] = static_cast<A>(mean[j]);
      p_.var[k] = static_cast<A>(m2[j] / (rows * static_cast<double>(inner)));
    }
  }

  void map(const Chunk& chunk, int64_t first, int64_t n, Columns<A> columns) {
    const bool epilogue = has_epilogue(p_.config, p_.residual), relu = is_fused_relu(p_);
    alignas(64) A values[kChunk];
    for (int64_t r = 0; r < chunk.rows(); ++r) {
      const int64_t end = first + chunk.columns(r, first, n);
      for (int64_t j0 = first; j0 < end; j0 += kChunk) {
        const int64_t size = std::min(kChunk, end - j0);
        const int64_t index = chunk.offset + r * t_.width + j0;
        const T* x = p_.x + index;
        const A *mean = columns.mean + j0, *scale = columns.scale + j0, *bias = columns.bias + j0;
        const auto normalize = [&](auto* out, auto&& finish) {
          for_each_wide<A>(size, [&](auto tag, int64_t j) {
            const auto d = load(tag, x + j) - load(tag, mean + j);
            store(tag, out + j,
                  finish(tag, j, fmadd(d, load(tag, scale + j), load(tag, bias + j))));
          });
        };
        if (!epilogue) {
          normalize(p_.y + index, [](auto, int64_t, auto v) { return v; });
        } else if (relu && p_.residual == nullptr) {
          normalize(p_.y + index, [](auto, int64_t, auto v) { return Relu::forward(v); });
        } else if (relu) {
          const T* residual = p_.residual + index;
          normalize(p_.y + index, [=](auto tag, int64_t j, auto v) {
            return Relu::forward(v + load(tag, residual + j));
          });
        } else {
          normalize(values, [](auto, int64_t, auto v) { return v; });
          finish_forward(p_.config, {index, size}, values, p_.residual, p_.y);
        }
      }
    }
  }

  const NormForward<T>& p_;
  const View& v_;
  const Tiling t_;
};

}  // namespace

template <typename T>
void column_norm_fwd(const NormForward<T>& p) {
  const View& v = p.config.view;
  if (v.numel() == 0) return;
  if (v.inner == 0) {
    if (!is_single_pixel(v)) return pixel_norm_fwd(p);
    NormForward<T> row = p;
    row.config.view = pixel_as_row(v);
    return row_norm_fwd(row);
  }
  // With nothing to sum, planes pay from 192 bytes on.
  const bool frozen_plane = p.config.frozen && v.inner == v.reduce_inner &&
                            v.inner * static_cast<int64_t>(sizeof(T)) >= 192;
  if (is_plane(v) || frozen_plane) return plane_norm_fwd(p);
  Forward<T>(p).run();
}

const char* column_norm_form(const View& v, int element_size) {
  if (v.inner == 0)
    return is_single_pixel(v) ? row_norm_form(pixel_as_row(v), element_size) : "pixel, resident";
  if (is_plane(v)) {
    return v.reduce_outer * v.reduce_inner <= kResident ? "plane, resident" : "plane, streaming";
  }
  switch (Tiling(v).visit) {
    case Visit::Samples:
      return "column, one sample at a time";
    case Visit::Columns:
      return "column, resident";
    case Visit::Split:
      return "column, streaming";
  }
  return "column";
}

#define FASTNORM_INSTANTIATE(T) template void column_norm_fwd<T>(const NormForward<T>&);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)
#undef FASTNORM_INSTANTIATE

}  // namespace fastnorm::cpu
