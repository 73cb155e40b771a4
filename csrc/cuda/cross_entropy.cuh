// Cross-entropy with label smoothing on CUDA: loss and gradient of a row in one kernel.
//
// The formulas are those of cpu/cross_entropy_cpu.cpp. With m the largest logit of a row, s the sum
// of exp(x - m), and A the classes whose logit isn't -inf:
//
//   mass = (1 - e) w_y + e / Z sum_A u w,  Z = sum_A u
//   loss = mass log s - (1 - e) w_y (x_y - m) - e / Z sum_A u w (x - m)
//   grad = scale (mass exp(x - m) / s - (1 - e) w_y [k = y] - e / Z u_k w_k [k in A])
//
// A row stays in shared memory (of a cluster, if it is long), where each thread has copied its own
// packs (of ragged rows, Run of row_shape.cuh, and the gradient leaves the same way): one read and,
// with the gradient, one write: 2 E b. Rows that don't fit are read a second time for the gradient,
// the end first, which the cache still holds: at most 3 E b. A thread keeps its sums relative to
// the largest logit it has met. Rows left out are written and not read. A class id out of range
// makes its row, and so the loss, NaN.
//
// What a mean divides by is needed before the rows, and the loss after them: one cluster each adds
// up rows x 8 bytes.
#pragma once

#include <algorithm>

#include "cuda/cross_entropy_cuda.h"
#include "cuda/row_shape.cuh"

namespace fastnorm::cuda {

inline constexpr int64_t kRowBytes =
    64 * 1024;  // of a row in one block, if more blocks can share it
inline constexpr int kEntropyScratch = 6 * (kMaxWarps + kMaxCluster);  // of a maximum and five sums
inline constexpr int kAddThreads = 512;
inline constexpr int64_t kAddRows = 4096;  // per block, before another one helps

// sum over the classes of u and u w, and what the mean divides by: of the rows' mass as if every
// class were allowed.
template <typename T>
__global__ __launch_bounds__(kAddThreads) void cross_entropy_totals_kernel(CrossEntropy<T> p) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  cluster_sync();
  const int64_t first = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kAddThreads;
  double sum[4] = {0, 0, 0, 0};  // u, u w, w of the targets, rows that count
  if (p.weight != nullptr || p.prior != nullptr) {
    for (int64_t k = first; k < p.classes; k += step) {
      const double u = p.prior == nullptr ? 1.0 : static_cast<double>(load(p.prior + k));
      sum[0] += u;
      sum[1] += u * (p.weight == nullptr ? 1.0 : static_cast<double>(load(p.weight + k)));
    }
  }
#pragma unroll 4
  for (int64_t i = first; i < p.rows; i += step) {
    const int64_t y = load(p.target + i);
    if (y == p.ignore_index) continue;
    sum[3] += 1;
    if (p.weight != nullptr && y >= 0 && y < p.classes) sum[2] += load(p.weight + y);
  }
  cluster_sum(sum, scratch);
  if (first != 0) return;
  if (p.weight == nullptr && p.prior == nullptr) sum[0] = sum[1] = static_cast<double>(p.classes);
  const double share = p.torch_mean ? 0.0 : p.smoothing;
  const double spread = sum[0] > 0 ? share * sum[1] / sum[0] : 0.0;
  double divisor = p.weight == nullptr ? sum[3] : (1 - share) * sum[2] + spread * sum[3];
  if (divisor == 0 && !p.torch_mean) divisor = 1;
  store(p.totals + kPriors, sum[0]);
  store(p.totals + kWeighted, sum[1]);
  store(p.totals + kDivisor, p.mean ? divisor : 1.0);
}

// A thread's sums over its logits, relative to the largest one so far.
template <typename A>
struct LogitSums {
  A top = Max::identity<A>();
  A exps = 0;
  A logits = 0, weighted = 0, prior = 0, allowed = 0;  // over A: u w (x - top), u w, u, 1

  FASTNORM_DEVICE void rebase(A higher) {
    if (top == Max::identity<A>()) {
      top = higher;
    } else if (higher > top) {
      exps *= exp(top - higher);
      logits += weighted * (top - higher);
      top = higher;
    }
  }
};

// u w of classes k .. k + n - 1, and u; both 1 where there is neither.
template <typename T, int n>
FASTNORM_DEVICE void load_coefficients(const CrossEntropy<T>& p, int64_t k,
                                       Accumulate<T> (&both)[n], Accumulate<T> (&prior)[n]) {
#pragma unroll
  for (int e = 0; e < n; ++e) both[e] = prior[e] = Accumulate<T>(1);
  if (p.prior != nullptr) load_values<n>(p.prior + k, prior);
  if (p.weight != nullptr) load_values<n>(p.weight + k, both);
#pragma unroll
  for (int e = 0; e < n; ++e) both[e] *= prior[e];
}

template <typename T, int width>
__global__ __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 1 : 2) void cross_entropy_kernel(
    CrossEntropy<T> p, RowShape shape, bool staged, int per_block) {
  using A = Accumulate<T>;
  constexpr A kMasked = -std::numeric_limits<A>::infinity();
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  T* stage = reinterpret_cast<T*>(scratch + kEntropyScratch) + threadIdx.x * width;
  const int distance = static_cast<int>(blockDim.x) * width;
  if (shape.cluster > 1) cluster_arrive();
  RowThread t = RowThread::of(p.rows, shape);
  const int64_t y = t.row < t.rows ? load(p.target + t.row) : p.ignore_index;
  const bool counts = y != p.ignore_index, in_range = y >= 0 && y < p.classes;
  int packs = t.row < t.rows ? static_cast<int>(p.classes / width) : 0;
  // A ragged row's part in this block is a run of columns, and the threads side by side in it.
  const bool ragged = width == 1 && per_block > 0;
  T* const part = stage - threadIdx.x * width;
  Run<T> run{};
  if (ragged) {
    const int begin = shape.cluster == 1 ? 0 : cluster_rank() * per_block;
    if (packs > begin + per_block) packs = begin + per_block;
    run = Run<T>::of(t.row * p.classes + begin, packs > begin ? packs - begin : 0);
    stage += run.skew;
    t.lane = begin + static_cast<int>(threadIdx.x);
    t.step = static_cast<int>(blockDim.x);
  }
  const int items = t.lane < packs ? (packs - t.lane + t.step - 1) / t.step : 0;
  const int read = counts && in_range ? items : 0;
  const int64_t first = t.row * p.classes + int64_t{t.lane} * width;
  const int64_t stride = int64_t{t.step} * width;
  const bool smooth = p.smoothing > 0, uniform = p.weight == nullptr && p.prior == nullptr;

  if (staged) {
    if (ragged && counts && in_range) run.fetch(p.x, part);
#pragma unroll 4
    for (int i = 0; i < (ragged ? 0 : read); ++i) {
      fetch_async<width>(stage + i * distance, p.x + first + i * stride);
    }
    copy_async_commit();
    copy_async_wait<0>();
    if (ragged) __syncthreads();
  }
  const auto logits_of = [&](int i) {
    return staged ? shared_load<width>(stage + i * distance)
                  : load<width>(p.x + first + i * stride);
  };
  LogitSums<A> sums;
#pragma unroll 2
  for (int i = 0; i < read; ++i) {
    A x[width];
    widen(logits_of(i), x);
    A top = kMasked;
#pragma unroll
    for (int e = 0; e < width; ++e) top = Max::of(top, x[e]);
    sums.rebase(top);
    const A zero = sums.top == kMasked ? A(0) : sums.top;
#pragma unroll
    for (int e = 0; e < width; ++e) sums.exps += exp(x[e] - zero);
    if (!smooth) continue;
    A both[width], prior[width];
    load_coefficients(p, (t.lane + int64_t{i} * t.step) * width, both, prior);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      if (x[e] == kMasked) continue;
      sums.logits += both[e] * (x[e] - zero);
      sums.weighted += both[e];
      sums.prior += prior[e];
      sums.allowed += A(1);
    }
  }

  if (shape.cluster > 1) cluster_wait();
  A top[1] = {sums.top};
  row_reduce<Max>(top, shape, scratch);
  sums.rebase(top[0]);
  scratch += kMaxWarps + kMaxCluster;
  A sum[5] = {sums.exps, sums.logits, sums.weighted, sums.prior, sums.allowed};
  row_sum(sum, shape, scratch);

  A loss = 0, mass = 0, hard = 0, share = 0;
  if (counts && in_range) {
    hard = static_cast<A>(1 - p.smoothing);
    if (p.weight != nullptr) hard *= load(p.weight + y);
    mass = hard;
    if (smooth) {
      // The sums of an unmasked row are the same for all, and were taken in double.
      const bool given = !uniform && sum[4] == static_cast<A>(p.classes);
      const A weighted = given ? static_cast<A>(load(p.totals + kWeighted)) : sum[2];
      const A prior = given ? static_cast<A>(load(p.totals + kPriors)) : sum[3];
      // Where every allowed class has a prior of 0, nothing is left to smooth with.
      share = prior > A(0) ? static_cast<A>(p.smoothing) / prior : A(0);
      mass += share * weighted;
    }
    if (t.first) {
      loss = mass * log(sum[0]) - share * sum[1];
      const A own = widen(load(p.x + t.row * p.classes + y)) - top[0];
      if (hard != A(0)) loss -= hard * own;
    }
  }
  // Nothing allowed, or an infinity or NaN to begin with.
  const bool finite = in_range && top[0] - top[0] == A(0) && sum[0] == sum[0];
  if (counts && !finite) loss = mass = std::numeric_limits<A>::quiet_NaN();
  if (t.first && t.row < t.rows) {
    store(p.losses + t.row, loss);
    store(p.mass + t.row, mass);
  }
  if (p.grad == nullptr) return;

  const A scale = p.mean ? static_cast<A>(1 / load(p.totals + kDivisor)) : A(1);
  const A factor = scale * mass / sum[0], smoothed = scale * share, own = scale * hard;
#pragma unroll 2
  for (int i = items - 1; i >= 0; --i) {
    const int64_t k = (t.lane + int64_t{i} * t.step) * width;
    A v[width];
#pragma unroll
    for (int e = 0; e < width; ++e) v[e] = loss;  // 0 or NaN, of a row that wasn't read
    if (read > 0) {
      A both[width], prior[width];
      widen(logits_of(i), v);
      if (smooth) load_coefficients(p, k, both, prior);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const A spread = smooth && v[e] != kMasked ? smoothed * both[e] : A(0);
        v[e] = exp(v[e] - top[0]) * factor - spread;
        if (k + e == y) v[e] -= own;
      }
    }
    if (ragged) {
      shared_store(stage + i * distance, narrow<T>(v));
    } else {
      store_streaming(p.grad + first + i * stride, narrow<T>(v));
    }
  }
  if (!ragged) return;
  __syncthreads();
  run.put(p.grad, part);
}

// Mean or sum of the losses, and the gradient's factor: 1, but where masked logits have changed the
// mass that a weighted mean divides by.
template <typename T>
__global__ __launch_bounds__(kAddThreads) void cross_entropy_reduce_kernel(CrossEntropy<T> p) {
  using A = Accumulate<T>;
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  cluster_sync();
  const int64_t first = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kAddThreads;
  double sum[2] = {0, 0};
#pragma unroll 4
  for (int64_t i = first; i < p.rows; i += step) {
    sum[0] += load(p.losses + i);
    sum[1] += load(p.mass + i);
  }
  cluster_sum(sum, scratch);
  if (first != 0) return;
  const double total = p.mean ? load(p.totals + kDivisor) : 1.0;
  double correction = 1;
  if (p.mean && p.weight != nullptr && p.smoothing > 0 && !p.torch_mean) {
    const double rounding = 4 * static_cast<double>(std::numeric_limits<A>::epsilon());
    const double moved = sum[1] - total;
    if ((moved < 0 ? -moved : moved) > rounding * (total < 0 ? -total : total) && sum[1] != 0) {
      correction = total / sum[1];
    }
  }
  store(p.scale, static_cast<A>(correction));
  store(p.loss, static_cast<A>(sum[0] / total * correction));
}

// grad *= factor, unless that is 1: most losses are where backward begins.
template <typename T, int width>
__global__ __launch_bounds__(kAddThreads) void scale_gradient_kernel(T* grad, int64_t numel,
                                                                     const Accumulate<T>* factor) {
  const Accumulate<T> by = load(factor);
  if (by == Accumulate<T>(1)) return;
  const int64_t step = int64_t{gridDim.x} * kAddThreads * width;
  for (int64_t i = (int64_t{blockIdx.x} * kAddThreads + threadIdx.x) * width; i < numel;
       i += step) {
    Accumulate<T> v[width];
    widen(load_streaming<width>(grad + i), v);
#pragma unroll
    for (int e = 0; e < width; ++e) v[e] *= by;
    store_streaming(grad + i, narrow<T>(v));
  }
}

template <int width, typename T, typename Launch>
void cross_entropy_of_width(const CrossEntropy<T>& p, const DeviceLimits& device,
                            const Launch& launch) {
  constexpr int kItems = 8;  // packs of a thread, if a block has the threads
  const int64_t packs = p.classes / width;
  const auto shared_for = [](int64_t packs_of_block, unsigned threads) {
    const int64_t items = (packs_of_block + threads - 1) / threads;
    return kEntropyScratch * sizeof(Accumulate<T>) +
           static_cast<size_t>(items * threads) * width * sizeof(T);
  };
  if (packs <= 32 * kItems) {
    // A pack per lane, or as many elements of a short row that has none.
    const int lanes = lanes_for(width > 1 ? packs : (packs + kShortItems - 1) / kShortItems);
    LaunchShape warps = launch_of_warps(p.rows, lanes);
    warps.shared = shared_for(packs * (kSmallThreads / lanes), kSmallThreads);
    launch("cross_entropy, warp", warps, cross_entropy_kernel<T, width>, p, RowShape{lanes, 1},
           true, 0);
    return;
  }
  const unsigned widest = device.clusters ? kRowCluster : 1;
  unsigned cluster = 1;
  while (p.classes * static_cast<int64_t>(sizeof(T)) > cluster * kRowBytes && cluster < widest) {
    cluster *= 2;
  }
  const int64_t per_block = (packs + cluster - 1) / cluster;
  const unsigned threads = std::min<unsigned>(kRowThreads, threads_for(per_block, kItems));
  const size_t slack = width == 1 ? 32 : 0;  // a ragged row begins anywhere in 16 bytes
  const size_t shared = shared_for(per_block, threads) + slack;
  const bool staged = shared <= device.max_shared;
  const bool ragged = width == 1 && staged && aligned_to_16({p.x, p.grad});
  const LaunchShape blocks{static_cast<unsigned>(p.rows) * cluster, threads,
                           staged ? shared : shared_for(0, threads), cluster};
  launch(!staged       ? "cross_entropy, two reads"
         : cluster > 1 ? "cross_entropy, cluster"
                       : "cross_entropy, block",
         blocks, cross_entropy_kernel<T, width>, p,
         RowShape{static_cast<int>(threads), static_cast<int>(cluster)}, staged,
         ragged ? static_cast<int>(per_block) : 0);
}

template <typename T, typename Launch>
void cross_entropy(const CrossEntropy<T>& p, const DeviceLimits& device, const Launch& launch) {
  constexpr int width = kPackSize<T>;
  const auto shape_of = [&](int sums) {
    const unsigned cluster = device.clusters && p.rows > kAddRows ? kRowCluster : 1;
    return LaunchShape{cluster, kAddThreads, sums * (kMaxWarps + kMaxCluster) * sizeof(double),
                       cluster};
  };
  if (p.mean || (p.smoothing > 0 && !p.uniform())) {
    launch("cross_entropy_totals", shape_of(4), cross_entropy_totals_kernel<T>, p);
  }
  if (p.rows > 0 && p.classes > 0) {
    if (p.classes % width == 0 && aligned_to_16({p.x, p.weight, p.prior, p.grad})) {
      cross_entropy_of_width<width>(p, device, launch);
    } else {
      cross_entropy_of_width<1>(p, device, launch);
    }
  }
  if (p.loss != nullptr) {
    launch("cross_entropy_reduce", shape_of(2), cross_entropy_reduce_kernel<T>, p);
  }
}

template <typename T, typename Launch>
void scale_gradient(T* grad, int64_t numel, const Accumulate<T>* factor, const Launch& launch) {
  if (numel == 0) return;
  constexpr int width = kPackSize<T>;
  constexpr int64_t kBlocks = 1056;  // eight for each processor of the largest chip
  const bool packs = numel % width == 0 && aligned_to_16({grad});
  const int64_t per_block = kAddThreads * (packs ? width : 1);
  const LaunchShape shape{
      static_cast<unsigned>(std::min(kBlocks, (numel + per_block - 1) / per_block)), kAddThreads};
  if (packs) {
    launch("scale_gradient", shape, scale_gradient_kernel<T, width>, grad, numel, factor);
  } else {
    launch("scale_gradient", shape, scale_gradient_kernel<T, 1>, grad, numel, factor);
  }
}

}  // namespace fastnorm::cuda
