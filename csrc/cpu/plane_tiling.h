// What both directions of the plane form (plane_norm_cpu.cpp) are made of: chunks and their pieces,
// sums, and the affine map of a channel.
#pragma once

#include "cpu/column_cpu.h"

namespace fastnorm::cpu {

constexpr int64_t kPlaneChunk = 32 * 1024;  // elements
constexpr int64_t kPiece = kChunk;          // elements
constexpr int64_t kFlush = kPiece;          // elements summed in the accumulation type

struct PlaneTiling {
  int64_t length, planes, parts, part, chunks;  // a chunk: `planes` planes, or a part of one
  bool resident, in_order;

  explicit PlaneTiling(const View& v, bool frozen) : length(v.inner) {
    parts = ceil_div(length, kPlaneChunk);
    part = parts > 1 ? round_up(ceil_div(length, parts), kPiece) : length;
    // Frozen statistics need one visit, which goes through memory in order.
    in_order = frozen && length >= kPiece / 2;
    planes = parts > 1 || in_order ? 1 : std::max<int64_t>(1, kPlaneChunk / length);
    chunks = ceil_div(v.reduce_outer, planes) * parts;
    resident = v.reduce_outer * length <= kResident && !in_order;
  }

  // f(channel, chunk) for all of them, in parallel. The second visit is `reversed`.
  template <typename F>
  void for_each_chunk(const View& v, int64_t element_bytes, bool reversed, F&& f) const {
    const int64_t tasks = v.outer * v.kept * chunks;
    const int64_t bytes = std::min(planes, v.reduce_outer) * part * element_bytes;
    if (in_order) {
      parallel_tasks(tasks, bytes, [&](int64_t task) {
        const int64_t row = task / v.kept;
        f(row / chunks * v.kept + task % v.kept, row % chunks);
      });
    } else if (reversed) {
      parallel_tasks_reversed(tasks, bytes, [&](int64_t i) { f(i / chunks, i % chunks); });
    } else {
      parallel_tasks(tasks, bytes, [&](int64_t i) { f(i / chunks, i % chunks); });
    }
  }
};

// Planes [first, last), elements [begin, end) of each; `offset` is that of plane 0 in the tensor.
struct PlaneChunk {
  int64_t offset, stride, first, last, begin, end;

  PlaneChunk(const View& v, const PlaneTiling& t, int64_t o, int64_t channel, int64_t chunk) {
    stride = v.row_size();
    offset = o * v.reduce_outer * stride + channel * t.length;
    first = std::min(chunk / t.parts * t.planes, v.rows_of(o));
    last = std::min(first + t.planes, v.rows_of(o));
    begin = std::min(chunk % t.parts * t.part, t.length);
    end = std::min(begin + t.part, t.length);
  }
  int64_t size() const { return (last - first) * (end - begin); }

  // f(stretches, offset of the piece in the chunk)
  template <typename F>
  void for_each_piece(F&& f) const {
    const int64_t length = end - begin;
    if (length >= kPiece / 2) {
      for (int64_t n = first; n < last; ++n) {
        for (int64_t i = begin; i < end; i += kPiece) {
          f(Stretches{offset + n * stride + i, std::min(kPiece, end - i)},
            (n - first) * length + i - begin);
        }
      }
    } else if (length > 0) {
      const int64_t step = kPiece / length;
      for (int64_t n = first; n < last; n += step) {
        f(Stretches{offset + n * stride + begin, length, std::min(step, last - n), stride},
          (n - first) * length);
      }
    }
  }
};

// Asks for the memory of the next planes while these are worked on: short planes are runs too far
// apart for the hardware to foresee.
template <typename T>
inline void prefetch_next(const T* x, const Stretches& at, int64_t plane_stride) {
  constexpr int64_t kLine = 64 / sizeof(T), kShort = 128 * kLine;
  if (at.length > kShort) return;
  at.for_each([&](int64_t i, int64_t) {
    const T* next = x + i + at.count * plane_stride;
    for (int64_t k = 0; k < at.length; k += kLine) __builtin_prefetch(next + k);
  });
}

// Asks for the next channel while this one is written, if both fit in L2: its planes follow
// directly, and without it the memory idles (16x256x28x28 in float32, forward + backward: 1.6 times
// as fast as eager torch without, 1.9 with).
template <typename T>
inline void prefetch_channel(const T* x, const Stretches& at, const View& v) {
  constexpr int64_t kLine = 64 / sizeof(T), kBytes = 64 * 1024;
  if (v.reduce_outer * v.inner * static_cast<int64_t>(sizeof(T)) > kBytes) return;
  at.for_each([&](int64_t i, int64_t) {
    for (int64_t k = 0; k < at.length; k += kLine) prefetch(x + i + v.inner + k);
  });
}

// Two sums over elements, in double from every kFlush of them on. body(tag, i, a, b) adds to both.
template <typename A>
class PairSum {
 public:
  template <typename F>
  void add(int64_t n, F&& body) {
    constexpr int64_t kStep = 2 * Wide<A>::kSize;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      body(WideTag{}, i, first_[0], second_[0]);
      body(WideTag{}, i + Wide<A>::kSize, first_[1], second_[1]);
    }
    for (; i + Wide<A>::kSize <= n; i += Wide<A>::kSize) {
      body(WideTag{}, i, first_[0], second_[0]);
    }
    for (; i < n; ++i) body(OneTag{}, i, first_one_, second_one_);
    if ((elements_ += n) >= kFlush) flush();
  }
  double first() { return flush(), first_total_; }
  double second() { return flush(), second_total_; }

 private:
  void flush() {
    elements_ = 0;
    first_total_ += (first_[0] + first_[1]).sum() + first_one_;
    second_total_ += (second_[0] + second_[1]).sum() + second_one_;
    for (int k = 0; k < 2; ++k) first_[k] = second_[k] = Wide<A>();
    first_one_ = second_one_ = A(0);
  }

  Wide<A> first_[2], second_[2];
  A first_one_ = 0, second_one_ = 0;
  double first_total_ = 0, second_total_ = 0;
  int64_t elements_ = 0;
};

template <typename A>
struct ChannelMap {
  A mean = 0, scale = 1, bias = 0, c = 0, e = 0;

  ChannelMap(const NormConfig& config, int64_t statistic, int64_t channel, const A* mean_in,
             const A* var_in, const A* weight, const A* bias_in) {
    if (mean_in != nullptr) mean = mean_in[statistic];
    const double r = inverse_std(var_in[statistic], config.eps);
    scale = static_cast<A>(weight != nullptr ? r * weight[channel] : r);
    if (bias_in != nullptr) bias = bias_in[channel];
  }

  // out = finish(tag, i, (x - mean) scale + bias)
  template <typename T, typename O, typename F>
  void normalize(const T* x, O* out, int64_t n, F&& finish) const {
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      const auto v = load(tag, x + i);
      using V = std::remove_const_t<decltype(v)>;
      store(tag, out + i, finish(tag, i, norm(V(v - V(mean)))));
    });
  }
  template <typename T>
  void normalize(const T* x, const Stretches& at, A* out) const {
    at.for_each([&](int64_t i, int64_t j) {
      normalize(x + i, out + j, at.length, [](auto, int64_t, auto v) { return v; });
    });
  }
  template <typename V>
  V norm(V d) const {
    return fmadd(d, V(scale), V(bias));
  }
};

}  // namespace fastnorm::cpu
