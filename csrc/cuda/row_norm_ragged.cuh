// Row geometry, forward, of rows whose length isn't a multiple of 16 bytes.
//
// Rows begin anywhere, but a block's part of one still is a run of contiguous elements: a head up
// to the next multiple of 16 bytes, whole packs, and a tail. It is copied into shared memory pack
// by pack, to a place with the same distance from a multiple of 16 bytes, and the results leave the
// same way. In between a thread owns columns thread, thread + threads, ..., wherever the row
// begins, so that a row has the same bits in any batch. Dropout's bits are drawn while the copy is
// on its way, one Philox call for 8 elements.
#pragma once

#include "cuda/row_norm.cuh"

namespace fastnorm::cuda {

template <typename T>
__global__ __launch_bounds__(kRowThreads, 2) void row_norm_fwd_ragged_kernel(NormForward<T> p,
                                                                             RowShape shape,
                                                                             int per_block) {
  using A = Accumulate<T>;
  const int64_t size = p.config.view.reduce_inner, row = blockIdx.x / shape.cluster;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  T* stage = reinterpret_cast<T*>(scratch + kRowScratch);
  T* residuals = stage + Run<T>::capacity(per_block);
  if (shape.cluster > 1) cluster_arrive();
  const int64_t first = shape.cluster == 1 ? 0 : int64_t{cluster_rank()} * per_block;
  const int64_t left = first < size ? size - first : 0;
  const int count = left < per_block ? static_cast<int>(left) : per_block;
  const Run<T> run = Run<T>::of(row * size + first, count);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const bool centered = p.config.statistic == Statistic::MeanVar;
  const bool add = p.residual != nullptr && !p.config.prologue;
  T* end = residuals + (p.residual != nullptr ? Run<T>::capacity(per_block) : 0);
  StagedDrop<A> drop{Drop<A>::of(p.config.dropout), reinterpret_cast<uint8_t*>(end)};
  const Channels channels = Channels::of_row(p.config.view, row);

  run.fetch(p.x, stage);
  if (p.residual != nullptr) run.fetch(p.residual, residuals);
  copy_async_commit();
  drop.draw(run.index, run.count);
  copy_async_wait<0>();
  __syncthreads();

  A sum[1] = {0};
  for (int j = thread; j < run.count; j += threads) {
    Pack<T, 1> x = shared_load<1>(stage + run.skew + j);
    if (p.config.prologue) {
      x = add_dropped(x, shared_load<1>(residuals + run.skew + j), drop, run.index + j);
      shared_store(stage + run.skew + j, x);
    }
    sum[0] += widen(x.v[0]);
  }
  if (p.config.prologue) {
    __syncthreads();
    run.put(p.sum, stage);
    __syncthreads();
  }
  if (shape.cluster > 1) cluster_wait();
  A mean = 0;
  if (centered) {
    row_sum(sum, shape, scratch);
    mean = sum[0] / static_cast<A>(size);
  }
  A squares[1] = {0};
  for (int j = thread; j < run.count; j += threads) {
    const A d = widen(shared_load(stage + run.skew + j)) - mean;
    squares[0] += d * d;
  }
  row_sum(squares, shape, scratch + kMaxWarps + kMaxCluster);
  const A var = squares[0] / static_cast<A>(size);
  if (thread == 0 && first == 0) {
    if (centered) store(p.mean + row, mean);
    store(p.var + row, var);
  }
  const A rstd = A(1) / sqrt(var + static_cast<A>(p.config.eps));
#pragma unroll 2
  for (int j = thread; j < run.count; j += threads) {
    A weight[1], bias[1];
    load_affine<T>(p.weight, p.bias, p.config.weight_offset, channels, first + j, weight, bias);
    Pack<T, 1> residual{};
    if (add) residual = shared_load<1>(residuals + run.skew + j);
    T* own = stage + run.skew + j;
    shared_store(own, normalize_pack(p, shared_load<1>(own), mean, rstd, weight, bias, add,
                                     residual, drop, run.index + j));
  }
  __syncthreads();
  run.put(p.y, stage);
}

// Whether the launch took place: not for rows of less than a warp's packs, nor for those that
// shared memory can't hold.
template <typename T, typename Launch>
bool row_norm_fwd_ragged(const NormForward<T>& p, const DeviceLimits& device, Launch&& launch) {
  constexpr int64_t kComfortable = 32 * 1024 / static_cast<int64_t>(sizeof(T));
  const int64_t size = p.config.view.reduce_inner;
  if (size < 32 * kPackSize<T> || !aligned_to_16({p.x, p.residual, p.y, p.sum})) return false;
  const unsigned widest = device.clusters ? kRowCluster : 1;
  unsigned cluster = 1;
  while (size > cluster * kComfortable && cluster < widest) cluster *= 2;
  const int64_t per_block = (size + cluster - 1) / cluster;
  const size_t stages = p.residual != nullptr ? 2 : 1;
  size_t shared =
      kRowScratch * sizeof(Accumulate<T>) + stages * (per_block + 2 * kPackSize<T>)*sizeof(T);
  if (p.config.dropout.seed != nullptr) {
    shared += StagedDrop<Accumulate<T>>::size(static_cast<int>(per_block));
  }
  if (shared > device.max_shared) return false;
  // About two packs to copy per thread.
  const unsigned threads = std::min<unsigned>(
      kRowThreads, std::max(64u, threads_for((per_block + kPackSize<T> - 1) / kPackSize<T>, 2)));
  launch("row_norm_fwd, ragged",
         LaunchShape{static_cast<unsigned>(p.config.view.statistics()) * cluster, threads, shared,
                     cluster},
         row_norm_fwd_ragged_kernel<T>, p,
         RowShape{static_cast<int>(threads), static_cast<int>(cluster)},
         static_cast<int>(per_block));
  return true;
}

template <typename T, typename Launch>
void row_norm_fwd(const NormForward<T>& p, const DeviceLimits& device, Launch&& launch) {
  if (p.config.view.numel() == 0) return;
  constexpr int width = kPackSize<T>;
  const bool packs = p.config.view.reduce_inner % width == 0 &&
                     aligned_to_16({p.x, p.residual, p.weight.data, p.bias.data, p.y, p.sum});
  if (packs) {
    row_norm_fwd_of_width<width>(p, device, launch);
  } else if (!row_norm_fwd_ragged(p, device, launch)) {
    row_norm_fwd_of_width<1>(p, device, launch);
  }
}

}  // namespace fastnorm::cuda
