// Sums (and maxima) over a warp, a block and a cluster, in an order that depends on the shape
// alone.
//
//   function     adds up              scratch (shared, values of A)    result valid in
//   warp_sum     `width` lanes        none                             every lane of the group
//   block_sum    all threads          k * kMaxWarps                    every thread
//   cluster_sum  all threads of all   k * (kMaxWarps + kMaxCluster)    every thread of
//                CTAs                                                  every CTA
//
// All take k sums at once; the *_reduce functions take the operation as well. A warp adds by a
// butterfly (lane, lane ^ width/2, ...); each warp's total is then added by the same butterfly over
// the warps, and the CTAs' totals in rank order. Each call has one barrier between its writes and
// its reads, and none after: two calls in a row must be given different scratch, and a third one
// may reuse the first's.
#pragma once

#include <cooperative_groups.h>

#include <limits>

#include "cuda/pack.cuh"

#if defined(FASTNORM_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define FASTNORM_HAS_CLUSTERS 1
#endif

namespace fastnorm {

inline constexpr int kMaxWarps = 32;
inline constexpr int kMaxCluster = 16;
inline constexpr unsigned kFullWarp = 0xffffffffu;

struct Sum {
  template <typename A>
  static FASTNORM_DEVICE A identity() {
    return A(0);
  }
  template <typename A>
  static FASTNORM_DEVICE A of(A a, A b) {
    return a + b;
  }
};

// NaN is never taken.
struct Max {
  template <typename A>
  static FASTNORM_DEVICE A identity() {
    return -std::numeric_limits<A>::infinity();
  }
  template <typename A>
  static FASTNORM_DEVICE A of(A a, A b) {
    return b > a ? b : a;
  }
};

template <typename Op, int k, typename A>
FASTNORM_DEVICE void warp_reduce(A (&v)[k], int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < k; ++i) v[i] = Op::of(v[i], __shfl_xor_sync(kFullWarp, v[i], offset));
  }
}

template <typename Op, int k, typename A>
FASTNORM_DEVICE void block_reduce(A (&v)[k], A* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  warp_reduce<Op>(v);
  if (warps == 1) return;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < k; ++i) shared_store(scratch + i * kMaxWarps + warp, v[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < k; ++i) {
    v[i] = lane < warps ? shared_load(scratch + i * kMaxWarps + lane) : Op::template identity<A>();
  }
  warp_reduce<Op>(v);
}

FASTNORM_DEVICE int cluster_size() {
#ifdef FASTNORM_HAS_CLUSTERS
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

FASTNORM_DEVICE int cluster_rank() {
#ifdef FASTNORM_HAS_CLUSTERS
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}

// A CTA must not touch a sibling's shared memory before that one runs: arrive on entry, wait
// before the first cluster_sum.
FASTNORM_DEVICE void cluster_arrive() {
#ifdef FASTNORM_HAS_CLUSTERS
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
FASTNORM_DEVICE void cluster_wait() {
#ifdef FASTNORM_HAS_CLUSTERS
  cooperative_groups::this_cluster().barrier_wait();
#endif
}
FASTNORM_DEVICE void cluster_sync() {
#ifdef FASTNORM_HAS_CLUSTERS
  cooperative_groups::this_cluster().sync();
#endif
}

template <typename Op, int k, typename A>
FASTNORM_DEVICE void cluster_reduce(A (&v)[k], A* scratch) {
  block_reduce<Op>(v, scratch);
#ifdef FASTNORM_HAS_CLUSTERS
  const int size = cluster_size(), rank = cluster_rank();
  A* totals = scratch + k * kMaxWarps;
  if (static_cast<int>(threadIdx.x) < size) {
    A* there = cooperative_groups::this_cluster().map_shared_rank(totals, threadIdx.x);
#pragma unroll
    for (int i = 0; i < k; ++i) shared_store(there + i * kMaxCluster + rank, v[i]);
  }
  cluster_sync();
#pragma unroll
  for (int i = 0; i < k; ++i) {
    v[i] = Op::template identity<A>();
    for (int r = 0; r < size; ++r) v[i] = Op::of(v[i], shared_load(totals + i * kMaxCluster + r));
  }
#endif
}

template <int k, typename A>
FASTNORM_DEVICE void warp_sum(A (&v)[k], int width = 32) {
  warp_reduce<Sum>(v, width);
}
template <int k, typename A>
FASTNORM_DEVICE void block_sum(A (&v)[k], A* scratch) {
  block_reduce<Sum>(v, scratch);
}
template <int k, typename A>
FASTNORM_DEVICE void cluster_sum(A (&v)[k], A* scratch) {
  cluster_reduce<Sum>(v, scratch);
}

}  // namespace fastnorm
