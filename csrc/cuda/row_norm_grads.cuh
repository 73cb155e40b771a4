// Row geometry, backward: the gradients of one pack, and the kernels that end with the gradients of
// the parameters. The main kernels are in row_norm_bwd.cuh, and so is the derivation.
#pragma once

#include "cuda/row_norm.cuh"

namespace fastnorm::cuda {

inline constexpr int kProcessors =
    132;  // of the chip that grids are tuned for; any other works too
inline constexpr int kChannelThreads = 128;
inline constexpr int kTile = 32;

// One pack of the backward pass: xhat, and h from dy. `called` as in activate_backward.
template <bool called, typename T, int n, typename D>
FASTNORM_DEVICE void gradient_of_pack(const NormBackward<T>& p, const Pack<T, n>& x,
                                      const Pack<T, n>& dy, const Pack<T, n>& residual,
                                      const Accumulate<T> (&weight)[n], const Channels& channels,
                                      int64_t column, Accumulate<T> mean, Accumulate<T> rstd,
                                      const D& drop, int64_t index, Accumulate<T> (&xhat)[n],
                                      Accumulate<T> (&h)[n]) {
  using A = Accumulate<T>;
  widen(x, xhat);
  widen(dy, h);
#pragma unroll
  for (int e = 0; e < n; ++e) xhat[e] = (xhat[e] - mean) * rstd;
  if (p.config.prologue) return;
  drop.apply(h, index);
  if (p.config.activation == Activation::None) return;
  A pre[n];
  load_channels<T>(p.bias, channels, column, A(0), pre);
#pragma unroll
  for (int e = 0; e < n; ++e) pre[e] = xhat[e] * weight[e] + pre[e];
  if (p.residual != nullptr) {
    A r[n];
    widen(residual, r);
#pragma unroll
    for (int e = 0; e < n; ++e) pre[e] += r[e];
  }
  activate_backward<called>(h, pre, p.config.activation);
}

// Weight with its offset, of columns j .. j+n-1.
template <typename T, int n>
FASTNORM_DEVICE void load_weight(const NormBackward<T>& p, const Channels& channels, int64_t j,
                                 Accumulate<T> (&weight)[n]) {
  using A = Accumulate<T>;
  load_channels<T>(p.weight, channels, j, A(1), weight);
  if (p.weight.data == nullptr) return;
#pragma unroll
  for (int e = 0; e < n; ++e) weight[e] += static_cast<A>(p.config.weight_offset);
}

// Mean and reciprocal deviation of a row.
template <typename T>
FASTNORM_DEVICE void load_statistics(const NormBackward<T>& p, int64_t row, Accumulate<T>& mean,
                                     Accumulate<T>& rstd) {
  using A = Accumulate<T>;
  mean = p.config.statistic == Statistic::MeanVar ? load(p.mean + row) : A(0);
  rstd = A(1) / sqrt(load(p.var + row) + static_cast<A>(p.config.eps));
}

// dweight and dbias by channel: block (channel, chunk of the outer dimension) adds up its elements.
template <typename T>
__global__ __launch_bounds__(kChannelThreads) void channel_gradients_kernel(NormBackward<T> p,
                                                                            int64_t chunks) {
  using A = Accumulate<T>;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  const View& view = p.config.view;
  const int64_t channels = view.channels();
  const int64_t channel = blockIdx.x % channels, chunk = blockIdx.x / channels;
  const int64_t per_kept = view.channels_per_kept();
  const int64_t kept = channel / per_kept, first = channel % per_kept * view.inner;
  const int64_t begin = view.outer * chunk / chunks, end = view.outer * (chunk + 1) / chunks;
  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  const Channels own{channel, 1};
  A weight[1];
  load_weight<T>(p, own, 0, weight);

  A sum[2] = {0, 0};
  const int64_t count = (end - begin) * view.inner;
  for (int64_t i = threadIdx.x; i < count; i += kChannelThreads) {
    const int64_t sample = divide(i, view.inner);
    const int64_t row = (begin + sample) * view.kept + kept;
    const int64_t index = row * view.reduce_inner + first + (i - sample * view.inner);
    A mean, rstd, xhat[1], h[1];
    load_statistics(p, row, mean, rstd);
    Pack<T, 1> residual{};
    if (p.residual != nullptr) residual = load_streaming<1>(p.residual + index);
    gradient_of_pack<false>(p, load_streaming<1>(p.x + index), load_streaming<1>(p.dy + index),
                            residual, weight, own, 0, mean, rstd, drop, index, xhat, h);
    sum[0] += h[0] * xhat[0];
    sum[1] += h[0];
  }
  block_sum(sum, scratch);
  if (threadIdx.x == 0) {
    A* partial = reinterpret_cast<A*>(p.workspace) + chunk * channels + channel;
    store(partial, sum[0]);
    store(partial + chunks * channels, sum[1]);
  }
}

// Adds the partial rows: a block has 32 columns, thread row r adds partial rows r, r + 32, ...
template <typename T>
__global__ __launch_bounds__(kTile* kTile) void add_partial_rows_kernel(NormBackward<T> p,
                                                                        int64_t groups,
                                                                        int64_t size) {
  using A = Accumulate<T>;
  A* tile = reinterpret_cast<A*>(dynamic_shared());
  const int c = static_cast<int>(threadIdx.x) % kTile, r = static_cast<int>(threadIdx.x) / kTile;
  const int64_t tiles = (size + kTile - 1) / kTile;
  const bool second = blockIdx.x >= tiles;
  const int64_t column = (blockIdx.x - (second ? tiles : 0)) * kTile + c;
  void* target = second ? p.dbias : p.dweight;
  if (target == nullptr) return;
  const A* partial = reinterpret_cast<const A*>(p.workspace) + (second ? groups * size : 0);
  A sum = 0;
  if (column < size) {
#pragma unroll 4
    for (int64_t g = r; g < groups; g += kTile) sum += load(partial + g * size + column);
  }
  shared_store(tile + r * kTile + c, sum);
  __syncthreads();
  if (r != 0 || column >= size) return;
  sum = 0;
  for (int i = 0; i < kTile; ++i) sum += shared_load(tile + i * kTile + c);
  if (second ? p.dbias_wide : p.dweight_wide) {
    store(static_cast<A*>(target) + column, sum);
  } else {
    store(static_cast<T*>(target) + column, narrow<T>(sum));
  }
}

// Chunks of the outer dimension, so that channels x chunks fill the chip a few times.
inline int64_t channel_chunks(const View& view) {
  const int64_t wanted = (8 * kProcessors + view.channels() - 1) / view.channels();
  return std::max<int64_t>(1, std::min(wanted, view.outer));
}

}  // namespace fastnorm::cuda
