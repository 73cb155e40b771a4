// Planes of NCHW, resident: the planes of one statistic stay in the shared memory of a cluster.
//
// Forward for batch norm, backward for batch, group and instance norm, by the formulas of
// column_norm.cuh and column_norm_bwd.cuh. All copies into shared memory are under way before the
// first sum; a thread reads back what it copied itself, so no barrier is needed for them:
//
//   forward   x, then mean, then m2, then y                 2 E b   (streaming: (3 - f) E b)
//   backward  x and dy, then both sums, then dx             3 E b   (streaming: (5 - 2f) E b)
//
// whatever the size of the tensor: on sm_90 a channel may have 1.8 MB of shared memory; one of 256
// x 56 x 56 bfloat16 elements takes all of it, forward, one of 256 x 28 x 28 a quarter. The sums of
// each plane are at hand, so the parameters' gradients cost no pass of their own, which for group
// and instance norm is 2 E b in the row kernels.
//
// What is resident across the whole grid, by a cooperative launch, is not done. It could hold 132 x
// 200 KB = 26 MB, of which L2 keeps as much between the passes of the streaming form (f = 1): the
// bytes of DRAM are 2 E b and 3 E b either way, and three grid barriers of 1 to 2 us stand for the
// two launches saved. In NHWC a cluster is no use either: 64 channels are what a 128-byte access
// needs, and 1.6 MB of them are 12544 pixels, so that only tensors of more than 1200 channels would
// be larger than L2 and yet fit.
//
// A plane is `parts` segments of `lines` lines of 32 packs; a warp takes a segment at a time. Packs
// are aligned ones, the first and the last of a plane may be ragged.
#pragma once

#include "cuda/column_norm_bwd.cuh"
#include "cuda/row_norm_grads.cuh"

namespace fastnorm::cuda {

inline constexpr int kResidentThreads = 256;
inline constexpr int kSegmentLines = 8;         // at most
inline constexpr int64_t kResidentPacks = 24;   // of a plane, at least: of 32 slots
inline constexpr size_t kComfortable = 100000;  // bytes of a block that leave room for a second one
inline constexpr size_t kResidentLeast = 16 << 10;  // bytes of a block that aren't split further

struct ResidentTiling {
  int64_t length, planes;       // of a plane; of a statistic
  int64_t parts, segments;      // of a plane; of a block
  int lines, threads, cluster;  // cluster 0: no cluster holds a statistic
  size_t shared;
  bool aligned;

  // `tensors` of them are kept in shared memory.
  template <typename T>
  static ResidentTiling of(const View& v, int tensors, const DeviceLimits& device) {
    constexpr int n = kPackSize<T>;
    ResidentTiling t{};
    if (v.inner < 2 || v.tail != v.reduce_outer) return t;
    // Samples with other places of their packs would have other bits alone than in a batch.
    if (v.reduce_outer == 1 && v.row_size() % n != 0) return t;
    t.length = v.inner;
    t.planes = v.reduce_outer * v.channels_per_kept();
    const int64_t packs = ceil_div(t.length + n - std::gcd(t.length, int64_t{n}), n);
    if (packs < kResidentPacks) return t;
    const int64_t lines = ceil_div(packs, 32);
    t.parts = ceil_div(lines, kSegmentLines);
    t.lines = static_cast<int>(ceil_div(lines, t.parts));
    const int widest = device.clusters ? kRowCluster : 1;
    const int64_t wanted = kProcessors / 2;  // blocks of a sample, where it has the bytes for them
    for (int cluster = 1; cluster <= widest; cluster *= 2) {
      t.segments = ceil_div(t.planes * t.parts, cluster);
      const size_t stage = static_cast<size_t>(tensors * t.segments * t.lines) * 32 * 16;
      t.shared = kRowScratch * sizeof(Accumulate<T>) + stage;
      const bool small = stage <= kResidentLeast, full = v.kept * cluster >= wanted;
      const bool last = cluster == widest;
      if (t.shared <= (last ? device.max_shared : kComfortable) && (small || full)) {
        t.threads = 32 * static_cast<int>(std::min<int64_t>(t.segments, kResidentThreads / 32));
        t.cluster = cluster;
        return t;
      }
    }
    return t;
  }
  FASTNORM_HD RowShape shape() const { return {threads, cluster}; }
  LaunchShape launch(const View& v) const {
    return {static_cast<unsigned>(v.statistics() * cluster), static_cast<unsigned>(threads), shared,
            static_cast<unsigned>(cluster)};
  }
  // Rows of [channels] sums that the backward kernel stores, one for each segment of a channel.
  FASTNORM_HD int64_t partial_rows(const View& v) const { return v.outer * v.reduce_outer * parts; }
};

// A warp's segment: some lines of a plane.
struct PlaneSegment {
  int64_t channel, chunk;  // chunk: the segment's number among those of its channel
  int64_t start, begin;    // the plane's first element; the segment's first pack less the skew
};

// A block's segments of statistic (o, kept), and where they lie in shared memory.
template <typename T>
struct ResidentBlock {
  static constexpr int n = kPackSize<T>;
  const View& v;
  const ResidentTiling& t;
  int64_t o, kept, first, count;
  T* stage;

  FASTNORM_DEVICE ResidentBlock(const View& view, const ResidentTiling& tiling, void* memory)
      : v(view), t(tiling) {
    const int64_t unit = blockIdx.x / t.cluster, total = t.planes * t.parts;
    o = divide(unit, v.kept);
    kept = unit - o * v.kept;
    first = t.cluster == 1 ? 0 : cluster_rank() * t.segments;
    const int64_t left = total - first;
    count = left < 0 ? 0 : left < t.segments ? left : t.segments;
    stage = static_cast<T*>(memory) + threadIdx.x % 32 * n;
  }
  FASTNORM_DEVICE int64_t statistic() const { return o * v.kept + kept; }
  FASTNORM_DEVICE int64_t first_element() const {
    return o * v.reduce_outer * v.row_size() + kept * v.reduce_inner;
  }
  // From a pack of the first tensor to that of the next.
  FASTNORM_DEVICE int64_t tensor() const { return t.segments * t.lines * 32 * n; }

  // This thread's packs: begin(segment), each(span, its place in shared memory), end(segment),
  // whole warps at a time.
  template <typename Begin, typename Each, typename End>
  FASTNORM_DEVICE void walk(Begin&& begin, Each&& each, End&& end) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t per_kept = v.channels_per_kept();
#pragma unroll 1
    for (int64_t own = warp; own < count; own += blockDim.x / 32) {
      const int64_t plane = divide(first + own, t.parts), part = first + own - plane * t.parts;
      const int64_t row = divide(plane, per_kept), channel = plane - row * per_kept;
      const int64_t start =
          (o * v.reduce_outer + row) * v.row_size() + kept * v.reduce_inner + channel * t.length;
      const PlaneSegment segment{kept * per_kept + channel, row * t.parts + part, start,
                                 part * t.lines * 32 * n - start % n};
      begin(segment);
#pragma unroll 2
      for (int i = 0; i < t.lines; ++i) {
        const int64_t at = segment.begin + (i * 32 + lane) * n, left = t.length - at;
        Span s{start + at, at < 0 ? static_cast<int>(-at) : 0,
               left < n ? static_cast<int>(left) : n, false};
        if (!s.any()) continue;
        s.whole = s.low == 0 && s.high == n && t.aligned;
        each(s, stage + (own * t.lines + i) * 32 * n);
      }
      end(segment);
    }
  }
  template <typename Each>
  FASTNORM_DEVICE void walk(Each&& each) const {
    walk([](const PlaneSegment&) {}, each, [](const PlaneSegment&) {});
  }
};

template <typename T>
__global__ __launch_bounds__(kResidentThreads, 2) void plane_resident_fwd_kernel(NormForward<T> p,
                                                                                 ResidentTiling t) {
  using A = Accumulate<T>;
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  if (t.cluster > 1) cluster_arrive();
  const ResidentBlock<T> block(v, t, scratch + kRowScratch);
  const bool centered = p.config.statistic == Statistic::MeanVar, add = p.residual != nullptr;
  const int64_t statistic = block.statistic();
  block.walk([&](const Span& s, T* place) { fetch_span<n>(p.x, s, place); });
  copy_async_commit();
  // Less an element, which rounding doesn't touch: equal elements have that mean.
  A base = A(0);
  if (centered && threadIdx.x % 32 == 0) base = widen(load(p.x + block.first_element()));
  base = __shfl_sync(kFullWarp, base, 0);
  const A size = static_cast<A>(t.planes * t.length);
  if (t.cluster > 1) cluster_wait();
  copy_async_wait<0>();

  A mean = base, sum[1] = {0}, square[1] = {0};
  if (centered) {
    block.walk([&](const Span& s, T* place) {
      const Pack<T, n> x = shared_load<n>(place);
#pragma unroll
      for (int e = 0; e < n; ++e) sum[0] += s.has(e) ? widen(x.v[e]) - base : A(0);
    });
    row_sum(sum, t.shape(), scratch);
    mean += sum[0] / size;
  }
  block.walk([&](const Span& s, T* place) {
    const Pack<T, n> x = shared_load<n>(place);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      const A d = s.has(e) ? widen(x.v[e]) - mean : A(0);
      square[0] += d * d;
    }
  });
  row_sum(square, t.shape(), scratch + kMaxWarps + kMaxCluster);
  const A var = square[0] / size;
  if (threadIdx.x == 0 && block.first == 0) {
    if (centered) store(p.mean + statistic, mean);
    store(p.var + statistic, var);
  }

  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  const A rstd = A(1) / sqrt(var + static_cast<A>(p.config.eps));
  PlaneAffine<A> affine{p.config.is_row(), mean, rstd, A(0), A(0)};
  block.walk(
      [&](const PlaneSegment& segment) {
        affine.weight = weight_of<T>(p.weight, p.config.weight_offset, segment.channel);
        affine.bias = parameter_of<T>(p.bias, segment.channel, A(0));
      },
      [&](const Span& s, T* place) {
        Pack<T, n> residual{};
        if (add) residual = load_span<n>(p.residual, s, false);
        A y[n];
        affine_of_pack(shared_load<n>(place), affine, add, residual, y);
        activate(y, p.config.activation);
        drop_span(drop, y, s.index);
        store_span(p.y, s, narrow<T>(y));
      },
      [](const PlaneSegment&) {});
}

template <typename T>
__global__ __launch_bounds__(
    kResidentThreads, (sizeof(T) == 8 ? 1 : 2)) void plane_resident_bwd_kernel(NormBackward<T> p,
                                                                               ResidentTiling t) {
  using A = Accumulate<T>;
  constexpr int n = kPackSize<T>;
  const View& v = p.config.view;
  const Activation activation = p.config.activation;
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  if (t.cluster > 1) cluster_arrive();
  const ResidentBlock<T> block(v, t, scratch + kRowScratch);
  block.walk([&](const Span& s, T* place) {
    fetch_span<n>(p.x, s, place);
    fetch_span<n>(p.dy, s, place + block.tensor());
  });
  copy_async_commit();
  A* partial = reinterpret_cast<A*>(p.workspace);  // [2][partial_rows][channels]
  const bool add = p.residual != nullptr && activation != Activation::None;
  const bool parameters = p.dweight != nullptr || p.dbias != nullptr;
  const Drop<A> drop = Drop<A>::of(p.config.dropout);
  // These gradients are dy or zero: the second pass needs no more than them.
  const bool exact = !drop.on && (activation == Activation::None || activation == Activation::Relu);
  const A mean = p.mean == nullptr ? A(0) : load(p.mean + block.statistic());
  const A rstd = rstd_of(p.var, block.statistic(), p.config.eps);
  const A size = static_cast<A>(t.planes * t.length);
  PlaneAffine<A> affine{p.config.is_row(), mean, rstd, A(0), A(0)};
  const auto load_channel = [&](const PlaneSegment& segment) {
    affine.weight = weight_of<T>(p.weight, p.config.weight_offset, segment.channel);
    affine.bias = parameter_of<T>(p.bias, segment.channel, A(0));
  };
  // d = x - mean, and dy; then the gradient behind the activation, by the forward pass's roundings.
  const auto read = [&](T* place, A(&d)[n], A(&h)[n]) {
    widen(shared_load<n>(place), d);
    widen(shared_load<n>(place + block.tensor()), h);
#pragma unroll
    for (int e = 0; e < n; ++e) d[e] -= mean;
  };
  const auto activate_gradient = [&](const Span& s, const A(&d)[n], A(&h)[n]) {
    drop_span(drop, h, s.index);
    if (activation == Activation::None) return;
    A pre[n], r[n];
#pragma unroll
    for (int e = 0; e < n; ++e) pre[e] = affine.map(d[e], e);
    if (add) {
      widen(load_span<n>(p.residual, s, true), r);
#pragma unroll
      for (int e = 0; e < n; ++e) pre[e] += r[e];
    }
    activate_backward<false>(h, pre, activation);
  };
  if (t.cluster > 1) cluster_wait();
  copy_async_wait<0>();

  A total[2] = {0, 0}, own[2] = {0, 0};
  block.walk(
      [&](const PlaneSegment& segment) {
        load_channel(segment);
        own[0] = own[1] = A(0);
      },
      [&](const Span& s, T* place) {
        A d[n], h[n];
        read(place, d, h);
        activate_gradient(s, d, h);
        if (exact && activation != Activation::None) {
          shared_store(place + block.tensor(), narrow<T>(h));
        }
#pragma unroll
        for (int e = 0; e < n; ++e) {
          own[0] += s.has(e) ? h[e] * d[e] : A(0);
          own[1] += s.has(e) ? h[e] : A(0);
        }
      },
      [&](const PlaneSegment& segment) {
        warp_sum(own);
        own[0] *= rstd;
        total[0] += affine.weight * own[0];
        total[1] += affine.weight * own[1];
        if (!parameters || threadIdx.x % 32 != 0) return;
        const int64_t at = (block.o * v.reduce_outer * t.parts + segment.chunk) * v.channels();
        store(partial + at + segment.channel, own[0]);
        store(partial + t.partial_rows(v) * v.channels() + at + segment.channel, own[1]);
      });
  if (threadIdx.x % 32 != 0) total[0] = total[1] = A(0);  // every lane has its warp's
  row_sum(total, t.shape(), scratch);
  const A mean_gx = total[0] / size, mean_g = p.mean == nullptr ? A(0) : total[1] / size;

  block.walk(
      load_channel,
      [&](const Span& s, T* place) {
        A d[n], h[n];
        read(place, d, h);
        if (!exact) activate_gradient(s, d, h);
        if (p.dresidual != nullptr) store_span(p.dresidual, s, narrow<T>(h));
#pragma unroll
        for (int e = 0; e < n; ++e) {
          h[e] = rstd * (h[e] * affine.weight - mean_g - d[e] * rstd * mean_gx);
        }
        store_span(p.dx, s, narrow<T>(h));
      },
      [](const PlaneSegment&) {});
}

// Whether the launch took place.
template <typename T, typename Launch>
bool plane_resident_fwd(const NormForward<T>& p, const DeviceLimits& device, Launch&& launch) {
  const View& v = p.config.view;
  if (p.config.frozen || v.numel() == 0) return false;
  ResidentTiling t = ResidentTiling::of<T>(v, 1, device);
  if (t.cluster == 0) return false;
  t.aligned = aligned_to_16({p.x, p.residual, p.y});
  launch("plane_resident_fwd", t.launch(v), plane_resident_fwd_kernel<T>, p, t);
  return true;
}

// Bytes of workspace; 0 where the backward pass isn't this form's.
template <typename T>
size_t plane_resident_bwd_workspace_bytes(const NormConfig& config, const DeviceLimits& device) {
  const View& v = config.view;
  if (config.frozen || v.numel() == 0) return 0;
  const ResidentTiling t = ResidentTiling::of<T>(v, 2, device);
  if (t.cluster == 0) return 0;
  return 2 * sizeof(Accumulate<T>) * static_cast<size_t>(t.partial_rows(v) * v.channels());
}

template <typename T, typename Launch>
bool plane_resident_bwd(const NormBackward<T>& p, const DeviceLimits& device, Launch&& launch) {
  const View& v = p.config.view;
  if (p.dx == nullptr || plane_resident_bwd_workspace_bytes<T>(p.config, device) == 0) return false;
  ResidentTiling t = ResidentTiling::of<T>(v, 2, device);
  t.aligned = aligned_to_16({p.x, p.dy, p.residual, p.dx, p.dresidual});
  launch("plane_resident_bwd", t.launch(v), plane_resident_bwd_kernel<T>, p, t);
  if (p.dweight == nullptr && p.dbias == nullptr) return true;
  const auto* partial = reinterpret_cast<const Accumulate<T>*>(p.workspace);
  launch_add_samples<T>(launch, p, partial, partial + t.partial_rows(v) * v.channels(),
                        t.partial_rows(v), v.channels());
  return true;
}

}  // namespace fastnorm::cuda
