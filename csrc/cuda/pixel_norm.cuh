// Pixel form of the column geometry: layer and RMS norm over the channels of NCHW, one statistic
// per pixel, its C elements a plane apart. Forward and backward by the formulas of
// column_norm.cuh and column_norm_bwd.cuh, the channel being the row.
//
// A block takes `lanes` packs of neighbouring pixels and all C rows; thread (r, lane) has rows r,
// r + rows, ... of its pack, and the threads of a pixel merge through shared memory. Where it fits,
// the block's part of x (backward: and dy) is copied there, all of it under way at once, and stays:
// 2 E b forward, 3 E b backward; otherwise it is read again, mostly from L2. The parts of many
// channels are narrower: forward, so that more than one block fits on a multiprocessor; backward
// the next part is on its way while this one is mapped.
//
// Backward, blocks are persistent: block b of G takes parts b, b + G, ..., adds every row's sums
// over its pixels to one partial row of dweight and dbias, and add_samples_kernel adds the G
// partial rows in order.
#pragma once

#include "cuda/column_norm_bwd.cuh"

namespace fastnorm::cuda {

struct PixelTiling {
  int lanes, rows;     // of threads
  int64_t tiles;       // parts of a sample
  int64_t per_thread;  // rows of a thread, at most
  int64_t groups;      // backward: blocks, and partial rows
  bool staged, shared_sums;

  static PixelTiling of(const View& v, int width, bool backward) {
    PixelTiling t{};
    const int64_t channels = v.reduce_outer;
    t.lanes = width == 1 || channels <= 64 ? 32 : channels <= (backward ? 768 : 512) ? 8 : 4;
    t.rows = kPixelThreads / t.lanes;
    t.tiles = ceil_div(v.kept, t.lanes * width);
    t.per_thread = ceil_div(channels, t.rows);
    t.groups = std::min<int64_t>(v.outer * t.tiles, channels <= 256 ? 528 : 264);
    return t;
  }
};

// The thread's place: pixels pixel .. pixel+n-1 and rows row, row + rows, ... of sample o.
struct PixelThread {
  int64_t o, pixel;
  int lane, row;
  bool here;

  FASTNORM_DEVICE PixelThread(const View& v, const PixelTiling& t, int n, int64_t task) {
    o = divide(task, t.tiles);
    lane = static_cast<int>(threadIdx.x) % t.lanes;
    row = static_cast<int>(threadIdx.x) / t.lanes;
    pixel = ((task - o * t.tiles) * t.lanes + lane) * n;
    here = pixel < v.kept;
  }
};

// Where values of the pixels of a block lie in shared memory: of each row of threads its elements
// 0, then its elements 1, ..., and a gap. So neither the threads of a warp, in one row or in
// several, nor threads that take one pixel each share a bank.
struct PixelPlaces {
  int lanes, pitch;

  FASTNORM_DEVICE PixelPlaces(const PixelTiling& t, int n)
      : lanes(t.lanes), pitch((n + 1) * lanes) {}
  static FASTNORM_HD int count(int n) { return kPixelThreads * (n + 1); }
  FASTNORM_DEVICE int of(const PixelThread& me, int e) const {
    return me.row * pitch + result(me, e);
  }
  // In row 0.
  FASTNORM_DEVICE int result(const PixelThread& me, int e) const { return e * lanes + me.lane; }
};

// x and residual, or x, dy and residual, of one row of a pass; from shared memory if they are
// there.
template <typename T, int n>
struct PixelStage {
  T* own;            // this thread's place for its first pack
  int64_t distance;  // to its next one
  int64_t tensor;    // to the next tensor

  FASTNORM_DEVICE PixelStage(void* begin, int64_t per_thread)
      : own(static_cast<T*>(begin) + threadIdx.x * n),
        distance(int64_t{blockDim.x} * n),
        tensor(per_thread * distance) {}
  FASTNORM_DEVICE T* at(int which, int64_t i) const { return own + which * tensor + i * distance; }
};

template <typename T, int n>
__global__ __launch_bounds__(kPixelThreads) void pixel_norm_fwd_kernel(NormForward<T> p,
                                                                       PixelTiling t) {
  using A = Accumulate<T>;
  const View& v = p.config.view;
  const PixelThread me(v, t, n, blockIdx.x);
  const bool centered = p.config.statistic == Statistic::MeanVar;
  const int threads = static_cast<int>(blockDim.x), pixels = t.lanes * n;
  const PixelPlaces places(t, n);
  A* means = reinterpret_cast<A*>(dynamic_shared());  // by row of threads, then row 0: the result
  A* squares = means + PixelPlaces::count(n);
  const PixelStage<T, n> stage(squares + PixelPlaces::count(n), t.per_thread);
  const int64_t channels = v.reduce_outer;
  const int64_t first = (me.o * channels + me.row) * v.kept + me.pixel;
  const int64_t stride = t.rows * v.kept;
  const int64_t each = divide(channels, t.rows), more = channels - each * t.rows;
  const auto rows_of = [&](int r) { return each + (r < more ? 1 : 0); };
  const int64_t items = me.here ? rows_of(me.row) : 0;
  const int64_t statistic = me.o * v.kept + me.pixel;
  A mean[n], rstd[n];

  if (p.config.frozen) {
#pragma unroll
    for (int e = 0; e < n; ++e) {
      mean[e] = me.here && p.mean != nullptr ? load(p.mean + statistic + e) : A(0);
      rstd[e] = me.here ? rstd_of(p.var, statistic + e, p.config.eps) : A(0);
    }
  } else {
    if (t.staged) {
#pragma unroll 8
      for (int64_t i = 0; i < items; ++i) {
        fetch_async<n>(stage.at(0, i), p.x + first + i * stride);
      }
      copy_async_commit();
    }
    // Means are kept less the pixel's first element, which rounding doesn't touch.
    const int64_t top = me.o * channels * v.kept;
    A base[n], shift[n], sum[n], square[n];
#pragma unroll
    for (int e = 0; e < n; ++e) base[e] = shift[e] = sum[e] = square[e] = A(0);
    if (centered && items > 0) widen(load<n>(p.x + top + me.pixel), base);
    copy_async_wait<0>();
    if (centered && items > 0) {
      widen(t.staged ? shared_load<n>(stage.at(0, 0)) : load<n>(p.x + first), shift);
    }
#pragma unroll 4
    for (int64_t i = 0; i < items; ++i) {
      const Pack<T, n> x =
          t.staged ? shared_load<n>(stage.at(0, i)) : load<n>(p.x + first + i * stride);
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const A d = widen(x.v[e]) - shift[e];
        sum[e] += d;
        square[e] += d * d;
      }
    }
    const A count = static_cast<A>(items > 0 ? items : 1);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      const A excess = centered ? sum[e] * (sum[e] / count) : A(0);
      const int place = places.of(me, e);
      shared_store(means + place, centered ? shift[e] - base[e] + sum[e] / count : A(0));
      shared_store(squares + place, square[e] < excess ? A(0) : square[e] - excess);
    }
    __syncthreads();
    const int filled = static_cast<int>(t.rows < channels ? t.rows : channels);
    for (int j = static_cast<int>(threadIdx.x); j < pixels; j += threads) {
      const auto count_of = [&](int r) { return static_cast<A>(rows_of(r)); };
      A m = A(0), m2 = A(0);
      if (centered) {
#pragma unroll 4
        for (int r = 0; r < filled; ++r) {
          m += count_of(r) * shared_load(means + r * places.pitch + j);
        }
        m /= static_cast<A>(channels);
      }
#pragma unroll 4
      for (int r = 0; r < filled; ++r) {
        const A d = shared_load(means + r * places.pitch + j) - m;
        m2 += shared_load(squares + r * places.pitch + j) + count_of(r) * d * d;
      }
      const int64_t pixel = me.pixel - me.lane * n + j % t.lanes * n + j / t.lanes;
      if (centered && pixel < v.kept) m += widen(load(p.x + top + pixel));
      shared_store(means + j, m);
      shared_store(squares + j, m2 / static_cast<A>(channels));
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < n; ++e) {
      mean[e] = shared_load(means + places.result(me, e));
      rstd[e] = shared_load(squares + places.result(me, e));
    }
    if (me.row == 0 && me.here) {
      if (centered) store_values(p.mean + statistic, mean);
      store_values(p.var + statistic, rstd);
    }
#pragma unroll
    for (int e = 0; e < n; ++e) rstd[e] = A(1) / sqrt(rstd[e] + static_cast<A>(p.config.eps));
  }

  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  const bool add = p.residual != nullptr, staged = t.staged && !p.config.frozen;
  Pack<T, n> x{}, residual{};
  const auto fetch = [&](int64_t i) {
    if (i >= items) return;
    x = staged ? shared_load<n>(stage.at(0, i)) : load_streaming<n>(p.x + first + i * stride);
    if (add) residual = load_streaming<n>(p.residual + first + i * stride);
  };
  fetch(0);
#pragma unroll 1
  for (int64_t i = 0; i < items; ++i) {
    const Pack<T, n> here = x, added = residual;
    fetch(i + 1);
    const int64_t channel = me.row + i * t.rows;
    const A weight = weight_of<T>(p.weight, p.config.weight_offset, channel);
    const A bias = parameter_of<T>(p.bias, channel, A(0));
    A y[n], r[n];
    widen(here, y);
#pragma unroll
    for (int e = 0; e < n; ++e) y[e] = (y[e] - mean[e]) * rstd[e] * weight + bias;
    if (add) {
      widen(added, r);
#pragma unroll
      for (int e = 0; e < n; ++e) y[e] += r[e];
    }
    activate(y, p.config.activation);
    drop.apply(y, first + i * stride);
    store_streaming(p.y + first + i * stride, narrow<T>(y));
  }
}

template <typename T, int n>
__global__ __launch_bounds__(kPixelThreads, 1) void pixel_norm_bwd_kernel(NormBackward<T> p,
                                                                          PixelTiling t) {
  using A = Accumulate<T>;
  const View& v = p.config.view;
  const int threads = static_cast<int>(blockDim.x), pixels = t.lanes * n;
  const int64_t channels = v.reduce_outer, tasks = v.outer * t.tiles;
  const bool frozen = p.config.frozen, parameters = p.dweight != nullptr || p.dbias != nullptr;
  const bool activated = p.config.activation != Activation::None;
  const bool add = activated && p.residual != nullptr;
  const PixelPlaces places(t, n);
  A* sums_gx = reinterpret_cast<A*>(dynamic_shared());  // by row of threads, then row 0: c
  A* sums_g = sums_gx + PixelPlaces::count(n);          // and e
  A* row_sums = sums_g + PixelPlaces::count(n);         // [2][channels], if shared_sums
  A* partial = reinterpret_cast<A*>(p.workspace);       // [2][groups][channels]
  const PixelStage<T, n> stage(row_sums + (t.shared_sums ? ceil_div(2 * channels, 4) * 4 : 0),
                               t.per_thread);
  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  const bool wants_map = p.dx != nullptr || p.dresidual != nullptr;
  const int last_pass = frozen || !wants_map ? 0 : 1;

  for (int64_t task = blockIdx.x; task < tasks; task += t.groups) {
    const bool begun = task != blockIdx.x;
    const PixelThread me(v, t, n, task);
    const int64_t first = (me.o * channels + me.row) * v.kept + me.pixel;
    const int64_t stride = t.rows * v.kept, statistic = me.o * v.kept + me.pixel;
    // The next part follows into each place when this one has been read for the last time.
    const PixelThread then(v, t, n, task + t.groups);
    const bool follows = task + t.groups < tasks && then.here && last_pass == 1;
    const int64_t next = (then.o * channels + then.row) * v.kept + then.pixel;
    if (t.staged && (!begun || last_pass == 0)) {
      const int64_t items = me.here ? divide(channels - me.row + t.rows - 1, t.rows) : 0;
#pragma unroll 4
      for (int64_t i = 0; i < items; ++i) {
        fetch_async<n>(stage.at(0, i), p.x + first + i * stride);
        fetch_async<n>(stage.at(1, i), p.dy + first + i * stride);
      }
      copy_async_commit();
    }
    A mean[n], rstd[n], c[n], e_[n], gx[n], g[n];
#pragma unroll
    for (int e = 0; e < n; ++e) mean[e] = rstd[e] = c[e] = e_[e] = gx[e] = g[e] = A(0);
    if (me.here) {
      if (p.mean != nullptr) load_values<n>(p.mean + statistic, mean);
      load_values<n>(p.var + statistic, rstd);
    }
#pragma unroll
    for (int e = 0; e < n; ++e) {
      rstd[e] = me.here ? A(1) / sqrt(rstd[e] + static_cast<A>(p.config.eps)) : A(0);
    }
    copy_async_wait<0>();
#pragma unroll 1
    for (int pass = 0; pass <= last_pass; ++pass) {
      const bool map = wants_map && (frozen || pass == 1);
      Pack<T, n> x{}, dy{}, residual{};
      const auto fetch = [&](int64_t i) {
        if (!me.here || me.row + i * t.rows >= channels) return;
        const int64_t at = first + i * stride;
        if (t.staged) {
          x = shared_load<n>(stage.at(0, i));
          dy = shared_load<n>(stage.at(1, i));
        } else {
          x = load<n>(p.x + at);
          dy = load<n>(p.dy + at);
        }
        if (add) residual = load<n>(p.residual + at);
      };
      fetch(0);
#pragma unroll 1
      for (int64_t i = 0; i < t.per_thread; ++i) {
        const Pack<T, n> here_x = x, here_dy = dy, here_residual = residual;
        fetch(i + 1);
        const int64_t channel = me.row + i * t.rows, at = first + i * stride;
        const bool there = me.here && channel < channels;
        if (t.staged && pass == 1 && follows && channel < channels) {
          fetch_async<n>(stage.at(0, i), p.x + next + i * stride);
          fetch_async<n>(stage.at(1, i), p.dy + next + i * stride);
        }
        A xhat[n], h[n], weight = A(0), own[2] = {0, 0};
        if (there) {
          weight = weight_of<T>(p.weight, p.config.weight_offset, channel);
          widen(here_x, xhat);
          widen(here_dy, h);
#pragma unroll
          for (int e = 0; e < n; ++e) xhat[e] = (xhat[e] - mean[e]) * rstd[e];
          drop.apply(h, at);
          if (activated) {
            const A bias = parameter_of<T>(p.bias, channel, A(0));
            A pre[n], r[n];
#pragma unroll
            for (int e = 0; e < n; ++e) pre[e] = xhat[e] * weight + bias;
            if (add) {
              widen(here_residual, r);
#pragma unroll
              for (int e = 0; e < n; ++e) pre[e] += r[e];
            }
            activate_backward<false>(h, pre, p.config.activation);
          }
#pragma unroll
          for (int e = 0; e < n; ++e) {
            own[0] += h[e] * xhat[e];
            own[1] += h[e];
            gx[e] += h[e] * weight * xhat[e];
            g[e] += h[e] * weight;
          }
          if (map) {
            if (p.dresidual != nullptr) store_streaming(p.dresidual + at, narrow<T>(h));
#pragma unroll
            for (int e = 0; e < n; ++e) {
              h[e] = rstd[e] * (h[e] * weight - e_[e] - xhat[e] * c[e]);
            }
            if (p.dx != nullptr) store_streaming(p.dx + at, narrow<T>(h));
          }
        }
        if (pass == 1 || !parameters) continue;
        warp_sum(own, t.lanes);
        if (me.lane != 0 || channel >= channels) continue;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (t.shared_sums) {
            A* sum = row_sums + k * channels + channel;
            shared_store(sum, begun ? shared_load(sum) + own[k] : own[k]);
          } else {
            A* sum = partial + (k * t.groups + blockIdx.x) * channels + channel;
            store(sum, begun ? load_coherent<1>(sum).v[0] + own[k] : own[k]);
          }
        }
      }
      if (pass == 1) copy_async_commit();
      if (pass == 1 || frozen) continue;
      __syncthreads();  // c and e of the task before have been read
#pragma unroll
      for (int e = 0; e < n; ++e) {
        shared_store(sums_gx + places.of(me, e), gx[e]);
        shared_store(sums_g + places.of(me, e), g[e]);
      }
      __syncthreads();
      for (int j = static_cast<int>(threadIdx.x); j < pixels; j += threads) {
        A sum[2] = {0, 0};
#pragma unroll 4
        for (int r = 0; r < t.rows; ++r) {
          sum[0] += shared_load(sums_gx + r * places.pitch + j);
          sum[1] += shared_load(sums_g + r * places.pitch + j);
        }
        shared_store(sums_gx + j, sum[0] / static_cast<A>(channels));
        shared_store(sums_g + j, p.mean == nullptr ? A(0) : sum[1] / static_cast<A>(channels));
      }
      __syncthreads();
#pragma unroll
      for (int e = 0; e < n; ++e) {
        c[e] = shared_load(sums_gx + places.result(me, e));
        e_[e] = shared_load(sums_g + places.result(me, e));
      }
    }
  }
  copy_async_wait<0>();
  if (!parameters || !t.shared_sums) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < 2 * channels; i += threads) {
    const int64_t k = i / channels;
    store(partial + (k * t.groups + blockIdx.x) * channels + (i - k * channels),
          shared_load(row_sums + i));
  }
}

template <int n, typename T, typename Launch>
void pixel_norm_fwd_of_width(const NormForward<T>& p, const DeviceLimits& device, Launch& launch) {
  using A = Accumulate<T>;
  const View& v = p.config.view;
  PixelTiling t = PixelTiling::of(v, n, false);
  size_t shared = size_t{2} * PixelPlaces::count(n) * sizeof(A);
  const size_t stage = static_cast<size_t>(t.per_thread) * kPixelThreads * n * sizeof(T);
  t.staged = !p.config.frozen && shared + stage <= device.max_shared;
  if (t.staged) shared += stage;
  launch(t.staged ? "pixel_norm_fwd, staged" : "pixel_norm_fwd, two reads",
         LaunchShape{blocks(v.outer * t.tiles), kPixelThreads, shared}, pixel_norm_fwd_kernel<T, n>,
         p, t);
}

template <typename T, typename Launch>
void pixel_norm_fwd(const NormForward<T>& p, const DeviceLimits& device, Launch&& launch) {
  constexpr int n = kPackSize<T>;
  if (p.config.view.numel() == 0) return;
  if (p.config.view.kept % n == 0 && aligned_to_16({p.x, p.residual, p.y})) {
    pixel_norm_fwd_of_width<n>(p, device, launch);
  } else {
    pixel_norm_fwd_of_width<1>(p, device, launch);
  }
}

inline size_t pixel_norm_bwd_workspace_bytes(const View& view, size_t element_size) {
  if (view.numel() == 0) return 0;
  const int width = view.kept % static_cast<int64_t>(16 / element_size) == 0
                        ? static_cast<int>(16 / element_size)
                        : 1;
  // A misaligned pointer makes the packs, and may make the groups, those of width 1.
  const int64_t groups =
      std::max(PixelTiling::of(view, width, true).groups, PixelTiling::of(view, 1, true).groups);
  return static_cast<size_t>(2 * groups * view.channels()) * (element_size == 8 ? 8 : 4);
}

template <int n, typename T, typename Launch>
void pixel_norm_bwd_of_width(const NormBackward<T>& p, const DeviceLimits& device, Launch& launch) {
  using A = Accumulate<T>;
  const View& v = p.config.view;
  PixelTiling t = PixelTiling::of(v, n, true);
  size_t shared = size_t{2} * PixelPlaces::count(n) * sizeof(A);
  const size_t sums = static_cast<size_t>(ceil_div(2 * v.channels(), 4) * 4) * sizeof(A);
  const size_t stage =
      size_t{2} * static_cast<size_t>(t.per_thread) * kPixelThreads * n * sizeof(T);
  t.shared_sums = shared + sums <= device.max_shared;
  if (t.shared_sums) shared += sums;
  t.staged = !p.config.frozen && shared + stage <= device.max_shared;
  if (t.staged) shared += stage;
  launch(t.staged ? "pixel_norm_bwd, staged" : "pixel_norm_bwd, two reads",
         LaunchShape{blocks(t.groups), kPixelThreads, shared}, pixel_norm_bwd_kernel<T, n>, p, t);
  if (p.dweight == nullptr && p.dbias == nullptr) return;
  const A* partial = reinterpret_cast<const A*>(p.workspace);
  launch_add_samples<T>(launch, p, partial, partial + t.groups * v.channels(), t.groups,
                        v.channels());
}

template <typename T, typename Launch>
void pixel_norm_bwd(const NormBackward<T>& p, const DeviceLimits& device, Launch&& launch) {
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  if (v.numel() == 0) {
    if ((p.dweight == nullptr && p.dbias == nullptr) || v.channels() == 0) return;
    return launch_add_samples<T>(launch, p, nullptr, nullptr, 0, v.channels());
  }
  if (v.kept % n == 0 && aligned_to_16({p.x, p.dy, p.residual, p.dx, p.dresidual, p.mean, p.var})) {
    pixel_norm_bwd_of_width<n>(p, device, launch);
  } else {
    pixel_norm_bwd_of_width<1>(p, device, launch);
  }
}

}  // namespace fastnorm::cuda
