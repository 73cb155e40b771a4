// What both directions of the plane form (plane_norm_cpu.cpp) are made of: chunks and their pieces,
// sums, and the affine map of a channel.
#pragma once

#include "cpu/column_cpu.h"

namespace fastnorm::cpu {

constexpr int64_t kPlaneChunk = 32 * 1024;  // elements
constexpr int64_t kPiece = kChunk;          // elements

struct PlaneTiling {
  int64_t statistics, length, planes, stride;  // a statistic: `planes` planes, `stride` apart
  bool per_channel;                            // its planes are channels, not rows
  int64_t group, parts, part, chunks;          // a chunk: `group` planes, or a part of one
  bool resident, in_order;

  explicit PlaneTiling(const View& v, bool frozen = false)
      : statistics(v.statistics()),
        length(v.inner),
        planes(v.reduce_outer * v.channels_per_kept()),
        stride(v.reduce_outer == 1 ? length : v.row_size()),
        per_channel(v.channels_per_kept() > 1) {
    parts = ceil_div(length, kPlaneChunk);
    part = parts > 1 ? round_up(ceil_div(length, parts), kPiece) : length;
    // Frozen statistics need one visit, which goes through memory in order.
    in_order = frozen && length >= kPiece / 2;
    group = parts > 1 || in_order ? 1 : std::max<int64_t>(1, kPlaneChunk / length);
    chunks = ceil_div(planes, group) * parts;
    resident = planes * length <= kResident && !in_order;
  }

  // How far behind an element that of the next statistic lies, which is asked for while this one
  // is written if both stay in L2: without it the memory idles (16x256x28x28 in float32, forward +
  // backward: 1.6 times as fast as eager torch without, 1.9 with).
  int64_t ahead(int64_t element_bytes) const {
    constexpr int64_t kBytes = 128 * 1024;
    if (statistic_bytes(element_bytes) > kBytes) return 0;
    return per_channel ? planes * length : length;
  }

  // Channels of a statistic, and the partial sums of each.
  int64_t channels() const { return per_channel ? planes : 1; }
  int64_t pieces() const { return per_channel ? parts : chunks; }

  int64_t statistic_bytes(int64_t element_bytes) const { return planes * length * element_bytes; }

  // f(first, end) for statistics that are visited twice before the next ones are: as many as the
  // last level cache keeps from the first visit to the second.
  template <typename F>
  void for_each_wave(int64_t element_bytes, F&& f) const {
    constexpr int64_t kWaveBytes = 8 * 1024 * 1024;
    const int64_t wave = std::max<int64_t>(1, kWaveBytes / statistic_bytes(element_bytes));
    for (int64_t k = 0; k < statistics; k += wave) f(k, std::min(k + wave, statistics));
  }

  // f(statistic, chunk) for those of statistics [begin, end), in parallel. The second visit is
  // `reversed`.
  template <typename F>
  void for_each_chunk(int64_t begin, int64_t end, int64_t element_bytes, bool reversed,
                      F&& f) const {
    const int64_t tasks = (end - begin) * chunks;
    const int64_t bytes = std::min(group, planes) * part * element_bytes;
    const auto run = [&](int64_t i) { f(begin + i / chunks, i % chunks); };
    reversed ? parallel_tasks_reversed(tasks, bytes, run) : parallel_tasks(tasks, bytes, run);
  }

  // The same for all statistics, in the order of memory.
  template <typename F>
  void for_each_chunk_in_order(const View& v, int64_t element_bytes, F&& f) const {
    parallel_tasks(statistics * chunks, part * element_bytes, [&](int64_t task) {
      const int64_t row = task / v.kept;
      f(row / chunks * v.kept + task % v.kept, row % chunks);
    });
  }
};

// Planes [first, last) of a statistic, elements [begin, end) of each; `offset` is that of plane 0
// in the tensor.
struct PlaneChunk {
  int64_t offset, stride, first, last, begin, end;

  PlaneChunk(const View& v, const PlaneTiling& t, int64_t statistic, int64_t chunk) {
    const int64_t o = statistic / v.kept;
    const int64_t planes = t.per_channel ? t.planes : v.rows_of(o);
    stride = t.stride;
    offset = o * v.reduce_outer * v.row_size() + statistic % v.kept * v.reduce_inner;
    first = std::min(chunk / t.parts * t.group, planes);
    last = std::min(first + t.group, planes);
    begin = std::min(chunk % t.parts * t.part, t.length);
    end = std::min(begin + t.part, t.length);
  }
  int64_t size() const { return (last - first) * (end - begin); }

  // The same elements as one plane, if nothing lies between them.
  PlaneChunk joined() const {
    PlaneChunk c = *this;
    if (stride != end - begin) return c;
    c.offset += first * stride;
    c.end = size();
    c.first = 0;
    c.last = c.end > 0;
    return c;
  }

  // f(stretches, first plane, offset of the piece in the chunk)
  template <typename F>
  void for_each_piece(F&& f) const {
    const int64_t length = end - begin;
    if (length >= kPiece / 2) {
      for (int64_t n = first; n < last; ++n) {
        for (int64_t i = begin; i < end; i += kPiece) {
          f(Stretches{offset + n * stride + i, std::min(kPiece, end - i)}, n,
            (n - first) * length + i - begin);
        }
      }
    } else if (length > 0) {
      const int64_t step = kPiece / length;
      for (int64_t n = first; n < last; n += step) {
        f(Stretches{offset + n * stride + begin, length, std::min(step, last - n), stride}, n,
          (n - first) * length);
      }
    }
  }
};

// Asks for the memory of the next planes while these are worked on: short planes are runs too far
// apart for the hardware to foresee.
template <typename T>
inline void prefetch_next(const T* x, const Stretches& at) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (at.count == 1 || at.stride == at.length) return;
  at.for_each([&](int64_t i, int64_t) {
    const T* next = x + i + at.count * at.stride;
    for (int64_t k = 0; k < at.length; k += kLine) __builtin_prefetch(next + k);
  });
}

// y = (x - mean) scale + bias of a channel, and dx = scale g + c (x - mean) + e.
template <typename A>
struct ChannelMap {
  A mean = 0, scale = 1, bias = 0, c = 0, e = 0;

  // out = finish(tag, i, (x - mean) scale + bias), while x is prefetched `ahead`
  template <typename T, typename O, typename F>
  void normalize(const T* x, int64_t ahead, O* out, int64_t n, F&& finish) const {
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      prefetch(x + ahead + i);
      const auto v = load(tag, x + i);
      using V = std::remove_const_t<decltype(v)>;
      store(tag, out + i, finish(tag, i, norm(V(v - V(mean)))));
    });
  }
  template <typename V>
  V norm(V d) const {
    return fmadd(d, V(scale), V(bias));
  }
};

// The maps of the planes of one statistic.
template <typename A>
class PlaneMaps {
 public:
  PlaneMaps(const NormConfig& config, bool per_channel, int64_t statistic, const A* mean,
            const A* var, const A* weight, const A* bias)
      : r_(inverse_std(var[statistic], config.eps)),
        mean_(mean != nullptr ? mean[statistic] : A(0)),
        step_(per_channel),
        weight_(weight),
        bias_(bias) {
    const int64_t first = statistic % config.view.kept * config.view.channels_per_kept();
    if (weight != nullptr) weight_ += first;
    if (bias != nullptr) bias_ += first;
  }

  double rstd() const { return r_; }
  double weight(int64_t plane) const { return weight_ != nullptr ? weight_[plane * step_] : 1.0; }
  void set_gradient(double c, double e) {
    c_ = static_cast<A>(c);
    e_ = static_cast<A>(e);
  }
  ChannelMap<A> operator[](int64_t plane) const {
    const A bias = bias_ != nullptr ? bias_[plane * step_] : A(0);
    return {mean_, static_cast<A>(r_ * weight(plane)), bias, c_, e_};
  }

 private:
  const double r_;
  const A mean_;
  const int64_t step_;
  const A *weight_, *bias_;
  A c_ = 0, e_ = 0;
};

}  // namespace fastnorm::cpu
