// Column geometry, forward: batch norm in any layout, group and instance norm of NHWC, and of NCHW
// where a sample has few statistics that no cluster holds (column_forms.cuh); the pixel form
// (pixel_norm.cuh) takes the norms over the channels of NCHW.
//
//   y = dropout(activation((x - mean) * scale + bias + residual)),  scale = (weight + offset) *
//   rstd
//
// Streaming: chunk sums, merge, map. Every statistic is spread over as many blocks as it has
// chunks. A thread adds up d = x - K over its elements, K being the first of them:
//
//   mean = K + sum(d) / n,   m2 = sum(d^2) - sum(d)^2 / n                 (MeanSquare: K = 0)
//
// which loses about 1 + (K - mean)^2 / var roundings, at most n, whatever the mean. The columns of
// a statistic are then merged in the block, and its chunks by a second kernel, both in two passes,
// mean first: equal elements have that mean and variance zero.
// The map runs in the reverse order of the blocks, so that it begins with what the sums left in
// L2: (3 - f) E b, f being the part of the tensor that was still there.
//
// Resident: where a block has all elements of its statistics (small samples), one kernel does all;
// the second read comes from L2: 2 E b. Frozen statistics need the map alone: 2 E b.
#pragma once

#include "common/stats.h"
#include "cuda/column_merge.cuh"
#include "cuda/reduce.cuh"

namespace fastnorm::cuda {

// Count, mean and m2 of every column of a pack.
template <typename A, int n>
struct PackMoments {
  A shift[n], sum[n], square[n];
  int whole = 0, ragged[n];

  template <typename T, typename Walk>
  FASTNORM_DEVICE void add_all(const T* x, Walk walk, bool centered) {
#pragma unroll
    for (int e = 0; e < n; ++e) shift[e] = sum[e] = square[e] = A(0), ragged[e] = 0;
    constexpr int kAhead = 4;
    bool begun = !centered;
    while (true) {
      Span span[kAhead];
      Pack<T, n> pack[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        span[i] = walk.next();
        if (span[i].any()) pack[i] = load_span<n>(x, span[i], true);
      }
      if (!begun && span[0].any()) begin(pack[0], span[0]);
      begun = true;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (span[i].any()) add(pack[i], span[i]);
      }
      if (!span[kAhead - 1].any()) return;
    }
  }
  // Elements that aren't there take the shift of one that is: they may come in a later pack.
  template <typename T>
  FASTNORM_DEVICE void begin(const Pack<T, n>& pack, const Span& s) {
    A present = A(0);
#pragma unroll
    for (int e = n - 1; e >= 0; --e) {
      if (s.has(e)) present = widen(pack.v[e]);
    }
#pragma unroll
    for (int e = 0; e < n; ++e) shift[e] = s.has(e) ? widen(pack.v[e]) : present;
  }
  template <typename T>
  FASTNORM_DEVICE void add(const Pack<T, n>& pack, const Span& s) {
    if (s.whole) ++whole;
#pragma unroll
    for (int e = 0; e < n; ++e) {
      if (!s.has(e)) continue;
      const A d = widen(pack.v[e]) - shift[e];
      sum[e] += d;
      square[e] += d * d;
      if (!s.whole) ++ragged[e];
    }
  }
  FASTNORM_DEVICE A count(int e) const { return static_cast<A>(whole + ragged[e]); }
  // Mean less the shift.
  FASTNORM_DEVICE A excess(int e, bool centered) const {
    return centered && whole + ragged[e] > 0 ? sum[e] / count(e) : A(0);
  }
  FASTNORM_DEVICE A m2(int e, bool centered) const {
    if (!centered || whole + ragged[e] == 0) return square[e];
    const A v = square[e] - sum[e] * (sum[e] / count(e));
    return v < A(0) ? A(0) : v;
  }
};

// Mean, scale and bias of every element of a pack.
template <typename A, int n>
struct ColumnAffine {
  A mean_[n], scale_[n], bias_[n];

  FASTNORM_DEVICE A mean(int e) const { return mean_[e]; }
  FASTNORM_DEVICE A scale(int e) const { return scale_[e]; }
  FASTNORM_DEVICE A map(A d, int e) const { return d * scale_[e] + bias_[e]; }
};

// The same, one for all. Of a row norm, which the row kernels may have taken forward, it rounds as
// they do.
template <typename A>
struct PlaneAffine {
  bool row;
  A mean_, rstd, weight, bias;

  FASTNORM_DEVICE A mean(int) const { return mean_; }
  FASTNORM_DEVICE A scale(int) const { return weight * rstd; }
  FASTNORM_DEVICE A map(A d, int) const {
    return row ? d * rstd * weight + bias : d * scale(0) + bias;
  }
};

template <typename T>
FASTNORM_DEVICE Accumulate<T> parameter_of(const Parameter& parameter, int64_t channel,
                                           Accumulate<T> absent) {
  if (parameter.data == nullptr) return absent;
  Accumulate<T> value[1];
  load_parameter<T>(parameter, channel, value);
  return value[0];
}

template <typename T>
FASTNORM_DEVICE Accumulate<T> weight_of(const Parameter& weight, double offset, int64_t channel) {
  using A = Accumulate<T>;
  return weight.data == nullptr ? A(1)
                                : parameter_of<T>(weight, channel, A(0)) + static_cast<A>(offset);
}

// 1 / sqrt(var + eps) of statistic `at`, which this block itself may have stored.
template <typename A>
FASTNORM_DEVICE A rstd_of(const A* var, int64_t at, double eps) {
  return A(1) / sqrt(load_coherent<1>(var + at).v[0] + static_cast<A>(eps));
}

// P: NormForward<T> or NormBackward<T>. more(e, statistic) loads what else there is, and finish(e,
// rstd) works it out: square roots and divisions have branches, which would hold up the next load.
template <int n, typename T, typename P, typename More, typename Finish>
FASTNORM_DEVICE ColumnAffine<Accumulate<T>, n> load_column_affine(const P& p, const ColumnTiling& t,
                                                                  const ColumnTile& tile,
                                                                  More&& more, Finish&& finish) {
  using A = Accumulate<T>;
  ColumnAffine<A, n> affine;
  const View& v = p.config.view;
  const int64_t column = tile.first + int64_t{threadIdx.x} * n;
  int64_t at = column - divide(column, t.row) * t.row;  // in a row of the tensor
  A var[n];
#pragma unroll
  for (int e = 0; e < n; ++e) {
    affine.mean_[e] = affine.scale_[e] = affine.bias_[e] = A(0);
    var[e] = A(1);
    if (column + e < tile.end) {
      const int64_t channel = v.inner == 1 ? at : divide(at, v.inner);
      const int64_t statistic =
          tile.o * v.kept + (v.reduce_inner == 1 ? at : divide(at, v.reduce_inner));
      var[e] = load_coherent<1>(p.var + statistic).v[0];
      if (p.mean != nullptr) affine.mean_[e] = load_coherent<1>(p.mean + statistic).v[0];
      affine.scale_[e] = weight_of<T>(p.weight, p.config.weight_offset, channel);
      affine.bias_[e] = parameter_of<T>(p.bias, channel, A(0));
      more(e, statistic);
    }
    if (++at == t.row) at = 0;
  }
#pragma unroll
  for (int e = 0; e < n; ++e) {
    const A rstd = A(1) / sqrt(var[e] + static_cast<A>(p.config.eps));
    affine.scale_[e] *= rstd;
    finish(e, rstd);
  }
  return affine;
}

template <typename T, typename P>
FASTNORM_DEVICE PlaneAffine<Accumulate<T>> load_plane_affine(const P& p, const PlaneTile& tile) {
  using A = Accumulate<T>;
  return {p.config.is_row(),
          p.mean != nullptr ? load_coherent<1>(p.mean + tile.statistic).v[0] : A(0),
          rstd_of(p.var, tile.statistic, p.config.eps),
          weight_of<T>(p.weight, p.config.weight_offset, tile.channel),
          parameter_of<T>(p.bias, tile.channel, A(0))};
}

// What reaches the activation. The backward pass calls it as well: the same roundings.
template <typename T, int n, typename Affine>
FASTNORM_DEVICE void affine_of_pack(const Pack<T, n>& x, const Affine& affine, bool add,
                                    const Pack<T, n>& residual, Accumulate<T> (&v)[n]) {
  widen(x, v);
#pragma unroll
  for (int e = 0; e < n; ++e) v[e] = affine.map(v[e] - affine.mean(e), e);
  if (!add) return;
  Accumulate<T> r[n];
  widen(residual, r);
#pragma unroll
  for (int e = 0; e < n; ++e) v[e] += r[e];
}

// Maps the packs of a walk, by way of shared memory at `memory`; load_affine() gives their map.
template <int n, typename T, typename Walk, typename Load>
FASTNORM_DEVICE void normalize_walk(const NormForward<T>& p, const Walk& walk, Load&& load_affine,
                                    void* memory) {
  const Drop<Accumulate<T>> drop = Drop<Accumulate<T>>::of(p.config.dropout);
  const bool add = p.residual != nullptr;
  const Ring<T, n> ring(memory, add ? 2 : 1);
  decltype(load_affine()) affine;
  ring.stream(
      walk,
      [&](const Span& s, int turn) {
        fetch_span<n>(p.x, s, ring.at(turn, 0));
        if (add) fetch_span<n>(p.residual, s, ring.at(turn, 1));
      },
      [&] { affine = load_affine(); },
      [&](const Span& s, int turn) {
        Pack<T, n> residual{};
        if (add) residual = shared_load<n>(ring.at(turn, 1));
        Accumulate<T> v[n];
        affine_of_pack(shared_load<n>(ring.at(turn, 0)), affine, add, residual, v);
        activate(v, p.config.activation);
        drop_span(drop, v, s.index);
        store_span(p.y, s, narrow<T>(v));
      });
}

// Shared memory of `values` values per column of a tile.
template <typename A, int n>
FASTNORM_HD size_t column_bytes(int values, int threads) {
  return sizeof(A) * values * n * column_pitch<A, n>(threads);
}

// Partial moments: three arrays over the pieces.
template <typename A>
struct MomentPieces {
  A *count, *mean, *m2;

  FASTNORM_DEVICE MomentPieces(unsigned char* workspace, const Pieces& pieces)
      : count(reinterpret_cast<A*>(workspace)),
        mean(count + pieces.total()),
        m2(mean + pieces.total()) {}
};

// Merges the columns of each statistic of the tile; f(segment of the tile, count, mean, m2) by one
// thread each.
template <int n, typename A, typename F>
FASTNORM_DEVICE void merge_columns(const PackMoments<A, n>& moments, bool centered,
                                   const ColumnTile& tile, const Segments& segments, F&& f) {
  const int thread = static_cast<int>(threadIdx.x);
  const int pitch = column_pitch<A, n>(static_cast<int>(blockDim.x));
  A* means = reinterpret_cast<A*>(dynamic_shared());
  A* shifts = means + n * pitch;
  A* squares = shifts + n * pitch;
#pragma unroll
  for (int e = 0; e < n; ++e) {
    shared_store(means + e * pitch + thread, moments.excess(e, centered));
    shared_store(shifts + e * pitch + thread, moments.shift[e]);
    shared_store(squares + e * pitch + thread, moments.m2(e, centered));
  }
  __syncthreads();
  for_each_segment(segments, [&](int64_t g, int lane, int lanes) {
    const int columns = g < segments.n ? segments.count(g) : 0;
    const auto place = [&](int i) {
      const int j = segments.column(g, i);
      return j % n * pitch + j / n;
    };
    // Means from here on are relative to the first shift, which rounding doesn't touch.
    const A base = columns > 0 ? shared_load(shifts + place(0)) : A(0);
    const auto mean_of = [&](int i) {
      return shared_load(shifts + place(i)) - base + shared_load(means + place(i));
    };
    A mean = 0, sum[2] = {0, 0}, square[1] = {0};
    for (int i = lane; i < columns; i += lanes) {
      const A count = static_cast<A>(tile.count(tile.first + segments.column(g, i)));
      sum[0] += count;
      if (centered && count > A(0)) sum[1] += count * mean_of(i);
    }
    warp_sum(sum, lanes);
    if (centered && sum[0] > A(0)) mean = sum[1] / sum[0];
    for (int i = lane; i < columns; i += lanes) {
      const A count = static_cast<A>(tile.count(tile.first + segments.column(g, i)));
      const A d = mean_of(i) - mean;
      square[0] += shared_load(squares + place(i)) + (count > A(0) ? count * d * d : A(0));
    }
    warp_sum(square, lanes);
    if (lane == 0 && columns > 0) f(g, sum[0], base + mean, square[0]);
  });
}

template <typename T>
__global__ __launch_bounds__(kColumnThreads,
                             4) void column_norm_fwd_kernel(NormForward<T> p, ColumnTiling t,
                                                            Pieces pieces, Phase phase) {
  using A = Accumulate<T>;
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  const ColumnTile tile(v, t, phase == Phase::Map ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  const ColumnWalk<n> walk(t, tile);
  if (phase != Phase::Map) {
    const bool centered = p.config.statistic == Statistic::MeanVar;
    const Segments segments(t, tile, v.reduce_inner, v.kept);
    const MomentPieces<A> partial(p.workspace, pieces);
    PackMoments<A, n> moments;
    moments.add_all(p.x, walk, centered);
    merge_columns(moments, centered, tile, segments, [&](int64_t g, A count, A mean, A m2) {
      if (phase == Phase::Both) {
        const int64_t at = tile.o * v.kept + segments.first + g;
        if (centered) store(p.mean + at, mean);
        store(p.var + at, m2 / count);
      } else {
        const int64_t at = pieces.slot(tile.o, tile.chunk, tile.index, segments.first + g);
        store(partial.count + at, count);
        store(partial.mean + at, mean);
        store(partial.m2 + at, m2);
      }
    });
    if (phase == Phase::Reduce) return;
    __syncthreads();
  }
  const size_t before = phase == Phase::Map ? 0 : column_bytes<A, n>(3, t.threads);
  const auto load_affine = [&] {
    return load_column_affine<n, T>(p, t, tile, [](int, int64_t) {}, [](int, A) {});
  };
  normalize_walk<n>(p, walk, load_affine, dynamic_shared() + before);
}

template <typename T>
__global__ __launch_bounds__(kColumnThreads,
                             4) void plane_norm_fwd_kernel(NormForward<T> p, PlaneTiling t,
                                                           Pieces pieces, Phase phase) {
  using A = Accumulate<T>;
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  const PlaneTile tile(v, t, phase == Phase::Map ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  const PlaneWalk<n> walk(t, tile);
  if (phase == Phase::Map) {
    if (tile.empty()) return;
    normalize_walk<n>(p, walk, [&] { return load_plane_affine<T>(p, tile); }, dynamic_shared());
    return;
  }
  const bool centered = p.config.statistic == Statistic::MeanVar;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  PackMoments<A, n> moments;
  moments.add_all(p.x, walk, centered);
  // As in merge_columns; the base is the first element of the block.
  A base = 0, mean = 0, sum[2] = {0, 0}, square[1] = {0};
  if (centered && !tile.empty()) base = widen(load(p.x + tile.first_element()));
#pragma unroll
  for (int e = 0; e < n; ++e) {
    const A count = moments.count(e);
    sum[0] += count;
    if (count > A(0)) sum[1] += count * (moments.shift[e] - base + moments.excess(e, centered));
  }
  block_sum(sum, scratch);
  if (centered && sum[0] > A(0)) mean = sum[1] / sum[0];
#pragma unroll
  for (int e = 0; e < n; ++e) {
    const A count = moments.count(e);
    const A d = moments.shift[e] - base + moments.excess(e, centered) - mean;
    square[0] += moments.m2(e, centered) + (count > A(0) ? count * d * d : A(0));
  }
  block_sum(square, scratch + 2 * kMaxWarps);
  if (threadIdx.x != 0) return;
  const MomentPieces<A> partial(p.workspace, pieces);
  const int64_t segment = tile.statistic - tile.o * v.kept;
  const int64_t at = pieces.slot(tile.o, tile.chunk, tile.channel, segment);
  store(partial.count + at, sum[0]);
  store(partial.mean + at, base + mean);
  store(partial.m2 + at, square[0]);
}

// Neighbouring threads have neighbouring statistics; `rows` threads share the pieces of one.
template <typename T>
__global__ __launch_bounds__(kMergeThreads, 1) void merge_moments_kernel(NormForward<T> p,
                                                                         Pieces pieces, int rows) {
  using A = Accumulate<T>;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  const View& v = p.config.view;
  const int columns = static_cast<int>(blockDim.x) / rows;
  const int row = static_cast<int>(threadIdx.x) / columns;
  const int64_t statistic = int64_t{blockIdx.x} * columns + threadIdx.x % columns;
  const bool here = statistic < v.statistics();
  const int64_t o = here ? divide(statistic, v.kept) : 0;
  const PieceList list(pieces, o, here ? statistic - o * v.kept : 0);
  const MomentPieces<A> partial(p.workspace, pieces);
  const bool centered = p.config.statistic == Statistic::MeanVar;
  const A total = static_cast<A>(v.rows_of(o) * v.reduce_inner);
  A mean = 0, sum[1] = {0};
  if (centered) {
    if (here) {
      mean = load(partial.mean + list.begin());
      list.for_each(row, rows, [&](int64_t at) {
        const A count = load(partial.count + at), d = load(partial.mean + at) - mean;
        sum[0] += count > A(0) ? count * d : A(0);
      });
    }
    sum_over_rows(sum, rows, scratch);
    mean += sum[0] / total;
  }
  sum[0] = 0;
  if (here) {
    list.for_each(row, rows, [&](int64_t at) {
      const A count = load(partial.count + at), d = load(partial.mean + at) - mean;
      sum[0] += load(partial.m2 + at) + (count > A(0) ? count * d * d : A(0));
    });
  }
  sum_over_rows(sum, rows, scratch + blockDim.x);
  if (row != 0 || !here) return;
  if (centered) store(p.mean + statistic, mean);
  store(p.var + statistic, sum[0] / total);
}

inline size_t column_norm_fwd_workspace_bytes(const View& view, size_t element_size) {
  if (view.inner == 0 || view.numel() == 0) return 0;
  const int width = static_cast<int>(16 / element_size);
  const size_t value = element_size == 8 ? 8 : 4;
  if (PlaneTiling::takes(view)) {
    const PlaneTiling t = PlaneTiling::of(view, width);
    return 3 * value * static_cast<size_t>(t.pieces(view, view.channels_per_kept()).total());
  }
  const ColumnTiling t = ColumnTiling::of(view, width);
  if (t.resident) return 0;
  return 3 * value * static_cast<size_t>(Pieces::of(view, t, view.reduce_inner, view.kept).total());
}

// The column and the plane form.
template <typename T, typename Launch>
void column_norm_fwd(const NormForward<T>& p, Launch&& launch) {
  using A = Accumulate<T>;
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  if (v.numel() == 0) return;
  const bool aligned = aligned_to_16({p.x, p.residual, p.y});
  const int tensors = p.residual != nullptr ? 2 : 1;
  if (PlaneTiling::takes(v)) {
    PlaneTiling t = PlaneTiling::of(v, n);
    t.aligned = aligned;
    const Pieces pieces = t.pieces(v, v.channels_per_kept());
    LaunchShape shape{blocks(v.outer * t.chunks * v.channels()), kColumnThreads,
                      3 * kMaxWarps * sizeof(A)};
    if (!p.config.frozen) {
      launch("plane_norm_fwd, moments", shape, plane_norm_fwd_kernel<T>, p, t, pieces,
             Phase::Reduce);
      launch_merge(launch, "merge_moments", merge_moments_kernel<T>, p, pieces, v.statistics(),
                   sizeof(A));
    }
    shape.shared = Ring<T, n>::bytes(kColumnThreads, tensors);
    launch("plane_norm_fwd, map", shape, plane_norm_fwd_kernel<T>, p, t, pieces, Phase::Map);
    return;
  }
  ColumnTiling t = ColumnTiling::of(v, n);
  t.aligned = aligned;
  const Pieces pieces = Pieces::of(v, t, v.reduce_inner, v.kept);
  const auto threads = static_cast<unsigned>(t.threads);
  const size_t ring = Ring<T, n>::bytes(t.threads, tensors);
  LaunchShape shape{blocks(v.outer * t.chunks * t.tiles), threads,
                    column_bytes<A, n>(3, t.threads) + (t.resident ? ring : 0)};
  if (!p.config.frozen) {
    launch(t.resident ? "column_norm_fwd, resident" : "column_norm_fwd, moments", shape,
           column_norm_fwd_kernel<T>, p, t, pieces, t.resident ? Phase::Both : Phase::Reduce);
    if (t.resident) return;
    launch_merge(launch, "merge_moments", merge_moments_kernel<T>, p, pieces, v.statistics(),
                 sizeof(A));
  }
  shape.shared = ring;
  launch("column_norm_fwd, map", shape, column_norm_fwd_kernel<T>, p, t, pieces, Phase::Map);
}

}  // namespace fastnorm::cuda
