// Row geometry, backward, of rows whose length isn't a multiple of 16 bytes: row_norm_bwd.cuh's
// derivation on row_norm_ragged.cuh's copies. A thread owns columns thread, thread + threads, ...
// of the block's part of every row, and their dweight and dbias; gradients take the place of what
// they were made from, and leave shared memory in packs.
#pragma once

#include "cuda/row_norm_bwd.cuh"

namespace fastnorm::cuda {

template <typename T>
__global__ __launch_bounds__(kBackwardThreads,
                             1) void row_norm_bwd_ragged_kernel(NormBackward<T> p,
                                                                BackwardShape shape,
                                                                int per_block) {
  using A = Accumulate<T>;
  constexpr int items = kBackwardItems<T, 1>;
  const int64_t size = p.config.view.reduce_inner, rows = p.config.view.statistics();
  const int cluster = shape.row.cluster;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  T* stages = reinterpret_cast<T*>(scratch + 2 * kRowScratch);
  if (cluster > 1) cluster_arrive();
  const int64_t first = cluster == 1 ? 0 : int64_t{cluster_rank()} * per_block;
  const int64_t left = first < size ? size - first : 0;
  const int count = left < per_block ? static_cast<int>(left) : per_block;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t group = blockIdx.x / cluster;
  const bool centered = p.config.statistic == Statistic::MeanVar, prologue = p.config.prologue;
  const bool by_column = p.config.view.inner == 1 && p.config.view.kept == 1;
  const T* third = prologue ? p.dsum : p.residual;

  const auto at = [&](int stage, int tensor) {
    return stages + (stage * 3 + tensor) * Run<T>::capacity(per_block);
  };
  StagedDrop<A> drop{Drop<A>::of(p.config.dropout),
                     reinterpret_cast<uint8_t*>(at(shape.stages, 0))};
  const auto run_of = [&](int64_t row) { return Run<T>::of(row * size + first, count); };
  const auto fetch_row = [&](int64_t row, int stage) {
    if (row < rows) {
      const Run<T> run = run_of(row);
      run.fetch(p.x, at(stage, 0));
      if (p.dy != nullptr) run.fetch(p.dy, at(stage, 1));
      if (third != nullptr) run.fetch(third, at(stage, 2));
    }
    copy_async_commit();
  };

  A dweight[items], dbias[items];
#pragma unroll
  for (int i = 0; i < items; ++i) dweight[i] = dbias[i] = A(0);
  if (shape.stages == 2) fetch_row(group, 0);
  if (cluster > 1) cluster_wait();

  int turn = 0;
  for (int64_t row = group; row < rows; row += shape.groups, turn ^= 1) {
    const int stage = shape.stages == 2 ? turn : 0;
    if (shape.stages == 2) {
      fetch_row(row + shape.groups, stage ^ 1);
      copy_async_wait<1>();
    } else {
      fetch_row(row, 0);
      copy_async_wait<0>();
    }
    const Run<T> run = run_of(row);
    drop.draw(run.index, count);
    A mean, rstd;
    load_statistics(p, row, mean, rstd);
    const Channels channels = Channels::of_row(p.config.view, row);
    T *x = at(stage, 0) + run.skew, *dy = at(stage, 1) + run.skew, *extra = at(stage, 2) + run.skew;
    __syncthreads();

    A sum[2] = {0, 0}, g[items];
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int j = thread + i * threads;
      if (j >= count) continue;
      Pack<T, 1> gradient{}, residual{};
      if (p.dy != nullptr) gradient = shared_load<1>(dy + j);
      if (p.residual != nullptr) residual = shared_load<1>(extra + j);
      A weight[1], xhat[1], h[1];
      load_weight<T>(p, channels, first + j, weight);
      gradient_of_pack<true>(p, shared_load<1>(x + j), gradient, residual, weight, channels,
                             first + j, mean, rstd, drop, run.index + j, xhat, h);
      g[i] = h[0] * weight[0];
      sum[0] += g[i];
      sum[1] += g[i] * xhat[0];
      dweight[i] += h[0] * xhat[0];
      dbias[i] += h[0];
      if (!prologue && p.dresidual != nullptr) shared_store(extra + j, narrow<T>(h[0]));
    }
    row_sum(sum, shape.row, scratch + turn * kRowScratch);
    const A mean_g = centered ? sum[0] / static_cast<A>(size) : A(0);
    const A mean_gx = sum[1] / static_cast<A>(size);
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int j = thread + i * threads;
      if (j >= count) continue;
      const A xhat = (widen(shared_load(x + j)) - mean) * rstd;
      A dx[1] = {rstd * (g[i] - mean_g - xhat * mean_gx)};
      if (prologue) {
        if (p.dsum != nullptr) dx[0] += widen(shared_load(extra + j));
        if (p.dresidual != nullptr) shared_store(dy + j, narrow<T>(dx[0]));
        drop.apply(dx, run.index + j);
      }
      shared_store(x + j, narrow<T>(dx[0]));
    }
    __syncthreads();
    if (p.dx != nullptr) run.put(p.dx, at(stage, 0));
    if (p.dresidual != nullptr) run.put(p.dresidual, at(stage, prologue ? 1 : 2));
    __syncthreads();  // before this stage is filled again
  }
  copy_async_wait<0>();
  if (!by_column || (p.dweight == nullptr && p.dbias == nullptr)) return;

  // One partial row per block: [dweight, dbias][group][column].
  A* partial = reinterpret_cast<A*>(p.workspace) + group * size + first;
#pragma unroll
  for (int i = 0; i < items; ++i) {
    const int j = thread + i * threads;
    if (j >= count) continue;
    store(partial + j, dweight[i]);
    store(partial + shape.groups * size + j, dbias[i]);
  }
}

// The number of partial rows, or 0: not for rows of less than a warp's packs, nor for those that a
// cluster's registers can't hold.
template <typename T, typename Launch>
int64_t row_norm_bwd_ragged(const NormBackward<T>& p, const DeviceLimits& device, Launch&& launch) {
  constexpr int items = kBackwardItems<T, 1>;
  constexpr int64_t kBlock = int64_t{kBackwardThreads} * items;
  const int64_t rows = p.config.view.statistics(), size = p.config.view.reduce_inner;
  const unsigned widest = device.clusters ? kRowCluster : 1;
  if (size < 32 * kPackSize<T> || size > widest * kBlock ||
      !aligned_to_16({p.x, p.dy, p.dsum, p.residual, p.dx, p.dresidual})) {
    return 0;
  }
  unsigned cluster = 1;
  while (size > cluster * kBlock) cluster *= 2;
  const int per_block = static_cast<int>((size + cluster - 1) / cluster);
  const unsigned threads = threads_for(per_block, items);
  BackwardShape shape{{static_cast<int>(threads), static_cast<int>(cluster)}, 2, 3, 0};
  shape.groups = backward_groups(size, rows, 1, cluster);
  const size_t scratch = 2 * kRowScratch * sizeof(Accumulate<T>);
  const size_t stage = size_t{3} * Run<T>::capacity(per_block) * sizeof(T);
  const size_t kept =
      p.config.dropout.seed != nullptr ? StagedDrop<Accumulate<T>>::size(per_block) : 0;
  if (scratch + 2 * stage + kept > device.max_shared) shape.stages = 1;
  launch("row_norm_bwd, ragged",
         LaunchShape{static_cast<unsigned>(shape.groups) * cluster, threads,
                     scratch + shape.stages * stage + kept, cluster},
         row_norm_bwd_ragged_kernel<T>, p, shape, per_block);
  return shape.groups;
}

template <typename T, typename Launch>
void row_norm_bwd(const NormBackward<T>& p, const DeviceLimits& device, Launch&& launch) {
  using A = Accumulate<T>;
  const View& view = p.config.view;
  constexpr int width = kPackSize<T>;
  const bool packs =
      view.reduce_inner % width == 0 &&
      aligned_to_16({p.x, p.dy, p.dsum, p.residual, p.weight.data, p.bias.data, p.dx, p.dresidual});
  const bool sums = p.dweight != nullptr || p.dbias != nullptr;
  int64_t groups = 0;
  if (view.numel() > 0) {
    groups = packs ? row_norm_bwd_of_width<width>(p, device, launch).groups
                   : row_norm_bwd_ragged(p, device, launch);
    if (groups == 0) groups = row_norm_bwd_of_width<1>(p, device, launch).groups;
  }
  const int64_t channels = view.channels();
  if (!sums || channels == 0) return;
  if (!parameters_by_column(view) && view.numel() > 0) {
    groups = channel_chunks(view);
    launch("channel_gradients",
           LaunchShape{static_cast<unsigned>(channels * groups), kChannelThreads,
                       2 * kMaxWarps * sizeof(A)},
           channel_gradients_kernel<T>, p, groups);
  }
  // Without rows the sums are zero, which this kernel stores as well.
  const int64_t tiles = (channels + kTile - 1) / kTile;
  launch("add_partial_rows",
         LaunchShape{static_cast<unsigned>(2 * tiles), kTile * kTile, kTile * kTile * sizeof(A)},
         add_partial_rows_kernel<T>, p, groups, channels);
}

}  // namespace fastnorm::cuda
