// The plane form: statistics over planes of `inner` contiguous elements. Those of batch norm of
// NCHW are a row of all channels apart; those of group and instance norm of NCHW, the channels of
// a group, follow each other. A statistic is cut into chunks, of several planes or of a part of
// one, and a chunk into pieces that fit in L1; short planes are gathered, so that every loop runs
// over a contiguous piece.
//
// A statistic that fits in L2 is one task: sums, then the map, one read of DRAM. A larger one is
// split: all chunks' sums, merged per statistic in index order, then the map, backwards so that
// the cache still holds the end.
//
// Backward, with d = x - mean, r = 1 / sqrt(var + eps), g the gradient of the norm, w the weight,
// and n the elements of a statistic:
//   dbias = sum(g), dweight = sum(r g d)   over the elements of a channel
//   dx = r w g + c d + e,  c = -r^2 sum(w r g d) / n,  e = -r sum(w g) / n
#include "cpu/plane_tiling.h"

namespace fastnorm::cpu {
namespace {

template <typename T>
class PlaneForward {
  using A = acc_t<T>;

 public:
  explicit PlaneForward(const NormForward<T>& p)
      : p_(p),
        v_(p.config.view),
        t_(v_),
        relu_(is_fused_relu(p)),
        direct_(relu_ || !has_epilogue(p.config, p.residual)) {}

  void run() {
    if (p_.config.frozen) return map_in_order();
    if (t_.resident) {
      return parallel_tasks(t_.statistics, t_.statistic_bytes(sizeof(T)),
                            [&](int64_t k) { visit(k); });
    }
    t_.for_each_wave(sizeof(T), [&](int64_t begin, int64_t end) {
      split_statistics(begin, end);
      t_.for_each_chunk(begin, end, sizeof(T), true, [&](int64_t k, int64_t i) { map(k, i); });
    });
  }

 private:
  void split_statistics(int64_t begin, int64_t end) {
    const auto moments = uninitialized<Moments<double>>((end - begin) * t_.chunks);
    t_.for_each_chunk(begin, end, sizeof(T), false, [&](int64_t k, int64_t i) {
      moments[(k - begin) * t_.chunks + i] = chunk_moments(k, i);
    });
    for (int64_t k = begin; k < end; ++k) {
      Moments<double> total = moments[(k - begin) * t_.chunks];
      for (int64_t i = 1; i < t_.chunks; ++i) total.merge(moments[(k - begin) * t_.chunks + i]);
      finish_statistics(k, total);
    }
  }

  void visit(int64_t statistic) {
    Moments<double> total;
    for (int64_t i = 0; i < t_.chunks; ++i) total.merge(chunk_moments(statistic, i));
    finish_statistics(statistic, total);
    for (int64_t i = t_.chunks; i-- > 0;) map(statistic, i);
  }

  Moments<double> chunk_moments(int64_t statistic, int64_t index) const {
    const PlaneChunk chunk = PlaneChunk(v_, t_, statistic, index).joined();
    const bool centered = p_.config.statistic == Statistic::MeanVar;
    A shift = 0;
    bool first = centered;
    double sum = 0, square = 0;
    chunk.for_each_piece([&](const Stretches& at, int64_t, int64_t) {
      prefetch_next(p_.x, at);
      at.for_each([&](int64_t offset, int64_t) {
        const T* x = p_.x + offset;
        if (first) shift = mean_of(x, at.length);
        first = false;
        const auto [s, q] = wide_sum_and_dot<A>(
            at.length, [&](auto tag, int64_t i, auto& d) { return d = load(tag, x + i) - shift; });
        sum += s;
        square += q;
      });
    });
    Moments<double> m;
    m.count = static_cast<double>(chunk.size());
    if (m.count == 0) return m;
    m.mean = centered ? shift + sum / m.count : 0.0;
    m.m2 = centered ? square - sum * sum / m.count : square;
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

  void finish_statistics(int64_t statistic, const Moments<double>& m) const {
    if (p_.mean != nullptr) p_.mean[statistic] = static_cast<A>(m.mean);
    p_.var[statistic] = static_cast<A>(m.m2 / m.count);
  }

  PlaneMaps<A> maps_of(int64_t statistic) const {
    return PlaneMaps<A>(p_.config, t_.per_channel, statistic, p_.mean, p_.var, p_.weight, p_.bias);
  }

  void map(int64_t statistic, int64_t index) const {
    const PlaneMaps<A> maps = maps_of(statistic);
    PlaneChunk(v_, t_, statistic, index)
        .for_each_piece([&](const Stretches& at, int64_t plane, int64_t) {
          map_piece(maps, at, plane, t_.ahead(sizeof(T)));
        });
  }

  // Frozen statistics need one visit, which goes through memory in order.
  void map_in_order() const {
    std::vector<PlaneMaps<A>> maps;
    for (int64_t k = 0; k < t_.statistics; ++k) maps.push_back(maps_of(k));
    const int64_t rows = v_.numel() / v_.row_size(), step = std::min(t_.group, v_.kept);
    const int64_t ranges = ceil_div(v_.kept, step), tasks = ranges * t_.parts;
    const int64_t planes = v_.channels_per_kept();
    parallel_tasks(rows * tasks, step * planes * t_.part * int64_t(sizeof(T)), [&](int64_t task) {
      const int64_t row = task / tasks, first = task % tasks / t_.parts * step;
      const int64_t begin = task % t_.parts * t_.part, end = std::min(begin + t_.part, t_.length);
      const int64_t statistic = row / v_.reduce_outer * v_.kept;
      for (int64_t k = first; k < std::min(first + step, v_.kept); ++k) {
        for (int64_t plane = 0; plane < planes; ++plane) {
          const int64_t offset = (row * v_.kept + k) * v_.reduce_inner + plane * t_.length;
          for (int64_t i = begin; i < end; i += kPiece) {
            map_piece(maps[statistic + k], {offset + i, std::min(kPiece, end - i)}, plane, 0);
          }
        }
      }
    });
  }

  void map_piece(const PlaneMaps<A>& maps, const Stretches& at, int64_t plane,
                 int64_t ahead) const {
    alignas(64) A values[kPiece];
    at.for_each([&](int64_t offset, int64_t j) {
      const ChannelMap<A> map = maps[plane++];
      const T* x = p_.x + offset;
      T* y = p_.y + offset;
      const auto plain = [](auto, int64_t, auto v) { return v; };
      if (!direct_) {
        map.normalize(x, ahead, values + j, at.length, plain);
      } else if (!relu_) {
        map.normalize(x, ahead, y, at.length, plain);
      } else if (p_.residual == nullptr) {
        map.normalize(x, ahead, y, at.length,
                      [](auto, int64_t, auto v) { return Relu::forward(v); });
      } else {
        map.normalize(x, ahead, y, at.length,
                      [residual = p_.residual + offset](auto tag, int64_t i, auto v) {
                        return Relu::forward(v + load(tag, residual + i));
                      });
      }
    });
    if (!direct_) finish_forward(p_.config, at, values, p_.residual, p_.y);
  }

  const NormForward<T>& p_;
  const View& v_;
  const PlaneTiling t_;
  const bool relu_, direct_;
};

template <typename T>
class PlaneBackward : BackwardPasses<T> {
  using A = acc_t<T>;
  using Passes = BackwardPasses<T>;
  using Passes::epilogue_, Passes::relu_, Passes::parameters_, Passes::sums_;
  using Passes::map_needed_, Passes::fused_dx_;
  struct Sums {
    double g = 0, gd = 0;
  };

 public:
  explicit PlaneBackward(const NormBackward<T>& p)
      : Passes(p),
        p_(p),
        v_(p.config.view),
        t_(v_, p.config.frozen),
        stored_(Passes::stored_gradient(p, !t_.resident)) {}

  void run() {
    if (sums_) partial_ = uninitialized<Sums>(t_.statistics * t_.channels() * t_.pieces());
    if (t_.resident) {
      parallel_tasks(t_.statistics, t_.statistic_bytes(2 * sizeof(T)),
                     [&](int64_t k) { visit(k); });
    } else if (t_.in_order) {
      t_.for_each_chunk_in_order(v_, 2 * sizeof(T), [&](int64_t k, int64_t i) {
        sums_ ? chunk_sums(k, i, maps_of(k), nullptr) : map(k, i, maps_of(k), nullptr);
      });
      for (int64_t k = 0; sums_ && k < t_.statistics; ++k) {
        PlaneMaps<A> maps = maps_of(k);
        finish_sums(k, maps);
      }
    } else {
      t_.for_each_wave(2 * sizeof(T), [&](int64_t begin, int64_t end) { split(begin, end); });
    }
    if (parameters_) parameter_gradients();
  }

 private:
  void visit(int64_t statistic) {
    PlaneMaps<A> maps = maps_of(statistic);
    A* cache = nullptr;
    if (epilogue_ && sums_ && map_needed_ && !relu_ && stored_ == nullptr) {
      cache = thread_scratch<A, Slot::Gradient>(t_.planes * t_.length);
    }
    if (sums_) {
      for (int64_t i = 0; i < t_.chunks; ++i) {
        chunk_sums(statistic, i, maps, part_of(cache, statistic, i));
      }
      finish_sums(statistic, maps);
    }
    for (int64_t i = t_.chunks; map_needed_ && i-- > 0;) {
      map(statistic, i, maps, part_of(cache, statistic, i));
    }
  }

  void split(int64_t begin, int64_t end) {
    if (sums_) {
      t_.for_each_chunk(begin, end, 2 * sizeof(T), false,
                        [&](int64_t k, int64_t i) { chunk_sums(k, i, maps_of(k), nullptr); });
    }
    std::vector<PlaneMaps<A>> maps;
    for (int64_t k = begin; k < end; ++k) {
      maps.push_back(maps_of(k));
      if (sums_) finish_sums(k, maps.back());
    }
    if (!map_needed_) return;
    t_.for_each_chunk(begin, end, 2 * sizeof(T), true,
                      [&](int64_t k, int64_t i) { map(k, i, maps[k - begin], nullptr); });
  }

  PlaneMaps<A> maps_of(int64_t statistic) const {
    return PlaneMaps<A>(p_.config, t_.per_channel, statistic, p_.mean, p_.var, p_.weight, p_.bias);
  }

  // The part of a resident statistic's cache, which keeps it in the order of the chunks.
  A* part_of(A* cache, int64_t statistic, int64_t index) const {
    if (cache == nullptr) return nullptr;
    const PlaneChunk c(v_, t_, statistic, index);
    return cache + c.first * t_.length + c.begin * (c.last - c.first);
  }

  // sum(g) and sum(g d) of `piece` of a channel of the statistic.
  Sums& partial(int64_t statistic, int64_t channel, int64_t piece) const {
    return partial_[(statistic * t_.channels() + channel) * t_.pieces() + piece];
  }

  // Merges the pieces of each channel into its first, which holds sum(r g d) then; c and e.
  void finish_sums(int64_t statistic, PlaneMaps<A>& maps) const {
    double wg = 0, wgd = 0;
    for (int64_t c = 0; c < t_.channels(); ++c) {
      Sums& total = partial(statistic, c, 0);
      for (int64_t i = 1; i < t_.pieces(); ++i) {
        total.g += partial(statistic, c, i).g;
        total.gd += partial(statistic, c, i).gd;
      }
      total.gd *= maps.rstd();
      wg += maps.weight(c) * total.g;
      wgd += maps.weight(c) * total.gd;
    }
    if (p_.config.frozen) return;
    const double r = maps.rstd(), share = r / static_cast<double>(size_of(statistic));
    const bool centered = p_.config.statistic == Statistic::MeanVar;
    maps.set_gradient(-r * share * wgd, centered ? -share * wg : 0.0);
  }

  int64_t size_of(int64_t statistic) const {
    return v_.rows_of(statistic / v_.kept) * v_.reduce_inner;
  }

  void parameter_gradients() const {
    const int64_t channels = v_.channels();
    parallel_tasks(channels, v_.outer * int64_t(sizeof(Sums)), [&](int64_t c) {
      double db = 0, dw = 0;
      for (int64_t o = 0; o < v_.outer; ++o) {
        const Sums& s = partial_[(o * channels + c) * t_.pieces()];
        db += s.g;
        dw += s.gd;
      }
      if (p_.dbias != nullptr) p_.dbias[c] = static_cast<A>(db);
      if (p_.dweight != nullptr) p_.dweight[c] = static_cast<A>(dw);
    });
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

  // The gradient of the norm of a piece, to `grad` and `dresidual`.
  void gradient(const PlaneMaps<A>& maps, const Stretches& at, int64_t plane, A* grad,
                T* dresidual) const {
    alignas(64) A pre[kPiece];
    if (p_.config.activation != Activation::None) {
      at.for_each([&](int64_t i, int64_t j) {
        maps[plane++].normalize(p_.x + i, 0, pre + j, at.length,
                                [](auto, int64_t, auto v) { return v; });
      });
    }
    start_backward(p_.config, at, p_.dy, p_.residual, pre, grad, dresidual);
  }

  static void scale_to(const A* g, A scale, int64_t n, T* out) {
    for_each_wide<A>(n,
                     [&](auto tag, int64_t i) { store(tag, out + i, load(tag, g + i) * scale); });
  }

  // A cache keeps g in the order of the pieces.
  void chunk_sums(int64_t statistic, int64_t index, const PlaneMaps<A>& maps, A* cache) const {
    const PlaneChunk chunk(v_, t_, statistic, index);
    alignas(64) A grad[kPiece];
    // A sum for every channel of the chunk.
    const int64_t step = t_.per_channel ? t_.pieces() : 0;
    Sums* const sums = &partial(statistic, t_.per_channel ? chunk.first : 0,
                                t_.per_channel ? index % t_.parts : index);
    sums[0] = {};
    for (int64_t n = chunk.first; n < chunk.last; ++n) sums[(n - chunk.first) * step] = {};
    const auto add_sums = [&](Sums& out, const ChannelMap<A>& map, int64_t offset, int64_t n,
                              auto&& gradient_at) {
      const T* x = p_.x + offset;
      const auto [g, gd] = wide_sum_and_dot<A>(n, [&](auto tag, int64_t i, auto& d) {
        d = load(tag, x + i) - map.mean;
        return gradient_at(tag, d, i);
      });
      out.g += g;
      out.gd += gd;
    };
    const auto add_from = [&](Sums& out, const ChannelMap<A>& map, int64_t offset, int64_t n,
                              const auto* g) {
      add_sums(out, map, offset, n, [=](auto tag, auto, int64_t i) { return load(tag, g + i); });
    };
    chunk.for_each_piece([&](const Stretches& at, int64_t plane, int64_t first) {
      prefetch_next(p_.x, at);
      prefetch_next(p_.dy, at);
      const A* g = grad;
      if (epilogue_ && !(relu_ && fused_dx_ == nullptr)) {
        A* out = cache != nullptr ? cache + first : grad;
        gradient(maps, at, plane, out, p_.dresidual != nullptr ? p_.dresidual : stored_);
        g = out;
      }
      at.for_each([&](int64_t i, int64_t j) {
        Sums& out = sums[(plane - chunk.first) * step];
        const ChannelMap<A> map = maps[plane++];
        if (relu_ && fused_dx_ == nullptr) {
          with_relu_gradient(map, i, p_.dresidual, [&](auto gradient_at) {
            add_sums(out, map, i, at.length, gradient_at);
          });
        } else if (epilogue_) {
          add_from(out, map, i, at.length, g + j);
          if (fused_dx_ != nullptr) scale_to(g + j, map.scale, at.length, fused_dx_ + i);
        } else if (fused_dx_ == nullptr) {
          add_from(out, map, i, at.length, p_.dy + i);
        } else {
          add_sums(
              out, map, i, at.length,
              [scale = map.scale, dy = p_.dy + i, dx = fused_dx_ + i](auto tag, auto, int64_t k) {
                const auto v = load(tag, dy + k);
                store(tag, dx + k, v * scale);
                return v;
              });
        }
      });
    });
  }

  void map(int64_t statistic, int64_t index, const PlaneMaps<A>& maps, const A* cache) const {
    const auto to_input = [&](const ChannelMap<A>& map, int64_t offset, int64_t n,
                              auto&& gradient_at) {
      const T* x = p_.x + offset;
      T* dx = p_.dx + offset;
      const int64_t ahead = t_.ahead(2 * sizeof(T));
      for_each_wide<A>(n, [&](auto tag, int64_t i) {
        prefetch(x + ahead + i);
        if constexpr (sizeof(T) == 2) prefetch(p_.dy + offset + ahead + i);
        const auto v = load(tag, x + i);
        using V = std::remove_const_t<decltype(v)>;
        const V d = v - V(map.mean), g = gradient_at(tag, d, i);
        store(tag, dx + i, fmadd(V(map.scale), g, fmadd(V(map.c), d, V(map.e))));
      });
    };
    const auto from = [&](const ChannelMap<A>& map, int64_t offset, int64_t n, const auto* g) {
      to_input(map, offset, n, [=](auto tag, auto, int64_t i) { return load(tag, g + i); });
    };
    const T* stored = !epilogue_ ? p_.dy : stored_;
    T* dresidual = sums_ ? nullptr : p_.dresidual;
    const bool fused_relu = relu_ && p_.dx != nullptr;
    alignas(64) A grad[kPiece];
    PlaneChunk(v_, t_, statistic, index)
        .for_each_piece([&](const Stretches& at, int64_t plane, int64_t first) {
          const A* g = cache != nullptr ? cache + first : grad;
          if (stored == nullptr && cache == nullptr && !fused_relu) {
            gradient(maps, at, plane, grad, dresidual);
          }
          if (p_.dx == nullptr) return;
          at.for_each([&](int64_t i, int64_t j) {
            const ChannelMap<A> map = maps[plane++];
            if (stored != nullptr) {
              from(map, i, at.length, stored + i);
            } else if (fused_relu && cache == nullptr) {
              with_relu_gradient(map, i, dresidual, [&](auto gradient_at) {
                to_input(map, i, at.length, gradient_at);
              });
            } else {
              from(map, i, at.length, g + j);
            }
          });
        });
  }

  const NormBackward<T>& p_;
  const View& v_;
  const PlaneTiling t_;
  T* const stored_;
  std::unique_ptr<Sums[]> partial_;  // [statistic][channel][piece]
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
