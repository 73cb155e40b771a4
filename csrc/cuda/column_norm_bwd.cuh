// Column geometry, backward. With d = x - mean, h the gradient that reaches the affine map and
// g = h * (weight + offset), per statistic of n elements:
//
//   h = activation'(d * scale + bias + residual) * dropout(dy),  dresidual = h
//   dbias = sum(h),  dweight = rstd * sum(h d)                     over a channel
//   dx = scale * h + c d + e,  c = -rstd^2 mean(g xhat),  e = -rstd mean(g)
//                                              (MeanSquare: e = 0; frozen: c = e = 0)
//
// As forward: chunk sums by channel, merge in a fixed order, map in reverse. The sums of a
// channel give the parameters' gradients and, weighted, those of its statistic: no other pass, no
// atomics. What the activation was applied to is recomputed by the forward pass's own code.
// Bytes, without residual: (5 - 2f) E b streaming, 3 E b resident or frozen, the latter because
// the map of frozen statistics needs no sums and is done in the same pass. With a residual and an
// activation: (8 - 3f) E b; but for ReLU h is dy or zero, so the sums' pass can store dresidual = h
// and the map read it in place of dy and residual: (7 - 2f) E b. One bit per element from the
// forward pass would save the residual's read: 10.1 in place of 11 E b of bfloat16, forward and
// backward, and 7.1 in place of 8 where planes are resident. Not done: it is one more output, and
// input, of every norm operator.
#pragma once

#include "cuda/column_norm.cuh"

namespace fastnorm::cuda {

// Sums in the workspace: by piece, by [outer][channel] and by [outer][kept].
template <typename A>
struct GradientSums {
  A *piece_hx, *piece_h;  // of h * xhat and h
  A *hx, *h;
  A *gx, *g;  // of g * xhat and g

  FASTNORM_HD GradientSums(unsigned char* workspace, const View& v, int64_t pieces)
      : piece_hx(reinterpret_cast<A*>(workspace)),
        piece_h(piece_hx + pieces),
        hx(piece_h + pieces),
        h(hx + v.outer * v.channels()),
        gx(h + v.outer * v.channels()),
        g(gx + v.statistics()) {}
  static size_t bytes(const View& v, int64_t pieces) {
    return 2 * sizeof(A) * static_cast<size_t>(pieces + v.outer * v.channels() + v.statistics());
  }
};

// c and e of dx, in two steps: the loads of the statistic's sums, and what is worked out of them.
template <typename T>
FASTNORM_DEVICE void load_terms(const NormBackward<T>& p, const GradientSums<Accumulate<T>>& sums,
                                int64_t statistic, Accumulate<T>& c, Accumulate<T>& e) {
  c = load_coherent<1>(sums.gx + statistic).v[0];
  if (p.mean != nullptr) e = load_coherent<1>(sums.g + statistic).v[0];
}
template <typename T>
FASTNORM_DEVICE void finish_terms(const NormBackward<T>& p, int64_t o, Accumulate<T> rstd,
                                  Accumulate<T>& c, Accumulate<T>& e) {
  using A = Accumulate<T>;
  const A size = static_cast<A>(p.config.view.rows_of(o) * p.config.view.reduce_inner);
  c = -rstd * rstd * (c / size);
  e = -rstd * (e / size);
}

// Whether the sums' pass stores dresidual, and the map reads it: exactly h, in any type.
template <typename T>
FASTNORM_DEVICE bool keeps_gradient(const NormBackward<T>& p) {
  return p.residual != nullptr && p.dresidual != nullptr && p.dx != nullptr && !p.config.frozen &&
         p.config.activation == Activation::Relu && p.config.dropout.seed == nullptr;
}

// Tensors that a pass over the packs of a walk reads: x, dy, and a residual.
template <typename T>
FASTNORM_HD int gradient_tensors(const NormBackward<T>& p) {
  return p.residual != nullptr && p.config.activation != Activation::None ? 3 : 2;
}

// With `reduce`, adds h * d and h of every element of the packs to one and two; with `map`, stores
// dresidual and dx = scale * h + one * d + two, or, with both, scale * h. By way of shared memory
// at `memory`; load_affine() gives the affine map and, for a map, one and two.
template <int n, typename T, typename Walk, typename Load>
FASTNORM_DEVICE void gradient_walk(const NormBackward<T>& p, const Walk& walk, Load&& load_affine,
                                   bool reduce, bool map, Accumulate<T> (&one)[n],
                                   Accumulate<T> (&two)[n], void* memory) {
  using A = Accumulate<T>;
  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  const bool keeps = keeps_gradient(p), kept = keeps && map;
  const bool add = gradient_tensors(p) == 3 && !kept;
  const Ring<T, n> ring(memory, gradient_tensors(p));
  decltype(load_affine()) affine;
  ring.stream(
      walk,
      [&](const Span& s, int turn) {
        fetch_span<n>(p.x, s, ring.at(turn, 0));
        fetch_span<n>(kept ? p.dresidual : p.dy, s, ring.at(turn, 1));
        if (add) fetch_span<n>(p.residual, s, ring.at(turn, 2));
      },
      [&] { affine = load_affine(); },
      [&](const Span& s, int turn) {
        const Pack<T, n> x = shared_load<n>(ring.at(turn, 0));
        A d[n], h[n];
        widen(shared_load<n>(ring.at(turn, 1)), h);
        drop_span(drop, h, s.index);
        if (p.config.activation != Activation::None && !kept) {
          Pack<T, n> residual{};
          if (add) residual = shared_load<n>(ring.at(turn, 2));
          affine_of_pack(x, affine, add, residual, d);
          activate_backward<false>(h, d, p.config.activation);
        }
        widen(x, d);
#pragma unroll
        for (int e = 0; e < n; ++e) d[e] -= affine.mean(e);
        if (p.dresidual != nullptr && map != keeps) store_span(p.dresidual, s, narrow<T>(h));
        if (reduce) {
#pragma unroll
          for (int e = 0; e < n; ++e) {
            one[e] += s.has(e) ? h[e] * d[e] : A(0);
            two[e] += s.has(e) ? h[e] : A(0);
            h[e] *= affine.scale(e);
          }
        } else {
#pragma unroll
          for (int e = 0; e < n; ++e) h[e] = affine.scale(e) * h[e] + (one[e] * d[e] + two[e]);
        }
        if (map && p.dx != nullptr) store_span(p.dx, s, narrow<T>(h));
      });
}

// Adds up the columns of each channel of the tile; f(channel, sum of h d, sum of h) by one thread.
template <int n, typename A, typename F>
FASTNORM_DEVICE void add_columns(const A (&sum_hd)[n], const A (&sum_h)[n],
                                 const Segments& segments, F&& f) {
  const int thread = static_cast<int>(threadIdx.x);
  const int pitch = column_pitch<A, n>(static_cast<int>(blockDim.x));
  A* hd = reinterpret_cast<A*>(dynamic_shared());
  A* h = hd + n * pitch;
#pragma unroll
  for (int e = 0; e < n; ++e) {
    shared_store(hd + e * pitch + thread, sum_hd[e]);
    shared_store(h + e * pitch + thread, sum_h[e]);
  }
  __syncthreads();
  for_each_segment(segments, [&](int64_t g, int lane, int lanes) {
    const int columns = g < segments.n ? segments.count(g) : 0;
    A sum[2] = {0, 0};
    for (int i = lane; i < columns; i += lanes) {
      const int j = segments.column(g, i), place = j % n * pitch + j / n;
      sum[0] += shared_load(hd + place);
      sum[1] += shared_load(h + place);
    }
    warp_sum(sum, lanes);
    if (lane == 0 && columns > 0) f(segments.first + g, sum[0], sum[1]);
  });
}

// g * xhat and g of statistic (o, kept), by `lanes` lanes of a warp; valid in all of them.
template <typename T>
FASTNORM_DEVICE void add_channels(const NormBackward<T>& p, const GradientSums<Accumulate<T>>& sums,
                                  int64_t o, int64_t kept, bool here, int lane, int lanes,
                                  Accumulate<T> (&sum)[2]) {
  using A = Accumulate<T>;
  const View& v = p.config.view;
  const int64_t channels = here ? v.channels_per_kept() : 0;
  sum[0] = sum[1] = A(0);
  for (int64_t i = lane; i < channels; i += lanes) {
    const int64_t channel = kept * channels + i, at = o * v.channels() + channel;
    const A weight = weight_of<T>(p.weight, p.config.weight_offset, channel);
    sum[0] += weight * load_coherent<1>(sums.hx + at).v[0];
    sum[1] += weight * load_coherent<1>(sums.h + at).v[0];
  }
  warp_sum(sum, lanes);
}

template <typename T>
__global__ __launch_bounds__(kColumnThreads, (sizeof(T) == 8 ? 2 : 3)) void column_norm_bwd_kernel(
    NormBackward<T> p, ColumnTiling t, Pieces pieces, Phase phase) {
  using A = Accumulate<T>;
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  const ColumnTile tile(v, t, phase == Phase::Map ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  const ColumnWalk<n> walk(t, tile);
  const GradientSums<A> sums(p.workspace, v, pieces.total());
  const bool frozen = p.config.frozen;
  A one[n], two[n];
#pragma unroll 1
  for (bool map = phase == Phase::Map;; map = true) {
#pragma unroll
    for (int e = 0; e < n; ++e) one[e] = two[e] = A(0);
    const auto load_affine = [&] {
      return load_column_affine<n, T>(
          p, t, tile,
          [&](int e, int64_t statistic) {
            if (map && !frozen) load_terms(p, sums, statistic, one[e], two[e]);
          },
          [&](int e, A rstd) {
            if (map && !frozen) finish_terms(p, tile.o, rstd, one[e], two[e]);
          });
    };
    gradient_walk<n>(p, walk, load_affine, !map, map || frozen, one, two,
                     dynamic_shared() + column_bytes<A, n>(2, t.threads));
    if (map) return;
    const Segments channels(t, tile, v.inner, v.channels());
    add_columns(one, two, channels, [&](int64_t channel, A hd, A h) {
      const int64_t statistic = tile.o * v.kept + divide(channel, v.channels_per_kept());
      const A hx = hd * rstd_of(p.var, statistic, p.config.eps);
      const bool all = phase == Phase::Both;
      const int64_t at = all ? tile.o * v.channels() + channel
                             : pieces.slot(tile.o, tile.chunk, tile.index, channel);
      store((all ? sums.hx : sums.piece_hx) + at, hx);
      store((all ? sums.h : sums.piece_h) + at, h);
    });
    if (phase == Phase::Reduce) return;
    __syncthreads();
    const Segments statistics(t, tile, v.reduce_inner, v.kept);
    for_each_segment(statistics, [&](int64_t g, int lane, int lanes) {
      A sum[2];
      const int64_t kept = statistics.first + g;
      add_channels(p, sums, tile.o, kept, g < statistics.n, lane, lanes, sum);
      if (lane != 0 || g >= statistics.n) return;
      store(sums.gx + tile.o * v.kept + kept, sum[0]);
      store(sums.g + tile.o * v.kept + kept, sum[1]);
    });
    __syncthreads();
  }
}

template <typename T>
__global__ __launch_bounds__(kColumnThreads,
                             3) void plane_norm_bwd_kernel(NormBackward<T> p, PlaneTiling t,
                                                           Pieces pieces, Phase phase) {
  using A = Accumulate<T>;
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  const bool map = phase == Phase::Map, frozen = p.config.frozen;
  const PlaneTile tile(v, t, map ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  const GradientSums<A> sums(p.workspace, v, pieces.total());
  A one[n], two[n], rstd = 0;
#pragma unroll
  for (int e = 0; e < n; ++e) one[e] = two[e] = A(0);
  const auto load_affine = [&] {
    const PlaneAffine<A> affine = load_plane_affine<T>(p, tile);
    rstd = affine.rstd;
    if (!map || frozen) return affine;
    A c = 0, e_ = 0;
    load_terms(p, sums, tile.statistic, c, e_);
    finish_terms(p, tile.o, rstd, c, e_);
#pragma unroll
    for (int e = 0; e < n; ++e) one[e] = c, two[e] = e_;
    return affine;
  };
  gradient_walk<n>(p, PlaneWalk<n>(t, tile), load_affine, !map, map || frozen, one, two,
                   dynamic_shared() + 2 * kMaxWarps * sizeof(A));
  if (map) return;
  A sum[2] = {0, 0};
#pragma unroll
  for (int e = 0; e < n; ++e) {
    sum[0] += one[e];
    sum[1] += two[e];
  }
  block_sum(sum, reinterpret_cast<A*>(dynamic_shared()));
  if (threadIdx.x != 0) return;
  const int64_t at = pieces.slot(tile.o, tile.chunk, tile.channel, tile.channel);
  store(sums.piece_hx + at, sum[0] * rstd);
  store(sums.piece_h + at, sum[1]);
}

// Stores one channel's gradients of weight and bias.
template <typename T>
FASTNORM_DEVICE void store_parameters(const NormBackward<T>& p, int64_t channel,
                                      const Accumulate<T> (&sum)[2]) {
  using A = Accumulate<T>;
  void* const target[2] = {p.dweight, p.dbias};
  const bool wide[2] = {p.dweight_wide, p.dbias_wide};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (target[i] == nullptr) continue;
    if (wide[i]) {
      store(static_cast<A*>(target[i]) + channel, sum[i]);
    } else {
      store(static_cast<T*>(target[i]) + channel, narrow<T>(sum[i]));
    }
  }
}

// The pieces of each (outer, channel), as merge_moments_kernel; a channel with a statistic of its
// own gives the sums of that as well, and one outer block the parameters' gradients.
template <typename T>
__global__ __launch_bounds__(kMergeThreads, 1) void merge_gradients_kernel(NormBackward<T> p,
                                                                           Pieces pieces,
                                                                           int rows) {
  using A = Accumulate<T>;
  const View& v = p.config.view;
  const GradientSums<A> sums(p.workspace, v, pieces.total());
  const int columns = static_cast<int>(blockDim.x) / rows;
  const int row = static_cast<int>(threadIdx.x) / columns;
  const int64_t at = int64_t{blockIdx.x} * columns + threadIdx.x % columns;
  const bool here = at < v.outer * v.channels();
  const int64_t o = here ? divide(at, v.channels()) : 0;
  const int64_t channel = here ? at - o * v.channels() : 0;
  const PieceList list(pieces, o, channel);
  A sum[2] = {0, 0};
  if (here) {
    list.for_each(row, rows, [&](int64_t piece) {
      sum[0] += load(sums.piece_hx + piece);
      sum[1] += load(sums.piece_h + piece);
    });
  }
  sum_over_rows(sum, rows, reinterpret_cast<A*>(dynamic_shared()));
  if (row != 0 || !here) return;
  store(sums.hx + at, sum[0]);
  store(sums.h + at, sum[1]);
  if (v.channels_per_kept() == 1) {
    const A weight = weight_of<T>(p.weight, p.config.weight_offset, channel);
    store(sums.gx + at, weight * sum[0]);
    store(sums.g + at, weight * sum[1]);
  }
  if (v.outer == 1) store_parameters(p, channel, sum);
}

// The sums of every statistic, from its channels: one warp each.
template <typename T>
__global__ __launch_bounds__(kMergeThreads, 1) void add_channels_kernel(NormBackward<T> p,
                                                                        Pieces pieces) {
  using A = Accumulate<T>;
  const View& v = p.config.view;
  const GradientSums<A> sums(p.workspace, v, pieces.total());
  const int64_t at = int64_t{blockIdx.x} * (kMergeThreads / 32) + threadIdx.x / 32;
  const bool here = at < v.statistics();
  const int64_t o = here ? divide(at, v.kept) : 0;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  A sum[2];
  add_channels(p, sums, o, at - o * v.kept, here, lane, 32, sum);
  if (lane != 0 || !here) return;
  store(sums.gx + at, sum[0]);
  store(sums.g + at, sum[1]);
}

// dweight and dbias: adds `count` rows of [channels] sums, at hx and h.
template <typename T>
__global__ __launch_bounds__(kMergeThreads,
                             1) void add_samples_kernel(NormBackward<T> p, const Accumulate<T>* hx,
                                                        const Accumulate<T>* h, int64_t count,
                                                        int64_t channels, int rows) {
  using A = Accumulate<T>;
  const int columns = static_cast<int>(blockDim.x) / rows;
  const int row = static_cast<int>(threadIdx.x) / columns;
  const int64_t channel = int64_t{blockIdx.x} * columns + threadIdx.x % columns;
  A sum[2] = {0, 0};
  if (channel < channels) {
    const int own = static_cast<int>(count > row ? divide(count - row + rows - 1, rows) : 0);
#pragma unroll 4
    for (int i = 0; i < own; ++i) {
      const int64_t at = (row + int64_t{i} * rows) * channels + channel;
      sum[0] += load(hx + at);
      sum[1] += load(h + at);
    }
  }
  sum_over_rows(sum, rows, reinterpret_cast<A*>(dynamic_shared()));
  if (row == 0 && channel < channels) store_parameters(p, channel, sum);
}

template <typename T, typename Launch>
void launch_add_samples(Launch& launch, const NormBackward<T>& p, const Accumulate<T>* hx,
                        const Accumulate<T>* h, int64_t count, int64_t channels) {
  int rows = 1;
  while (rows < 32 && rows < count) rows *= 2;
  launch("add_samples",
         LaunchShape{blocks(ceil_div(channels, kMergeThreads / rows)), kMergeThreads,
                     2 * kMergeThreads * sizeof(Accumulate<T>)},
         add_samples_kernel<T>, p, hx, h, count, channels, rows);
}

inline size_t column_norm_bwd_workspace_bytes(const View& view, size_t element_size) {
  if (view.inner == 0 || view.numel() == 0) return 0;
  const int width = static_cast<int>(16 / element_size);
  int64_t pieces = 0;
  if (PlaneTiling::takes(view)) {
    pieces = PlaneTiling::of(view, width).pieces(view, 1).total();
  } else {
    pieces = Pieces::of(view, ColumnTiling::of(view, width), view.inner, view.channels()).total();
  }
  return element_size == 8 ? GradientSums<double>::bytes(view, pieces)
                           : GradientSums<float>::bytes(view, pieces);
}

// The column and the plane form.
template <typename T, typename Launch>
void column_norm_bwd(const NormBackward<T>& p, Launch&& launch) {
  using A = Accumulate<T>;
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  const bool parameters = p.dweight != nullptr || p.dbias != nullptr;
  if (v.numel() == 0) {
    if (!parameters || v.channels() == 0) return;
    return launch_add_samples<T>(launch, p, nullptr, nullptr, 0, v.channels());
  }
  const bool frozen = p.config.frozen;
  const bool aligned = aligned_to_16({p.x, p.dy, p.residual, p.dx, p.dresidual});
  // Frozen statistics are mapped where the parameters' sums are made, if these are asked for.
  const bool wants_map = p.dx != nullptr || p.dresidual != nullptr;
  const bool reduce = parameters || (p.dx != nullptr && !frozen);
  const bool map = wants_map && !(frozen && reduce);
  Pieces pieces{};
  const auto reduced = [&](bool merge) {
    const GradientSums<A> sums(p.workspace, v, pieces.total());
    if (merge) {
      launch_merge(launch, "merge_gradients", merge_gradients_kernel<T>, p, pieces,
                   v.outer * v.channels(), sizeof(A));
      if (v.channels_per_kept() > 1 && !frozen && p.dx != nullptr) {
        launch("add_channels",
               LaunchShape{blocks(ceil_div(v.statistics(), kMergeThreads / 32)), kMergeThreads},
               add_channels_kernel<T>, p, pieces);
      }
      if (v.outer == 1) return;
    }
    if (parameters) launch_add_samples<T>(launch, p, sums.hx, sums.h, v.outer, v.channels());
  };
  if (PlaneTiling::takes(v)) {
    PlaneTiling t = PlaneTiling::of(v, n);
    t.aligned = aligned;
    pieces = t.pieces(v, 1);
    const LaunchShape shape{
        blocks(v.outer * t.chunks * v.channels()), kColumnThreads,
        2 * kMaxWarps * sizeof(A) + Ring<T, n>::bytes(kColumnThreads, gradient_tensors(p))};
    if (reduce) {
      launch("plane_norm_bwd, sums", shape, plane_norm_bwd_kernel<T>, p, t, pieces, Phase::Reduce);
      reduced(true);
    }
    if (map) {
      launch("plane_norm_bwd, map", shape, plane_norm_bwd_kernel<T>, p, t, pieces, Phase::Map);
    }
    return;
  }
  ColumnTiling t = ColumnTiling::of(v, n);
  t.aligned = aligned;
  pieces = Pieces::of(v, t, v.inner, v.channels());
  const auto threads = static_cast<unsigned>(t.threads);
  const LaunchShape shape{
      blocks(v.outer * t.chunks * t.tiles), threads,
      column_bytes<A, n>(2, t.threads) + Ring<T, n>::bytes(t.threads, gradient_tensors(p))};
  if (t.resident && reduce && map) {
    launch("column_norm_bwd, resident", shape, column_norm_bwd_kernel<T>, p, t, pieces,
           Phase::Both);
    return reduced(false);
  }
  if (reduce) {
    launch("column_norm_bwd, sums", shape, column_norm_bwd_kernel<T>, p, t, pieces, Phase::Reduce);
    reduced(true);
  }
  if (map) {
    launch("column_norm_bwd, map", shape, column_norm_bwd_kernel<T>, p, t, pieces, Phase::Map);
  }
}

}  // namespace fastnorm::cuda
