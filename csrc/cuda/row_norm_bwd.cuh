// Row geometry, backward. With xhat = (x - mean) * rstd, the gradient h that reaches the affine map
// and g = h * (weight + offset):
//
//   h = activation'(xhat * w + bias + residual) * dropout(dy)       (prologue: h = dy)
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat))               (MeanSquare: no mean(g))
//   dresidual = h;  dweight = sum over rows of h * xhat;  dbias = sum over rows of h
//   prologue: ds = dx + dsum;  dresidual = ds;  dx = dropout(ds)
//
// Blocks are persistent: block b of G takes rows b, b + G, ..., and keeps its dweight and dbias in
// registers, the columns of a thread being the same in every row. While a row is reduced the next
// ones are on their way: each thread copies its own packs to its own place in shared memory, so no
// barrier is needed, and reads them from there in both passes; g is worked out twice, which keeps
// the registers for the sums. At the end every block stores one partial row, and a second kernel
// adds the partial rows in a fixed order. G depends on N and the number of rows, so dweight does;
// dx doesn't. Bytes: 3 E b (with dsum 4 E b), and 16 G N for the partial rows, which stay in L2.
// The last block to finish could add them without a second kernel, but alone: at N = 8192 one
// multiprocessor would read the 8.7 MB that now all share.
//
// A multiprocessor needs about 30 KB under way to have its share of 4 TB/s at a microsecond of
// latency. Its blocks, which have the 512 threads that registers allow, reduce up to 8192 columns
// at a time, 32 KB of bfloat16 x and dy; with one more stage half of that would be under way on
// average, so there are four. The statistics of a row travel in its stage as well.
//
// Rows that no cluster can hold are read twice, and add to their block's partial row in memory.
// Where the channel isn't the column (group and instance norm) a kernel of its own adds up dweight
// and dbias, for 2 E b more: the sums of a row would need a scatter by channel.
#pragma once

#include "cuda/row_norm_grads.cuh"

namespace fastnorm::cuda {

inline constexpr int kBackwardThreads = 512;
inline constexpr size_t kStageBytes = 160 * 1024;  // of four stages, on one multiprocessor

// Packs of a row that a thread owns: its elements have two registers each (dweight, dbias), twice
// as many for double. Without packs the code of an element isn't shared with its neighbours, so
// there are fewer.
template <typename T, int width>
inline constexpr int kBackwardItems =
    width == 1 ? (sizeof(T) == 8 ? 4 : 8) : (sizeof(T) == 8 ? 4 : 16) / width;

struct BackwardShape {
  RowShape row;
  int stages;      // rows in shared memory per block, this one and the next: 1, 2 or 4
  int tensors;     // of a stage: x and dy, and dsum or residual
  int64_t groups;  // G: partial rows
};

// Stores dx of one pack, and with the prologue dresidual; `extra` is dsum.
template <typename T, int n>
FASTNORM_DEVICE void store_gradients(const NormBackward<T>& p, const Accumulate<T> (&xhat)[n],
                                     const Accumulate<T> (&g)[n], const Pack<T, n>& extra,
                                     Accumulate<T> mean_g, Accumulate<T> mean_gx,
                                     Accumulate<T> rstd, const Drop<Accumulate<T>>& drop,
                                     int64_t index) {
  using A = Accumulate<T>;
  A dx[n];
#pragma unroll
  for (int e = 0; e < n; ++e) dx[e] = rstd * (g[e] - mean_g - xhat[e] * mean_gx);
  if (p.config.prologue) {
    if (p.dsum != nullptr) {
      A ds[n];
      widen(extra, ds);
#pragma unroll
      for (int e = 0; e < n; ++e) dx[e] += ds[e];
    }
    if (p.dresidual != nullptr) store(p.dresidual + index, narrow<T>(dx));
    if (p.dx == nullptr) return;
    drop.apply(dx, index);
  }
  if (p.dx != nullptr) store(p.dx + index, narrow<T>(dx));
}

// The thread's packs of x, dy and a third tensor in shared memory, for every stage.
template <typename T, int width, int items>
struct Staging {
  T* mine;
  int distance;  // elements between two packs of a thread
  int tensors;

  FASTNORM_DEVICE T* at(int stage, int tensor, int i) const {
    return mine + ((stage * tensors + tensor) * items + i) * distance;
  }
};

// Until the oldest of `stages` groups of copies is there.
FASTNORM_DEVICE void wait_for_stage(int stages) {
  if (stages == 4) {
    copy_async_wait<3>();
  } else if (stages == 2) {
    copy_async_wait<1>();
  } else {
    copy_async_wait<0>();
  }
}

template <typename T, int width>
__global__ __launch_bounds__(kBackwardThreads, 1) void row_norm_bwd_kernel(NormBackward<T> p,
                                                                           BackwardShape shape) {
  using A = Accumulate<T>;
  constexpr int items = kBackwardItems<T, width>;
  const int64_t size = p.config.view.reduce_inner;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  if (shape.row.cluster > 1) cluster_arrive();
  // Mean and variance, each thread's own: [stage][which][thread].
  A* statistics = scratch + 2 * kRowScratch + threadIdx.x;
  const int threads = static_cast<int>(blockDim.x);
  const Staging<T, width, items> staging{
      reinterpret_cast<T*>(scratch + 2 * kRowScratch + 2 * shape.stages * threads) +
          threadIdx.x * width,
      threads * width, shape.tensors};
  RowThread t = RowThread::of(p.config.view.statistics(), shape.row);
  const int rows_per_block = static_cast<int>(blockDim.x) / shape.row.lanes;
  const int64_t jump = shape.groups * rows_per_block;
  const int packs = static_cast<int>(size / width);
  const bool centered = p.config.statistic == Statistic::MeanVar;
  const bool by_column = p.config.view.inner == 1 && p.config.view.kept == 1;
  const bool sums = by_column && (p.dweight != nullptr || p.dbias != nullptr);
  const T* third = p.config.prologue ? p.dsum : p.residual;

  const auto fetch_row = [&](int64_t row, int stage) {
    if (row >= t.rows) return;
    if (centered) copy_async<1>(statistics + 2 * stage * threads, p.mean + row);
    copy_async<1>(statistics + (2 * stage + 1) * threads, p.var + row);
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int k = t.lane + i * t.step;
      if (k >= packs) continue;
      const int64_t index = row * size + k * int64_t{width};
      fetch_async<width>(staging.at(stage, 0, i), p.x + index);
      if (p.dy != nullptr) fetch_async<width>(staging.at(stage, 1, i), p.dy + index);
      if (third != nullptr) fetch_async<width>(staging.at(stage, 2, i), third + index);
    }
  };

  A dweight[items][width], dbias[items][width];
#pragma unroll
  for (int i = 0; i < items; ++i) {
#pragma unroll
    for (int e = 0; e < width; ++e) dweight[i][e] = dbias[i][e] = A(0);
  }
  const int ahead = shape.stages - 1;
  for (int stage = 0; stage < ahead; ++stage) {
    fetch_row(t.row + stage * jump, stage);
    copy_async_commit();
  }
  if (shape.row.cluster > 1) cluster_wait();

  // All rows of a block take part in its reductions until the last of them is done.
  const int64_t in_block = rows_per_block == 1 ? 0 : threadIdx.x / shape.row.lanes;
  for (int turn = 0; t.row - in_block < t.rows; t.row += jump, ++turn) {
    fetch_row(t.row + ahead * jump, (turn + ahead) & ahead);
    copy_async_commit();
    const int stage = turn & ahead, here = t.row < t.rows ? packs : 0;
    wait_for_stage(shape.stages);
    A mean = 0, rstd = 0;
    if (here > 0) {
      if (centered) mean = shared_load(statistics + 2 * stage * threads);
      const A var = shared_load(statistics + (2 * stage + 1) * threads);
      rstd = A(1) / sqrt(var + static_cast<A>(p.config.eps));
    }
    const Channels channels = Channels::of_row(p.config.view, t.row);
    const auto gradient = [&](int i, A(&weight)[width], A(&xhat)[width], A(&h)[width]) {
      const int64_t column = (t.lane + i * t.step) * int64_t{width};
      Pack<T, width> dy{}, residual{};
      if (p.dy != nullptr) dy = shared_load<width>(staging.at(stage, 1, i));
      if (p.residual != nullptr) residual = shared_load<width>(staging.at(stage, 2, i));
      load_weight<T>(p, channels, column, weight);
      const Drop<A> drop = Drop<A>::of(p.config.dropout);
      gradient_of_pack<true>(p, shared_load<width>(staging.at(stage, 0, i)), dy, residual, weight,
                             channels, column, mean, rstd, drop, t.row * size + column, xhat, h);
    };

    A sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int k = t.lane + i * t.step;
      if (k >= here) continue;
      A weight[width], xhat[width], h[width];
      gradient(i, weight, xhat, h);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const A g = h[e] * weight[e];
        sum[0] += g;
        sum[1] += g * xhat[e];
        dweight[i][e] += h[e] * xhat[e];
        dbias[i][e] += h[e];
      }
      if (!p.config.prologue && p.dresidual != nullptr) {
        store(p.dresidual + t.row * size + k * int64_t{width}, narrow<T>(h));
      }
    }
    row_sum(sum, shape.row, scratch + turn % 2 * kRowScratch);
    const A mean_g = centered ? sum[0] / static_cast<A>(size) : A(0);
    const A mean_gx = sum[1] / static_cast<A>(size);
    if (p.dx == nullptr && (!p.config.prologue || p.dresidual == nullptr)) continue;
#pragma unroll 1
    for (int i = 0; i < items; ++i) {
      const int k = t.lane + i * t.step;
      if (k >= here) continue;
      A weight[width], xhat[width], h[width];
      gradient(i, weight, xhat, h);
#pragma unroll
      for (int e = 0; e < width; ++e) h[e] *= weight[e];
      Pack<T, width> extra{};
      const Drop<A> drop = Drop<A>::of(p.config.dropout);
      if (p.dsum != nullptr) extra = shared_load<width>(staging.at(stage, 2, i));
      store_gradients(p, xhat, h, extra, mean_g, mean_gx, rstd, drop,
                      t.row * size + k * int64_t{width});
    }
  }
  copy_async_wait<0>();
  if (!sums) return;

  // One partial row per block: [dweight, dbias][group][column].
  A* partial = reinterpret_cast<A*>(p.workspace);
  const int64_t group = blockIdx.x / shape.row.cluster;
  A* here[2] = {partial + group * size, partial + (shape.groups + group) * size};
  if (rows_per_block == 1) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int k = t.lane + i * t.step;
      if (k >= packs) continue;
      store_values(here[0] + k * int64_t{width}, dweight[i]);
      store_values(here[1] + k * int64_t{width}, dbias[i]);
    }
    return;
  }
  // The rows of the block first, in their order.
  const int columns = static_cast<int>(size);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
    A* own = scratch + in_block * columns;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int k = t.lane + i * t.step;
      if (k >= packs) continue;
      shared_store_values(own + k * width, which == 0 ? dweight[i] : dbias[i]);
    }
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < columns; c += static_cast<int>(blockDim.x)) {
      A total = 0;
      for (int r = 0; r < rows_per_block; ++r) total += shared_load(scratch + r * columns + c);
      store(here[which] + c, total);
    }
  }
}

// Rows of any length: two reads, and the block's partial row in memory.
template <typename T, int width>
__global__ __launch_bounds__(kBackwardThreads,
                             1) void row_norm_bwd_streaming_kernel(NormBackward<T> p,
                                                                   BackwardShape shape) {
  using A = Accumulate<T>;
  const int64_t size = p.config.view.reduce_inner, packs = size / width;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  if (shape.row.cluster > 1) cluster_arrive();
  RowThread t = RowThread::of(p.config.view.statistics(), shape.row);
  const bool centered = p.config.statistic == Statistic::MeanVar;
  const bool by_column = p.config.view.inner == 1 && p.config.view.kept == 1;
  const bool sums = by_column && (p.dweight != nullptr || p.dbias != nullptr);
  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  A* partial = reinterpret_cast<A*>(p.workspace);
  const int64_t group = t.row;
  if (shape.row.cluster > 1) cluster_wait();

  int turn = 0;
  for (; t.row < t.rows; t.row += shape.groups, turn ^= 1) {
    A mean, rstd;
    load_statistics(p, t.row, mean, rstd);
    const Channels channels = Channels::of_row(p.config.view, t.row);
    const auto gradient = [&](int64_t k, A(&weight)[width], A(&xhat)[width], A(&h)[width]) {
      const int64_t column = k * width, index = t.row * size + column;
      load_weight<T>(p, channels, column, weight);
      Pack<T, width> dy{}, residual{};
      if (p.dy != nullptr) dy = load<width>(p.dy + index);
      if (p.residual != nullptr) residual = load<width>(p.residual + index);
      gradient_of_pack<false>(p, load<width>(p.x + index), dy, residual, weight, channels, column,
                              mean, rstd, drop, index, xhat, h);
    };
    A sum[2] = {0, 0};
    for (int64_t k = t.lane; k < packs; k += t.step) {
      A weight[width], xhat[width], h[width], dweight[width], dbias[width];
      gradient(k, weight, xhat, h);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        sum[0] += h[e] * weight[e];
        sum[1] += h[e] * weight[e] * xhat[e];
      }
      if (!p.config.prologue && p.dresidual != nullptr) {
        store(p.dresidual + t.row * size + k * width, narrow<T>(h));
      }
      if (!sums) continue;
      A* slot[2] = {partial + group * size + k * width,
                    partial + (shape.groups + group) * size + k * width};
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const bool begun = t.row != group;
        dweight[e] = (begun ? load_coherent<1>(slot[0] + e).v[0] : A(0)) + h[e] * xhat[e];
        dbias[e] = (begun ? load_coherent<1>(slot[1] + e).v[0] : A(0)) + h[e];
      }
      store_values(slot[0], dweight);
      store_values(slot[1], dbias);
    }
    row_sum(sum, shape.row, scratch + turn * kRowScratch);
    const A mean_g = centered ? sum[0] / static_cast<A>(size) : A(0);
    const A mean_gx = sum[1] / static_cast<A>(size);
    if (p.dx == nullptr && (!p.config.prologue || p.dresidual == nullptr)) continue;
    for (int64_t k = t.lane; k < packs; k += t.step) {
      A weight[width], xhat[width], h[width];
      gradient(k, weight, xhat, h);
      const int64_t index = t.row * size + k * width;
      Pack<T, width> extra{};
      if (p.dsum != nullptr) extra = load_streaming<width>(p.dsum + index);
#pragma unroll
      for (int e = 0; e < width; ++e) h[e] *= weight[e];
      store_gradients(p, xhat, h, extra, mean_g, mean_gx, rstd, drop, index);
    }
  }
}

// Most partial rows of a length: from as many blocks as have 512 threads on a multiprocessor.
inline int64_t partial_rows(int64_t size) {
  const int64_t threads = size <= 512 ? kSmallThreads : (size + 511) / 512 * 32;
  return kProcessors * std::max<int64_t>(1, kBackwardThreads / threads);
}

// G, for blocks of `per_block` rows. Eight rows for each partial row, which costs bytes as well, as
// long as every multiprocessor has a block. Clusters of four and eight share the multiprocessors of
// a part of the chip, where not all of 132 fit.
inline int64_t backward_groups(int64_t size, int64_t rows, int64_t per_block, int64_t cluster) {
  const int64_t most = cluster >= 4 ? kProcessors / 8 * 8 : partial_rows(size);
  const int64_t wanted = std::min(most, std::max<int64_t>(kProcessors, rows / 8));
  return std::min((rows + per_block - 1) / per_block, std::max<int64_t>(1, wanted / cluster));
}

inline bool parameters_by_column(const View& view) { return view.inner == 1 && view.kept == 1; }

inline size_t row_norm_bwd_workspace_bytes(const View& view, size_t element_size) {
  const size_t value = element_size == 8 ? 8 : 4;
  const int64_t rows = parameters_by_column(view)
                           ? std::min(partial_rows(view.reduce_inner), view.statistics())
                           : channel_chunks(view);
  return 2 * static_cast<size_t>(rows * view.channels()) * value;
}

template <int width, typename T, typename Launch>
BackwardShape row_norm_bwd_of_width(const NormBackward<T>& p, const DeviceLimits& device,
                                    Launch&& launch) {
  using A = Accumulate<T>;
  constexpr int kItems = kBackwardItems<T, width>;
  constexpr int64_t kBlock = int64_t{kBackwardThreads} * kItems;
  const int64_t rows = p.config.view.statistics(), size = p.config.view.reduce_inner;
  const int64_t packs = size / width;
  const int64_t widest = device.clusters ? kRowCluster : 1;

  unsigned threads = kSmallThreads, cluster = 1;
  int lanes = lanes_for((packs + kItems - 1) / kItems);
  if (packs > 32 * kItems) {
    while (packs > cluster * kBlock && cluster < widest) cluster *= 2;
    threads =
        std::min<unsigned>(kBackwardThreads, threads_for((packs + cluster - 1) / cluster, kItems));
    lanes = static_cast<int>(threads);
  }
  const int64_t per_block = threads / lanes;
  const bool third = (p.config.prologue ? p.dsum : p.residual) != nullptr;
  BackwardShape shape{{lanes, static_cast<int>(cluster)}, 4, third ? 3 : 2, 0};
  shape.groups = backward_groups(size, rows, per_block, cluster);
  const unsigned grid = static_cast<unsigned>(shape.groups) * cluster;
  const size_t scratch = 2 * kRowScratch * sizeof(A);
  if (packs > widest * kBlock) {
    launch("row_norm_bwd, streaming", LaunchShape{grid, threads, scratch, cluster},
           row_norm_bwd_streaming_kernel<T, width>, p, shape);
    return shape;
  }
  const size_t stage =
      threads * (size_t(shape.tensors) * kItems * width * sizeof(T) + 2 * sizeof(A));
  const size_t blocks = (shape.groups * cluster + kProcessors - 1) / kProcessors;
  const bool four = blocks * 4 * stage <= kStageBytes && scratch + 4 * stage <= device.max_shared;
  if (!four) shape.stages = 2;
  if (scratch + 2 * stage > device.max_shared) shape.stages = 1;
  // The block's own rows of sums take the place of the stages at the end.
  const size_t own_rows = per_block == 1 ? 0 : static_cast<size_t>(per_block * size) * sizeof(A);
  const size_t shared = std::max(scratch + shape.stages * stage, own_rows);
  launch(cluster > 1           ? "row_norm_bwd, cluster"
         : packs > 32 * kItems ? "row_norm_bwd, block"
                               : "row_norm_bwd, warp",
         LaunchShape{grid, threads, shared, cluster}, row_norm_bwd_kernel<T, width>, p, shape);
  return shape;
}

}  // namespace fastnorm::cuda
