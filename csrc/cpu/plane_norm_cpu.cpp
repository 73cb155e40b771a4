// The plane form: batch norm of NCHW. A channel is `reduce_outer` planes of `inner` contiguous
// elements, a row of all channels apart. It is cut into chunks, of several planes or of a part of
// one, and a chunk into pieces that fit in L1; short planes are gathered, so that every loop runs
// over a contiguous piece.
//
// A channel that fits in L2 is one task: sums, then the map, one read of DRAM. A larger one is
// split: all chunks' sums, merged per channel in index order, then the map, backwards so that the
// cache still holds the end.
//
// Backward, with d = x - mean, r = 1 / sqrt(var + eps), g the gradient of the norm, w the weight,
// and n the elements of a channel:
//   dbias = sum(g), dweight = r sum(g d)
//   dx = r w g + c d + e,  c = -r^3 w sum(g d) / n,  e = -r w sum(g) / n
#include "cpu/plane_tiling.h"

namespace fastnorm::cpu {
namespace {

template <typename T>
class PlaneForward {
  using A = acc_t<T>;

 public:
  explicit PlaneForward(const NormForward<T>& p)
      : p_(p), v_(p.config.view), t_(v_, p.config.frozen) {}

  void run() {
    const int64_t channels = v_.outer * v_.kept;
    const int64_t bytes = v_.reduce_outer * t_.length * static_cast<int64_t>(sizeof(T));
    if (t_.resident) {
      return parallel_tasks(channels, bytes, [&](int64_t channel) { visit(channel); });
    }
    if (!p_.config.frozen) split_statistics(channels);
    t_.for_each_chunk(v_, sizeof(T), true,
                      [&](int64_t channel, int64_t index) { map(channel, index); });
  }

 private:
  PlaneChunk chunk(int64_t channel, int64_t index) const {
    return PlaneChunk(v_, t_, channel / v_.kept, channel % v_.kept, index);
  }

  void split_statistics(int64_t channels) {
    const auto moments = uninitialized<Moments<double>>(channels * t_.chunks);
    t_.for_each_chunk(v_, sizeof(T), false, [&](int64_t channel, int64_t index) {
      moments[channel * t_.chunks + index] = chunk_moments(chunk(channel, index));
    });
    for (int64_t channel = 0; channel < channels; ++channel) {
      Moments<double> total = moments[channel * t_.chunks];
      for (int64_t i = 1; i < t_.chunks; ++i) total.merge(moments[channel * t_.chunks + i]);
      finish_statistics(channel, total);
    }
  }

  void visit(int64_t channel) {
    if (!p_.config.frozen) {
      Moments<double> total;
      for (int64_t i = 0; i < t_.chunks; ++i) total.merge(chunk_moments(chunk(channel, i)));
      finish_statistics(channel, total);
    }
    for (int64_t i = t_.chunks; i-- > 0;) map(channel, i);
  }

  Moments<double> chunk_moments(const PlaneChunk& chunk) const {
    const bool centered = p_.config.statistic == Statistic::MeanVar;
    A shift = 0;
    bool first = centered;
    PairSum<A> sums;
    chunk.for_each_piece([&](const Stretches& at, int64_t) {
      prefetch_next(p_.x, at, chunk.stride);
      at.for_each([&](int64_t offset, int64_t) {
        const T* x = p_.x + offset;
        if (first) shift = mean_of(x, at.length);
        first = false;
        sums.add(at.length, [&](auto tag, int64_t i, auto& sum, auto& square) {
          const auto v = load(tag, x + i);
          using V = std::remove_const_t<decltype(v)>;
          const V d = v - V(shift);
          sum += d;
          square = fmadd(d, d, square);
        });
      });
    });
    Moments<double> m;
    m.count = static_cast<double>(chunk.size());
    if (m.count == 0) return m;
    const double s = sums.first(), square = sums.second();
    m.mean = centered ? shift + s / m.count : 0.0;
    m.m2 = centered ? square - s * s / m.count : square;
    if (m.m2 < 0) m.m2 = 0;
    return m;
  }

  static A mean_of(const T* x, int64_t n) {
    const A x0 = static_cast<A>(x[0]);
    LaneSum<A> sum;
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      const auto v = load(tag, x + i);
      using V = std::remove_const_t<decltype(v)>;
      sum.add(v - V(x0));
    });
    return x0 + sum.total() / static_cast<A>(n);
  }

  void finish_statistics(int64_t channel, const Moments<double>& m) const {
    if (p_.mean != nullptr) p_.mean[channel] = static_cast<A>(m.mean);
    p_.var[channel] = static_cast<A>(m.m2 / m.count);
  }

  void map(int64_t channel, int64_t index) const {
    const ChannelMap<A> map(p_.config, channel, channel % v_.kept, p_.mean, p_.var, p_.weight,
                            p_.bias);
    const bool epilogue = has_epilogue(p_.config, p_.residual), relu = is_fused_relu(p_);
    const bool direct = !epilogue || relu;
    alignas(64) A values[kPiece];
    chunk(channel, index).for_each_piece([&](const Stretches& at, int64_t) {
      prefetch_channel(p_.x, at, v_);
      if (!direct) {
        map.normalize(p_.x, at, values);
        return finish_forward(p_.config, at, values, p_.residual, p_.y);
      }
      at.for_each([&](int64_t offset, int64_t) {
        const T* x = p_.x + offset;
        T* y = p_.y + offset;
        if (!relu) {
          map.normalize(x, y, at.length, [](auto, int64_t, auto v) { return v; });
        } else if (p_.residual == nullptr) {
          map.normalize(x, y, at.length, [](auto, int64_t, auto v) { return Relu::forward(v); });
        } else {
          map.normalize(x, y, at.length,
                        [residual = p_.residual + offset](auto tag, int64_t i, auto v) {
                          return Relu::forward(v + load(tag, residual + i));
                        });
        }
      });
    });
  }

  const NormForward<T>& p_;
  const View& v_;
  const PlaneTiling t_;
};

template <typename T>
class PlaneBackward {
  using A = acc_t<T>;
  struct Sums {
    double g = 0, gd = 0;
  };

 public:
  explicit PlaneBackward(const NormBackward<T>& p)
      : p_(p),
        v_(p.config.view),
        t_(v_, p.config.frozen),
        epilogue_(has_backward_epilogue(p)),
        relu_(is_fused_relu(p) && (p.dresidual == nullptr || p.residual != nullptr)) {
    parameters_ = p.dweight != nullptr || p.dbias != nullptr;
    sums_ = parameters_ || (p.dx != nullptr && !p.config.frozen);
    fused_dx_ = sums_ && p.config.frozen ? p.dx : nullptr;
    map_needed_ =
        sums_ ? p.dx != nullptr && fused_dx_ == nullptr : p.dx != nullptr || p.dresidual != nullptr;
    // What has been worked out is read back, instead of worked out again.
    if (sums_ && map_needed_ && epilogue_) {
      stored_ = reads_back(p) ? p.dresidual : nullptr;
      if (stored_ == nullptr && !relu_ && !t_.resident && is_exact_enough<T>(v_)) stored_ = p.dx;
    }
  }

  void run() {
    const int64_t channels = v_.outer * v_.kept;
    const int64_t bytes = 2 * v_.reduce_outer * t_.length * static_cast<int64_t>(sizeof(T));
    const auto totals = uninitialized<Sums>(channels);
    if (t_.resident) {
      parallel_tasks(channels, bytes, [&](int64_t channel) {
        A* cache = nullptr;
        if (epilogue_ && sums_ && map_needed_ && !relu_ && stored_ == nullptr) {
          cache = thread_scratch<A, Slot::Gradient>(v_.reduce_outer * t_.length);
        }
        for (int64_t i = 0; sums_ && i < t_.chunks; ++i) {
          add(totals[channel], chunk_sums(channel, i, part_of(cache, channel, i)));
        }
        for (int64_t i = t_.chunks; map_needed_ && i-- > 0;) {
          map(channel, i, totals[channel], part_of(cache, channel, i));
        }
      });
    } else {
      if (sums_) split_sums(channels, totals.get());
      if (map_needed_) {
        t_.for_each_chunk(v_, 2 * sizeof(T), true, [&](int64_t channel, int64_t index) {
          map(channel, index, totals[channel], nullptr);
        });
      }
    }
    if (parameters_) parameter_gradients(totals.get());
  }

 private:
  static void add(Sums& total, const Sums& s) {
    total.g += s.g;
    total.gd += s.gd;
  }

  PlaneChunk chunk(int64_t channel, int64_t index) const {
    return PlaneChunk(v_, t_, channel / v_.kept, channel % v_.kept, index);
  }

  // A resident channel's chunks are whole planes.
  A* part_of(A* cache, int64_t channel, int64_t index) const {
    if (cache == nullptr) return nullptr;
    const PlaneChunk c = chunk(channel, index);
    return cache + c.first * t_.length + c.begin * (c.last - c.first);
  }

  void split_sums(int64_t channels, Sums* totals) {
    const auto partial = uninitialized<Sums>(channels * t_.chunks);
    t_.for_each_chunk(v_, 2 * sizeof(T), false, [&](int64_t channel, int64_t index) {
      partial[channel * t_.chunks + index] = chunk_sums(channel, index, nullptr);
    });
    for (int64_t task = 0; task < channels * t_.chunks; ++task) {
      add(totals[task / t_.chunks], partial[task]);
    }
  }

  void parameter_gradients(const Sums* totals) const {
    for (int64_t c = 0; c < v_.kept; ++c) {
      double db = 0, dw = 0;
      for (int64_t o = 0; o < v_.outer; ++o) {
        const int64_t channel = o * v_.kept + c;
        db += totals[channel].g;
        dw += inverse_std(p_.var[channel], p_.config.eps) * totals[channel].gd;
      }
      if (p_.dbias != nullptr) p_.dbias[c] = static_cast<A>(db);
      if (p_.dweight != nullptr) p_.dweight[c] = static_cast<A>(dw);
    }
  }

  ChannelMap<A> channel_map(int64_t channel) const {
    return ChannelMap<A>(p_.config, channel, channel % v_.kept, p_.mean, p_.var, p_.weight,
                         p_.bias);
  }

  void gradient(const ChannelMap<A>& map, const Stretches& at, A* pre, A* grad,
                T* dresidual) const {
    if (p_.config.activation != Activation::None) map.normalize(p_.x, at, pre);
    start_backward(p_.config, at, p_.dy, p_.residual, pre, grad, dresidual);
  }

  // Calls f(grad) with the gradient behind a ReLU as a function grad(tag, d, element from
  // `offset`), which also writes it to dresidual.
  template <typename F>
  void with_relu_gradient(const ChannelMap<A>& map, int64_t offset, T* dresidual, F&& f) const {
    const T* dy = p_.dy + offset;
    if (p_.residual == nullptr) {
      return f([=](auto tag, auto d, int64_t i) {
        return relu_gradient(map.norm(d), load(tag, dy + i));
      });
    }
    const T* residual = p_.residual + offset;
    const auto grad = [=](auto tag, auto d, int64_t i) {
      return relu_gradient(map.norm(d) + load(tag, residual + i), load(tag, dy + i));
    };
    if (dresidual == nullptr) return f(grad);
    T* out = dresidual + offset;
    f([=](auto tag, auto d, int64_t i) {
      const auto g = grad(tag, d, i);
      store(tag, out + i, g);
      return g;
    });
  }

  static void scale_to(const A* g, A scale, int64_t n, T* out) {
    for_each_wide<A>(n,
                     [&](auto tag, int64_t i) { store(tag, out + i, load(tag, g + i) * scale); });
  }

  // A cache keeps g in the order of the pieces.
  Sums chunk_sums(int64_t channel, int64_t index, A* cache) const {
    const ChannelMap<A> map = channel_map(channel);
    alignas(64) A pre[kPiece], grad[kPiece];
    PairSum<A> sums;
    const auto add_sums = [&](int64_t offset, int64_t n, auto&& gradient_at) {
      const T* x = p_.x + offset;
      sums.add(n, [&](auto tag, int64_t i, auto& sum_g, auto& sum_gd) {
        const auto v = load(tag, x + i);
        using V = std::remove_const_t<decltype(v)>;
        const V d = v - V(map.mean), g = gradient_at(tag, d, i);
        sum_g += g;
        sum_gd = fmadd(g, d, sum_gd);
      });
    };
    const auto add_from = [&](int64_t offset, int64_t n, const auto* g) {
      add_sums(offset, n, [=](auto tag, auto, int64_t i) { return load(tag, g + i); });
    };
    const int64_t stride = v_.row_size();
    chunk(channel, index).for_each_piece([&](const Stretches& at, int64_t first) {
      prefetch_next(p_.x, at, stride);
      prefetch_next(p_.dy, at, stride);
      if (relu_ && fused_dx_ == nullptr) {
        at.for_each([&](int64_t i, int64_t) {
          with_relu_gradient(map, i, p_.dresidual,
                             [&](auto gradient_at) { add_sums(i, at.length, gradient_at); });
        });
      } else if (!epilogue_ && fused_dx_ == nullptr) {
        at.for_each([&](int64_t i, int64_t) { add_from(i, at.length, p_.dy + i); });
      } else if (!epilogue_) {
        at.for_each([&](int64_t offset, int64_t) {
          add_sums(offset, at.length,
                   [scale = map.scale, dy = p_.dy + offset, dx = fused_dx_ + offset](auto tag, auto,
                                                                                     int64_t i) {
                     const auto g = load(tag, dy + i);
                     store(tag, dx + i, g * scale);
                     return g;
                   });
        });
      } else {
        A* g = cache != nullptr ? cache + first : grad;
        gradient(map, at, pre, g, p_.dresidual != nullptr ? p_.dresidual : stored_);
        at.for_each([&](int64_t i, int64_t j) {
          add_from(i, at.length, g + j);
          if (fused_dx_ != nullptr) scale_to(g + j, map.scale, at.length, fused_dx_ + i);
        });
      }
    });
    return {sums.first(), sums.second()};
  }

  void map(int64_t channel, int64_t index, const Sums& total, const A* cache) const {
    ChannelMap<A> map = channel_map(channel);
    if (!p_.config.frozen) {
      const int64_t o = channel / v_.kept;
      const double n = static_cast<double>(v_.rows_of(o)) * static_cast<double>(t_.length);
      const double r = inverse_std(p_.var[channel], p_.config.eps), scale = map.scale;
      map.c = static_cast<A>(-r * r * scale * total.gd / n);
      if (p_.config.statistic == Statistic::MeanVar) map.e = static_cast<A>(-scale * total.g / n);
    }
    const auto to_input = [&](int64_t offset, int64_t n, auto&& gradient_at) {
      const T* x = p_.x + offset;
      T* dx = p_.dx + offset;
      for_each_wide<A>(n, [&](auto tag, int64_t i) {
        const auto v = load(tag, x + i);
        using V = std::remove_const_t<decltype(v)>;
        const V d = v - V(map.mean), g = gradient_at(tag, d, i);
        store(tag, dx + i, fmadd(V(map.scale), g, fmadd(V(map.c), d, V(map.e))));
      });
    };
    const auto from = [&](int64_t offset, int64_t n, const auto* g) {
      if (p_.dx == nullptr) return;
      to_input(offset, n, [=](auto tag, auto, int64_t i) { return load(tag, g + i); });
    };
    const T* stored = !epilogue_ ? p_.dy : stored_;
    T* dresidual = sums_ ? nullptr : p_.dresidual;
    alignas(64) A pre[kPiece], grad[kPiece];
    chunk(channel, index).for_each_piece([&](const Stretches& at, int64_t first) {
      prefetch_channel(p_.x, at, v_);
      prefetch_channel(p_.dy, at, v_);
      if (stored != nullptr) {
        at.for_each([&](int64_t i, int64_t) { from(i, at.length, stored + i); });
      } else if (cache != nullptr) {
        at.for_each([&](int64_t i, int64_t j) { from(i, at.length, cache + first + j); });
      } else if (relu_ && p_.dx != nullptr) {
        at.for_each([&](int64_t i, int64_t) {
          with_relu_gradient(map, i, dresidual,
                             [&](auto gradient_at) { to_input(i, at.length, gradient_at); });
        });
      } else {
        gradient(map, at, pre, grad, dresidual);
        at.for_each(
            [&](int64_t i, int64_t j) { from(i, at.length, static_cast<const A*>(grad) + j); });
      }
    });
  }

  const NormBackward<T>& p_;
  const View& v_;
  const PlaneTiling t_;
  const bool epilogue_, relu_;
  bool parameters_, sums_, map_needed_;
  T* fused_dx_;          // dx, where frozen statistics let the sums' pass write it
  T* stored_ = nullptr;  // where the sums' pass leaves the gradient for the map
};

}  // namespace

template <typename T>
void plane_norm_fwd(const NormForward<T>& p) {
  PlaneForward<T>(p).run();
}

template <typename T>
void plane_norm_bwd(const NormBackward<T>& p) {
  PlaneBackward<T>(p).run();
}

#define FASTNORM_PLANE_NORM(T)                            \
  template void plane_norm_fwd<T>(const NormForward<T>&); \
  template void plane_norm_bwd<T>(const NormBackward<T>&);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_PLANE_NORM)
#undef FASTNORM_PLANE_NORM

}  // namespace fastnorm::cpu
