// Merges of the column geometry: the partial sums of a segment, which lie in as many pieces as it
// has chunks and tiles, are shared out to the rows of threads of a block.
#pragma once

#include "cuda/column_tiling.cuh"

namespace fastnorm::cuda {

// k sums over the `rows` rows of threads of a block; valid in every thread. Scratch: k values per
// thread. Ends with a barrier before the result is read, so scratch must not be used again.
template <int k, typename A>
FASTNORM_DEVICE void sum_over_rows(A (&v)[k], int rows, A* scratch) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int columns = threads / rows;
#pragma unroll
  for (int i = 0; i < k; ++i) shared_store(scratch + i * threads + thread, v[i]);
  __syncthreads();
  for (int half = rows / 2; half > 0; half /= 2) {
    if (thread < half * columns) {
#pragma unroll
      for (int i = 0; i < k; ++i) {
        A* own = scratch + i * threads + thread;
        shared_store(own, shared_load(own) + shared_load(own + half * columns));
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < k; ++i) v[i] = shared_load(scratch + i * threads + thread % columns);
}

// Threads that share the pieces of a segment in the kernels that merge them.
inline int merge_rows(const Pieces& pieces) {
  const int64_t touched = pieces.folded ? 1 : ceil_div(pieces.size, pieces.tile);
  const int64_t most = pieces.chunks * touched;
  // Few segments of a sample leave most threads of a block idle otherwise.
  const int widest = pieces.segments < kMergeThreads / 32 ? kMergeThreads : 32;
  int rows = 1;
  while (rows < widest && rows < most) rows *= 2;
  return rows;
}

inline unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

// Launches a kernel of the merge over `segments` segments.
template <typename Launch, typename Kernel, typename P>
void launch_merge(Launch& launch, const char* name, Kernel kernel, const P& p, const Pieces& pieces,
                  int64_t segments, size_t value_size) {
  const int rows = merge_rows(pieces);
  launch(name,
         LaunchShape{blocks(ceil_div(segments, kMergeThreads / rows)), kMergeThreads,
                     2 * kMergeThreads * value_size},
         kernel, p, pieces, rows);
}

}  // namespace fastnorm::cuda
