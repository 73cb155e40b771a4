// Row geometry, forward: one statistic per contiguous row of N elements (layer and RMS norm over
// trailing dimensions, group and instance norm of contiguous tensors).
//
//   mean = sum(x) / N        var = sum((x - mean)^2) / N       (MeanSquare: sum(x^2) / N)
//   y = dropout(activation((x - mean) / sqrt(var + eps) * (weight + offset) + bias + residual))
//   prologue: s = residual + dropout(x) takes the place of x, is stored, and its stored (rounded)
//   value is normalized, so that the backward pass finds what the forward pass used.
//
// Resident: the row is read once, all loads before the first sum, and the variance is a second
// pass over what is on chip: the registers of a warp or a part of one (`items` packs of `width`
// elements per thread), or, for longer rows, the shared memory of a block or of a cluster whose
// blocks add their sums through distributed shared memory. Asynchronous copies bring a row there
// without registers: 64 of them a thread leave room for 32 warps, with 33 to 128 KB under way,
// where the row in registers had 16 warps in one block, which can't load while it reduces. Bytes of
// DRAM: one read of x (and residual), one write of y (and s): 2 E b, with the prologue 4 E b.
//
// Streaming: rows that no cluster can hold are read twice. Each thread keeps count, mean and
// squared deviations of its elements, chunk by chunk, and the threads' moments are merged at the
// end.
//
// The thread that owns an element depends on its column alone, so a row has the same bits in any
// batch. Where N doesn't allow 16-byte packs, short rows go by single elements, of which
// neighbouring lanes touch neighbours, and longer ones through shared memory (row_norm_ragged.cuh);
// where a pointer doesn't, all do the former.
#pragma once

#include <algorithm>

#include "common/stats.h"
#include "cuda/elementwise.cuh"
#include "cuda/row_shape.cuh"

namespace fastnorm::cuda {

// s = residual + dropout(x) of one pack, rounded to T as it is stored.
template <typename T, int n, typename D>
FASTNORM_DEVICE Pack<T, n> add_dropped(const Pack<T, n>& x, const Pack<T, n>& residual,
                                       const D& drop, int64_t index) {
  Accumulate<T> v[n], r[n];
  widen(x, v);
  widen(residual, r);
  drop.apply(v, index);
#pragma unroll
  for (int e = 0; e < n; ++e) v[e] += r[e];
  return narrow<T>(v);
}

// What follows the statistics, for the pack at columns j .. j+n-1: v holds x on entry.
template <typename T, int n, typename D>
FASTNORM_DEVICE Pack<T, n> normalize_pack(const NormForward<T>& p, const Pack<T, n>& x,
                                          Accumulate<T> mean, Accumulate<T> rstd,
                                          const Accumulate<T> (&weight)[n],
                                          const Accumulate<T> (&bias)[n], bool add,
                                          const Pack<T, n>& residual, const D& drop,
                                          int64_t index) {
  using A = Accumulate<T>;
  A v[n];
  widen(x, v);
#pragma unroll
  for (int e = 0; e < n; ++e) v[e] = (v[e] - mean) * rstd * weight[e] + bias[e];
  if (!p.config.prologue) {
    if (add) {
      A r[n];
      widen(residual, r);
#pragma unroll
      for (int e = 0; e < n; ++e) v[e] += r[e];
    }
    activate(v, p.config.activation);
    drop.apply(v, index);
  }
  return narrow<T>(v);
}

// Weight with its offset, and bias, of columns j .. j+n-1.
template <typename T, int n>
FASTNORM_DEVICE void load_affine(const Parameter& weight, const Parameter& bias, double offset,
                                 const Channels& channels, int64_t j, Accumulate<T> (&w)[n],
                                 Accumulate<T> (&b)[n]) {
  using A = Accumulate<T>;
  load_channels<T>(weight, channels, j, A(1), w);
  load_channels<T>(bias, channels, j, A(0), b);
  if (weight.data != nullptr) {
#pragma unroll
    for (int e = 0; e < n; ++e) w[e] += static_cast<A>(offset);
  }
}

// Rows of a warp or less, in registers. The 1 keeps ptxas from spilling a register or two for one
// more block that it thinks might fit.
template <typename T, int width, int items>
__global__ __launch_bounds__(kSmallThreads, 1) void row_norm_fwd_kernel(NormForward<T> p,
                                                                        RowShape shape) {
  using A = Accumulate<T>;
  const int64_t size = p.config.view.reduce_inner;
  const RowThread t = RowThread::of(p.config.view.statistics(), shape);
  const int64_t base = t.row * size;
  const int packs = t.row < t.rows ? static_cast<int>(size / width) : 0;
  const bool centered = p.config.statistic == Statistic::MeanVar;
  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  const Channels channels = Channels::of_row(p.config.view, t.row);

  // Registers allow the parameters to be on their way during the sums only for short rows; longer
  // ones read them at the end, when other blocks hide the latency.
  constexpr bool kEarly = items * width * sizeof(A) <= 64;
  Pack<T, width> x[items], residual[items];
  A weight[kEarly ? items : 1][width], bias[kEarly ? items : 1][width];
#pragma unroll
  for (int i = 0; i < items; ++i) {
    const int k = t.lane + i * t.step;
    x[i] = residual[i] = Pack<T, width>{};
    if (k < packs) x[i] = load_streaming<width>(p.x + base + k * int64_t{width});
  }
  if (p.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int k = t.lane + i * t.step;
      if (k < packs) residual[i] = load_streaming<width>(p.residual + base + k * int64_t{width});
    }
  }
  if constexpr (kEarly) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int k = t.lane + i * t.step;
      if (k >= packs) continue;
      load_affine<T>(p.weight, p.bias, p.config.weight_offset, channels, k * int64_t{width},
                     weight[i], bias[i]);
    }
  }
  if (p.config.prologue) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int k = t.lane + i * t.step;
      if (k >= packs) continue;
      const int64_t index = base + k * int64_t{width};
      x[i] = add_dropped(x[i], residual[i], drop, index);
      store(p.sum + index, x[i]);
    }
  }

  A mean = 0;
  if (centered) {
    A sum[1] = {0};
#pragma unroll
    for (int i = 0; i < items; ++i) {
#pragma unroll
      for (int e = 0; e < width; ++e) sum[0] += widen(x[i].v[e]);
    }
    warp_sum(sum, shape.lanes);
    mean = sum[0] / static_cast<A>(size);
  }
  A squares[1] = {0};
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (t.lane + i * t.step < packs) {
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const A d = widen(x[i].v[e]) - mean;
        squares[0] += d * d;
      }
    }
  }
  warp_sum(squares, shape.lanes);
  const A var = squares[0] / static_cast<A>(size);
  if (t.first && packs > 0) {
    if (centered) store(p.mean + t.row, mean);
    store(p.var + t.row, var);
  }
  const A rstd = A(1) / sqrt(var + static_cast<A>(p.config.eps));

#pragma unroll
  for (int i = 0; i < items; ++i) {
    const int k = t.lane + i * t.step;
    if (k >= packs) continue;
    const int64_t index = base + k * int64_t{width};
    const int slot = kEarly ? i : 0;
    if constexpr (!kEarly) {
      load_affine<T>(p.weight, p.bias, p.config.weight_offset, channels, k * int64_t{width},
                     weight[slot], bias[slot]);
    }
    store(p.y + index, normalize_pack(p, x[i], mean, rstd, weight[slot], bias[slot],
                                      p.residual != nullptr, residual[i], drop, index));
  }
}

// Rows of a block or a cluster, in shared memory, where each thread copies its own packs and keeps
// them.
template <typename T, int width>
__global__ __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 1 : 2) void row_norm_fwd_staged_kernel(
    NormForward<T> p, RowShape shape) {
  using A = Accumulate<T>;
  const int64_t size = p.config.view.reduce_inner;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  // Packs of this thread follow each other at the distance of a block: no bank conflicts.
  T* stage = reinterpret_cast<T*>(scratch + kRowScratch) + threadIdx.x * width;
  const int distance = static_cast<int>(blockDim.x) * width;
  if (shape.cluster > 1) cluster_arrive();
  const RowThread t = RowThread::of(p.config.view.statistics(), shape);
  const int64_t base = t.row * size;
  const int packs = static_cast<int>(size / width);
  const int items = t.lane < packs ? (packs - t.lane + t.step - 1) / t.step : 0;
  T* residuals = stage + (packs + t.step - 1) / t.step * distance;
  const bool centered = p.config.statistic == Statistic::MeanVar;
  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  const Channels channels = Channels::of_row(p.config.view, t.row);
  const int64_t first = base + int64_t{t.lane} * width, stride = int64_t{t.step} * width;

#pragma unroll 4
  for (int i = 0; i < items; ++i) {
    fetch_async<width>(stage + i * distance, p.x + first + i * stride);
  }
  if (p.residual != nullptr) {
#pragma unroll 4
    for (int i = 0; i < items; ++i) {
      fetch_async<width>(residuals + i * distance, p.residual + first + i * stride);
    }
  }
  copy_async_commit();
  if (shape.cluster > 1) cluster_wait();
  copy_async_wait<0>();

  A sum[1] = {0};
  if (centered || p.config.prologue) {
#pragma unroll 2
    for (int i = 0; i < items; ++i) {
      Pack<T, width> x = shared_load<width>(stage + i * distance);
      if (p.config.prologue) {
        const int64_t index = first + i * stride;
        x = add_dropped(x, shared_load<width>(residuals + i * distance), drop, index);
        store(p.sum + index, x);
        shared_store(stage + i * distance, x);
      }
#pragma unroll
      for (int e = 0; e < width; ++e) sum[0] += widen(x.v[e]);
    }
  }
  A mean = 0;
  if (centered) {
    row_sum(sum, shape, scratch);
    mean = sum[0] / static_cast<A>(size);
  }
  A squares[1] = {0};
#pragma unroll 4
  for (int i = 0; i < items; ++i) {
    const Pack<T, width> x = shared_load<width>(stage + i * distance);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const A d = widen(x.v[e]) - mean;
      squares[0] += d * d;
    }
  }
  row_sum(squares, shape, scratch + kMaxWarps + kMaxCluster);
  const A var = squares[0] / static_cast<A>(size);
  if (t.first) {
    if (centered) store(p.mean + t.row, mean);
    store(p.var + t.row, var);
  }
  const A rstd = A(1) / sqrt(var + static_cast<A>(p.config.eps));
  const bool add = p.residual != nullptr && !p.config.prologue;
#pragma unroll 2
  for (int i = 0; i < items; ++i) {
    const int64_t index = first + i * stride;
    A weight[width], bias[width];
    load_affine<T>(p.weight, p.bias, p.config.weight_offset, channels, index - base, weight, bias);
    Pack<T, width> residual{};
    if (add) residual = shared_load<width>(residuals + i * distance);
    store(p.y + index, normalize_pack(p, shared_load<width>(stage + i * distance), mean, rstd,
                                      weight, bias, add, residual, drop, index));
  }
}

// Rows of any length; the row's blocks walk over it in chunks of kRowItems packs per thread.
template <typename T, int width>
__global__ __launch_bounds__(kRowThreads, 1) void row_norm_fwd_streaming_kernel(NormForward<T> p,
                                                                                RowShape shape) {
  using A = Accumulate<T>;
  constexpr int items = kRowItems;
  const int64_t size = p.config.view.reduce_inner, packs = size / width;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  if (shape.cluster > 1) cluster_arrive();
  const RowThread t = RowThread::of(p.config.view.statistics(), shape);
  const int64_t base = t.row * size;
  const bool centered = p.config.statistic == Statistic::MeanVar;
  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  const Channels channels = Channels::of_row(p.config.view, t.row);
  if (shape.cluster > 1) cluster_wait();

  A mean = 0;
  Moments<A> moments;
  for (int64_t first = t.lane; first < packs; first += int64_t{items} * t.step) {
    Pack<T, width> x[items];
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int64_t k = first + int64_t{i} * t.step;
      x[i] = Pack<T, width>{};
      if (k < packs) x[i] = load<width>(p.x + base + k * width);
    }
    if (p.config.prologue) {
#pragma unroll
      for (int i = 0; i < items; ++i) {
        const int64_t k = first + int64_t{i} * t.step;
        if (k >= packs) continue;
        const int64_t index = base + k * width;
        x[i] = add_dropped(x[i], load_streaming<width>(p.residual + index), drop, index);
        store(p.sum + index, x[i]);
      }
    }
    const int64_t there = (packs - first + t.step - 1) / t.step;
    Moments<A> chunk;
    chunk.count = static_cast<A>((there < items ? there : items) * width);
    if (centered) {
#pragma unroll
      for (int i = 0; i < items; ++i) {
#pragma unroll
        for (int e = 0; e < width; ++e) chunk.mean += widen(x[i].v[e]);
      }
      chunk.mean /= chunk.count;
    }
#pragma unroll
    for (int i = 0; i < items; ++i) {
      if (first + int64_t{i} * t.step < packs) {
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const A d = widen(x[i].v[e]) - chunk.mean;
          chunk.m2 += d * d;
        }
      }
    }
    moments.merge(chunk);
  }
  // sum over threads of m2 + count (mean_thread - mean)^2, the mean being the merged one.
  if (centered) {
    A sum[1] = {moments.mean * moments.count};
    row_sum(sum, shape, scratch);
    mean = sum[0] / static_cast<A>(size);
  }
  const A delta = moments.mean - mean;
  A squares[1] = {moments.m2 + moments.count * delta * delta};
  row_sum(squares, shape, scratch + kMaxWarps + kMaxCluster);
  const A var = squares[0] / static_cast<A>(size);
  if (t.first) {
    if (centered) store(p.mean + t.row, mean);
    store(p.var + t.row, var);
  }
  const A rstd = A(1) / sqrt(var + static_cast<A>(p.config.eps));

  for (int64_t k = t.lane; k < packs; k += t.step) {
    const int64_t index = base + k * width;
    A weight[width], bias[width];
    load_affine<T>(p.weight, p.bias, p.config.weight_offset, channels, k * width, weight, bias);
    Pack<T, width> residual{};
    const bool add = p.residual != nullptr && !p.config.prologue;
    if (add) residual = load_streaming<width>(p.residual + index);
    // The sum was stored by this launch, by this very thread.
    const Pack<T, width> x = p.config.prologue ? load_coherent<width>(p.sum + index)
                                               : load_streaming<width>(p.x + index);
    store(p.y + index, normalize_pack(p, x, mean, rstd, weight, bias, add, residual, drop, index));
  }
}

// The launch of a forward pass: by row length, 16-byte width and what the device has.
// launch(name, LaunchShape, kernel, arguments...) starts it.
template <int width, typename T, typename Launch>
void row_norm_fwd_of_width(const NormForward<T>& p, const DeviceLimits& device, Launch&& launch) {
  constexpr bool kPacks = width > 1;
  constexpr int kShort = kPacks ? 1 : kShortItems;
  constexpr size_t kScratchBytes = kRowScratch * sizeof(Accumulate<T>);
  const int64_t rows = p.config.view.statistics();
  const int64_t packs = p.config.view.reduce_inner / width;
  const unsigned widest = device.clusters ? kRowCluster : 1;

  if (packs <= 32 * kShort) {
    const int lanes = lanes_for((packs + kShort - 1) / kShort);
    launch("row_norm_fwd, part of a warp", launch_of_warps(rows, lanes),
           row_norm_fwd_kernel<T, width, kShort>, p, RowShape{lanes, 1});
    return;
  }
  if constexpr (kPacks) {
    if (packs <= 32 * kRowItems) {
      launch("row_norm_fwd, warp", launch_of_warps(rows, 32),
             row_norm_fwd_kernel<T, width, kRowItems>, p, RowShape{32, 1});
      return;
    }
  }
  // A block's part of the row should leave room for more blocks on the multiprocessor.
  constexpr int64_t kComfortable = 32 * 1024 / static_cast<int64_t>(sizeof(T) * width);
  unsigned cluster = 1;
  while (packs > cluster * kComfortable && cluster < widest) cluster *= 2;
  const int64_t per_block = (packs + cluster - 1) / cluster;
  const unsigned threads =
      std::min<unsigned>(kRowThreads, std::max(64u, threads_for(per_block, 8)));
  const size_t tensors = p.residual != nullptr ? 2 : 1;
  const size_t shared = kScratchBytes + static_cast<size_t>((per_block + threads - 1) / threads) *
                                            threads * tensors * sizeof(T) * width;
  const RowShape shape{static_cast<int>(threads), static_cast<int>(cluster)};
  const unsigned grid = static_cast<unsigned>(rows) * cluster;
  if (shared <= device.max_shared) {
    launch(cluster > 1 ? "row_norm_fwd, cluster" : "row_norm_fwd, block",
           LaunchShape{grid, threads, shared, cluster}, row_norm_fwd_staged_kernel<T, width>, p,
           shape);
  } else {
    launch("row_norm_fwd, streaming", LaunchShape{grid, threads, kScratchBytes, cluster},
           row_norm_fwd_streaming_kernel<T, width>, p, shape);
  }
}

}  // namespace fastnorm::cuda
