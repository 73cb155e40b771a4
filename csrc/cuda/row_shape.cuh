// How rows of contiguous elements are shared out to threads: what the row norms and the
// cross-entropy have in common.
#pragma once

#include "cuda/norm_cuda.h"
#include "cuda/reduce.cuh"

namespace fastnorm::cuda {

// How a row is shared out. Threads of a row: `lanes` in each of `cluster` blocks; below 32 lanes a
// block holds several rows.
struct RowShape {
  int lanes;
  int cluster;
};

inline constexpr int kSmallThreads = 128;  // of a block whose rows have a warp or less
inline constexpr int kRowThreads = 512;    // the most a row gets in one block
inline constexpr int kRowCluster = 8;
inline constexpr int kRowItems = 4;    // packs per thread in registers, or per step of a loop
inline constexpr int kShortItems = 4;  // elements per thread of short rows without packs

// Two sums in a row need scratch of their own.
inline constexpr int kRowScratch = 2 * (kMaxWarps + kMaxCluster);

// Over the threads of a row; valid in all of them.
template <typename Op, int k, typename A>
FASTNORM_DEVICE void row_reduce(A (&v)[k], const RowShape& shape, A* scratch) {
  if (shape.lanes <= 32) {
    warp_reduce<Op>(v, shape.lanes);
  } else if (shape.cluster == 1) {
    block_reduce<Op>(v, scratch);
  } else {
    cluster_reduce<Op>(v, scratch);
  }
}
template <int k, typename A>
FASTNORM_DEVICE void row_sum(A (&v)[k], const RowShape& shape, A* scratch) {
  row_reduce<Sum>(v, shape, scratch);
}

// This thread's row and its first pack in it.
struct RowThread {
  int64_t row, rows;
  int lane, step;  // packs lane, lane + step, lane + 2 step, ... of the row
  bool first;      // the thread that stores the row's statistics

  static FASTNORM_DEVICE RowThread of(int64_t rows, const RowShape& shape) {
    RowThread t;
    t.rows = rows;
    const int thread = static_cast<int>(threadIdx.x);
    if (shape.lanes < 32) {
      const int rows_per_block = static_cast<int>(blockDim.x) / shape.lanes;
      t.row = static_cast<int64_t>(blockIdx.x) * rows_per_block + thread / shape.lanes;
      t.lane = thread % shape.lanes;
      t.step = shape.lanes;
    } else if (shape.lanes == 32) {
      t.row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + thread / 32;
      t.lane = thread % 32;
      t.step = 32;
    } else {
      t.row = blockIdx.x / shape.cluster;
      t.lane = (shape.cluster == 1 ? 0 : cluster_rank() * shape.lanes) + thread;
      t.step = shape.lanes * shape.cluster;
    }
    t.first = t.lane == 0;
    return t;
  }
};

// `count` elements from `index` on, of tensors that are aligned to 16 bytes; element j is at
// stage[skew + j].
template <typename T>
struct Run {
  static constexpr int n = kPackSize<T>;
  int64_t index;
  int count, skew, head, packs;  // elements before the first pack; packs

  static FASTNORM_DEVICE Run of(int64_t index, int count) {
    const int skew = static_cast<int>(index % n), gap = (n - skew) % n;
    const int head = gap < count ? gap : count;
    return {index, count, skew, head, (count - head) / n};
  }
  // Elements of a stage that holds `count`.
  static FASTNORM_HD int capacity(int count) { return (count + 2 * n - 2) / n * n; }

  template <typename Single, typename Whole>
  FASTNORM_DEVICE void for_each(Single&& single, Whole&& whole) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (thread < head) single(thread);
    for (int k = thread; k < packs; k += threads) whole(head + k * n);
    const int tail = head + packs * n + thread;
    if (tail < count) single(tail);
  }
  // Visible after copy_async_wait and a barrier.
  FASTNORM_DEVICE void fetch(const T* source, T* stage) const {
    for_each([&](int j) { fetch_async<1>(stage + skew + j, source + index + j); },
             [&](int j) { copy_async<n>(stage + skew + j, source + index + j); });
  }
  // After a barrier.
  FASTNORM_DEVICE void put(T* target, const T* stage) const {
    for_each([&](int j) { store(target + index + j, shared_load(stage + skew + j)); },
             [&](int j) { store(target + index + j, shared_load<n>(stage + skew + j)); });
  }
};

// Lanes of a row of `packs` packs in a warp: the next power of two.
inline int lanes_for(int64_t packs) {
  int lanes = 1;
  while (lanes < packs && lanes < 32) lanes *= 2;
  return lanes;
}

// Threads of a block that holds `packs` packs, `items` per thread: whole warps.
inline unsigned threads_for(int64_t packs, int items) {
  return static_cast<unsigned>((packs + 32 * items - 1) / (32 * items) * 32);
}

// Blocks of one warp per row or less.
inline LaunchShape launch_of_warps(int64_t rows, int lanes) {
  const int64_t per_block = kSmallThreads / lanes;
  return {static_cast<unsigned>((rows + per_block - 1) / per_block), kSmallThreads};
}

}  // namespace fastnorm::cuda
