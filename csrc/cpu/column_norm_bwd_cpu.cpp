// The backward pass of the column form, on the chunks and visits of column_norm_cpu.cpp.
//
// With d = x - mean, r = 1 / sqrt(var + eps), g the gradient of the norm, w the weight,
// and n the elements of a statistic:
//   dbias = sum(g), dweight = sum(r g d)   over the elements of a channel
//   dx = r w g + c d + e,  c = -r^3 sum(w g d) / n,  e = -r sum(w g) / n
#include "cpu/column_tiling.h"

namespace fastnorm::cpu {
namespace {

template <typename T>
class Backward : BackwardPasses<T> {
  using A = acc_t<T>;
  using Passes = BackwardPasses<T>;
  using Passes::epilogue_, Passes::relu_, Passes::parameters_, Passes::sums_;
  using Passes::map_needed_, Passes::fused_dx_;

 public:
  explicit Backward(const NormBackward<T>& p)
      : Passes(p),
        p_(p),
        v_(p.config.view),
        t_(v_),
        chunked_(epilogue_ && (!relu_ || fused_dx_ != nullptr)),
        stored_(Passes::stored_gradient(p, t_.visit == Visit::Split)) {}

  void run() {
    if (t_.visit == Visit::Samples) {
      const int64_t step = ceil_div(v_.outer, kSampleBlocks);
      const int64_t blocks = ceil_div(v_.outer, step);
      const int64_t bytes = 2 * v_.reduce_outer * t_.row * static_cast<int64_t>(sizeof(T));
      start_parameters(blocks);
      parallel_tasks(blocks, bytes * step, [&](int64_t block) {
        for (int64_t o = block * step; o < std::min(v_.outer, (block + 1) * step); ++o) {
          visit(o, 0, t_.width, block);
        }
      });
      finish_parameters(blocks);
    } else if (t_.visit == Visit::Columns) {
      const int64_t tiles = t_.tiles();
      start_parameters(v_.outer);
      parallel_tasks(v_.outer * tiles, 2 * t_.tile * v_.reduce_outer * int64_t(sizeof(T)),
                     [&](int64_t task) {
                       const int64_t first = task % tiles * t_.tile;
                       visit(task / tiles, first, t_.tile_size(first), task / tiles);
                     });
      finish_parameters(v_.outer);
    } else {
      split();
    }
  }

 private:
  int64_t partial_size() const { return 2 * t_.chunks * t_.row; }

  void split() {
    const auto memory = uninitialized<A>(v_.outer * Columns<A>::size(t_.width));
    const auto of = [&](int64_t o) {
      return Columns<A>(memory.get() + o * Columns<A>::size(t_.width), t_.width);
    };
    const auto partial = uninitialized<double>(sums_ ? v_.outer * partial_size() : 0);
    if (sums_) start_parameters(v_.outer);
    for_each_wave(v_, 2 * sizeof(T), [&](int64_t begin, int64_t end) {
      for_each_range(t_, begin, end,
                     [&](int64_t o, int64_t j, int64_t n) { expand(o, j, n, of(o)); });
      if (sums_) split_sums(begin, end, partial.get(), of);
      if (!map_needed_) return;
      parallel_tasks_reversed((end - begin) * t_.chunks,
                              2 * t_.chunk_rows * t_.width * int64_t(sizeof(T)), [&](int64_t task) {
                                const int64_t o = begin + task / t_.chunks;
                                map(Chunk(v_, t_, o, task % t_.chunks), 0, t_.width, of(o),
                                    nullptr);
                              });
    });
    if (sums_) finish_parameters(v_.outer);
  }

  template <typename F>
  void split_sums(int64_t begin, int64_t end, double* partial, F&& of) {
    for_each_tile(t_, begin, end, 2 * sizeof(T),
                  [&](int64_t o, int64_t chunk, int64_t first, int64_t n) {
                    chunk_sums(o, chunk, first, n, of(o), nullptr, partial + o * partial_size());
                  });
    for_each_range(t_, begin, end, [&](int64_t o, int64_t first, int64_t n) {
      finish_sums(o, first, n, partial + o * partial_size(), of(o), o);
    });
  }

  // Sums and gradients of columns [first, first + n) of block o; the parameters' gradients go to
  // partial sum `block`.
  void visit(int64_t o, int64_t first, int64_t n, int64_t block) {
    Columns<A> columns(thread_scratch<A, Slot::Columns>(Columns<A>::size(t_.width)), t_.width);
    expand(o, first, n, columns);
    // An activation's derivative and a mask are worked out once; a ReLU's costs less than to keep.
    A* cache = nullptr;
    if (epilogue_ && sums_ && map_needed_ && !relu_ && stored_ == nullptr) {
      const int64_t cached = v_.reduce_outer * (t_.fold > 1 ? t_.row : n);
      cache = thread_scratch<A, Slot::Gradient>(round_up(cached, t_.width));
    }
    const auto of = [&](int64_t chunk) {
      return cache != nullptr ? cache + chunk * t_.chunk_rows * n : nullptr;
    };
    if (sums_) {
      double* partial = thread_scratch<double, Slot::Partial>(partial_size());
      for (int64_t chunk = 0; chunk < t_.chunks; ++chunk) {
        chunk_sums(o, chunk, first, n, columns, of(chunk), partial);
      }
      finish_sums(o, first, n, partial, columns, block);
    }
    if (!map_needed_) return;
    for (int64_t chunk = t_.chunks; chunk-- > 0;) {
      map(Chunk(v_, t_, o, chunk), first, n, columns, of(chunk));
    }
  }

  void expand(int64_t o, int64_t first, int64_t n, Columns<A> out) {
    expand_columns(p_.config, t_, o, first, n, p_.mean, p_.var, p_.weight, p_.bias, out);
    std::fill_n(out.c + first, n, A(0));
    std::fill_n(out.e + first, n, A(0));
  }

  // The gradient of the norm over n columns from j0, which lie at `index`, to `grad` and `out`.
  void gradient(int64_t index, int64_t j0, int64_t n, const Columns<A>& columns, A* grad, T* out) {
    const T* x = p_.x + index;
    const A *mean = columns.mean + j0, *scale = columns.scale + j0, *bias = columns.bias + j0;
    if (relu_) {
      return with_relu_gradient(index, j0, columns, out, [&](auto gradient_at) {
        for_each_wide<A>(n, [&](auto tag, int64_t j) {
          store(tag, grad + j, gradient_at(tag, load(tag, x + j) - load(tag, mean + j), j, j));
        });
      });
    }
    alignas(64) A pre[kChunk];
    if (p_.config.activation != Activation::None) {
      for_each_wide<A>(n, [&](auto tag, int64_t j) {
        store(tag, pre + j,
              fmadd(load(tag, x + j) - load(tag, mean + j), load(tag, scale + j),
                    load(tag, bias + j)));
      });
    }
    start_backward(p_.config, {index, n}, p_.dy, p_.residual, pre, grad, out);
  }

  // Calls f(grad) with the gradient behind a ReLU as a function grad(tag, d, offset from `index`,
  // column from `first`), which also writes it to dresidual.
  template <typename F>
  void with_relu_gradient(int64_t index, int64_t first, const Columns<A>& columns, T* dresidual,
                          F&& f) {
    const A *scale = columns.scale + first, *bias = columns.bias + first;
    const T* dy = p_.dy + index;
    const auto norm = [=](auto tag, auto d, int64_t j) {
      return fmadd(d, load(tag, scale + j), load(tag, bias + j));
    };
    if (p_.residual == nullptr) {
      return f([=](auto tag, auto d, int64_t i, int64_t j) {
        return relu_gradient(norm(tag, d, j), load(tag, dy + i));
      });
    }
    const T* residual = p_.residual + index;
    const auto grad = [=](auto tag, auto d, int64_t i, int64_t j) {
      return relu_gradient(norm(tag, d, j) + load(tag, residual + i), load(tag, dy + i));
    };
    if (dresidual == nullptr) return f(grad);
    T* out = dresidual + index;
    f([=](auto tag, auto d, int64_t i, int64_t j) {
      const auto g = grad(tag, d, i, j);
      store(tag, out + i, g);
      return g;
    });
  }

  // Adds g and g d of n columns from `first` of the rows that begin at `at`.
  void add_rows(int64_t at, int64_t rows, int64_t first, int64_t n, const Columns<A>& columns,
                A* sum_g, A* sum_gd) {
    const int64_t index = at + first, width = t_.width;
    const auto add = [&](auto&& grad) {
      add_gradient_rows(p_.x + index, width, rows, n, columns.mean + first, sum_g, sum_gd, grad);
    };
    if (relu_) {
      with_relu_gradient(index, first, columns, p_.dresidual, [&](auto grad) {
        add([=](auto tag, auto d, int64_t row, int64_t column) {
          return grad(tag, d, row * width + column, column);
        });
      });
    } else if (fused_dx_ != nullptr) {
      add([=, dy = p_.dy + index, dx = fused_dx_ + index, scale = columns.scale + first](
              auto tag, auto, int64_t row, int64_t column) {
        const auto g = load(tag, dy + row * width + column);
        store(tag, dx + row * width + column, g * load(tag, scale + column));
        return g;
      });
    } else {
      add([=, dy = p_.dy + index](auto tag, auto, int64_t row, int64_t column) {
        return load(tag, dy + row * width + column);
      });
    }
  }

  // The same by way of a chunk of gradients, which stays in `cache`, its rows `stride` apart.
  void add_chunks(int64_t at, int64_t rows, int64_t first, int64_t n, const Columns<A>& columns,
                  A* cache, int64_t stride, A* sum_g, A* sum_gd) {
    alignas(64) A grads[kChunk];
    T* dresidual = stored_ == nullptr ? p_.dresidual : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < n; j += kChunk) {
        A* g = cache != nullptr ? cache + r * stride + j : grads;
        const int64_t size = std::min(kChunk, n - j), index = at + r * t_.width + first + j;
        gradient(index, first + j, size, columns, g, dresidual);
        const auto add = [&](auto&& grad) {
          add_gradients<1>(p_.x + index, 0, size, columns.mean + first + j, sum_g + j, sum_gd + j,
                           grad);
        };
        if (stored_ != nullptr) {
          add([&](auto tag, auto, int64_t, int64_t i) {
            const auto v = load(tag, g + i);
            store(tag, stored_ + index + i, v);
            return v;
          });
        } else if (fused_dx_ != nullptr) {
          add([&, scale = columns.scale + first + j](auto tag, auto, int64_t, int64_t i) {
            const auto v = load(tag, g + i);
            store(tag, fused_dx_ + index + i, v * load(tag, scale + i));
            return v;
          });
        } else {
          add([&](auto tag, auto, int64_t, int64_t i) { return load(tag, g + i); });
        }
      }
    }
  }

  // sum(g) and sum(g d) of the chunk, per column of a row, to `partial`. A cache keeps g, its
  // rows n apart.
  void chunk_sums(int64_t o, int64_t index, int64_t first, int64_t n, const Columns<A>& columns,
                  A* cache, double* partial) {
    const Chunk chunk(v_, t_, o, index);
    A* sum_g = thread_scratch<A, Slot::Sums>(2 * n);
    A* sum_gd = sum_g + n;
    std::fill_n(sum_g, 2 * n, A(0));
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t size = std::min(kTile, n - j);
      const auto add = [&](int64_t r, int64_t rows, int64_t row_size) {
        const int64_t at = chunk.offset + r * t_.width;
        if (chunked_) {
          A* kept = cache != nullptr ? cache + r * n + j : nullptr;
          add_chunks(at, rows, first + j, row_size, columns, kept, n, sum_g + j, sum_gd + j);
        } else {
          add_rows(at, rows, first + j, row_size, columns, sum_g + j, sum_gd + j);
        }
      };
      add(0, chunk.full, size);
      if (chunk.rest > 0) add(chunk.full, 1, chunk.columns(chunk.full, first + j, size));
    }
    double* g = partial + index * t_.row;
    double* gd = partial + (t_.chunks + index) * t_.row;
    const int64_t row_columns = t_.fold > 1 ? t_.row : n;
    for (int64_t j = 0; j < row_columns; ++j) {
      double total_g = 0, total_gd = 0;
      for (int64_t f = 0; f < t_.fold; ++f) {
        total_g += sum_g[f * t_.row + j];
        total_gd += sum_gd[f * t_.row + j];
      }
      g[first + j] = total_g;
      gd[first + j] = total_gd;
    }
  }

  // Merges the chunks' sums of columns [first, first + n), which give c, e, dweight and dbias.
  void finish_sums(int64_t o, int64_t first, int64_t n, double* partial, Columns<A> out,
                   int64_t block) {
    const int64_t columns = t_.fold > 1 ? t_.row : n;
    double* g = partial + first;
    double* gd = partial + t_.chunks * t_.row + first;
    add_pieces(t_.chunks, t_.row, columns, g);
    add_pieces(t_.chunks, t_.row, columns, gd);
    const int64_t inner = v_.reduce_inner;
    const double scale = 1.0 / (static_cast<double>(v_.rows_of(o)) * static_cast<double>(inner));
    const bool centered = p_.config.statistic == Statistic::MeanVar;
    double *db = nullptr, *dw = nullptr;
    if (parameters_) {
      db = parameter_sums_.get() + 2 * block * v_.channels();
      dw = db + v_.channels();
    }
    for (int64_t begin = 0; begin < columns; begin += inner) {
      const double r = inverse_std(p_.var[o * v_.kept + (first + begin) / inner], p_.config.eps);
      double sum_wg = 0, sum_wgd = 0;
      for_each_channel_run(v_, first + begin, inner, [&](int64_t j, int64_t, int64_t channel) {
        const double w = p_.weight != nullptr ? p_.weight[channel] : 1.0;
        const double sum_g = sum_of(g + j - first, v_.inner);
        const double sum_gd = sum_of(gd + j - first, v_.inner);
        sum_wg += w * sum_g;
        sum_wgd += w * sum_gd;
        if (parameters_) {
          db[channel] += sum_g;
          dw[channel] += r * sum_gd;
        }
      });
      if (!p_.config.frozen) {
        std::fill_n(out.c + first + begin, inner, static_cast<A>(-r * r * r * sum_wgd * scale));
        std::fill_n(out.e + first + begin, inner,
                    centered ? static_cast<A>(-r * sum_wg * scale) : A(0));
      }
    }
    if (t_.fold > 1) {
      repeat_fold(t_, out.c);
      repeat_fold(t_, out.e);
    }
  }

  static double sum_of(const double* values, int64_t n) {
    if (n == 1) return *values;
    return wide_sum<double>(n, [=](auto tag, int64_t i) { return load(tag, values + i); });
  }

  void start_parameters(int64_t blocks) {
    if (!parameters_) return;
    parameter_sums_ = uninitialized<double>(2 * blocks * v_.channels());
    std::fill_n(parameter_sums_.get(), 2 * blocks * v_.channels(), 0.0);
  }

  void finish_parameters(int64_t blocks) {
    if (!parameters_) return;
    const int64_t channels = v_.channels();
    double* db = parameter_sums_.get();
    if (blocks > 0) add_pieces(blocks, 2 * channels, 2 * channels, db);
    for (int64_t c = 0; c < channels; ++c) {
      if (p_.dbias != nullptr) p_.dbias[c] = blocks > 0 ? static_cast<A>(db[c]) : A(0);
      if (p_.dweight != nullptr)
        p_.dweight[c] = blocks > 0 ? static_cast<A>(db[channels + c]) : A(0);
    }
  }

  void map(const Chunk& chunk, int64_t first, int64_t n, const Columns<A>& columns,
           const A* cache) {
    T* dresidual = sums_ ? nullptr : p_.dresidual;
    alignas(64) A grad[kChunk];
    for (int64_t r = 0; r < chunk.rows(); ++r) {
      const int64_t end = first + chunk.columns(r, first, n);
      for (int64_t j0 = first; j0 < end; j0 += kChunk) {
        const int64_t size = std::min(kChunk, end - j0);
        const int64_t index = chunk.offset + r * t_.width + j0;
        const auto to_input = [&](auto&& gradient_at) {
          const T* x = p_.x + index;
          T* dx = p_.dx + index;
          const A *mean = columns.mean + j0, *scale = columns.scale + j0;
          const A *c = columns.c + j0, *e = columns.e + j0;
          for_each_wide<A>(size, [&](auto tag, int64_t j) {
            const auto d = load(tag, x + j) - load(tag, mean + j);
            const auto g = gradient_at(tag, d, j, j);
            store(tag, dx + j,
                  fmadd(load(tag, scale + j), g, fmadd(load(tag, c + j), d, load(tag, e + j))));
          });
        };
        const auto from = [&](const auto* g) {
          if (p_.dx == nullptr) return;
          to_input([=](auto tag, auto, int64_t i, int64_t) { return load(tag, g + i); });
        };
        if (!epilogue_) {
          from(p_.dy + index);
        } else if (stored_ != nullptr) {
          from(static_cast<const T*>(stored_ + index));  // what the sums' pass has written
        } else if (cache != nullptr) {
          from(cache + r * n + j0 - first);
        } else if (relu_ && p_.dx != nullptr) {
          with_relu_gradient(index, j0, columns, dresidual, to_input);
        } else {
          gradient(index, j0, size, columns, grad, dresidual);
          from(static_cast<const A*>(grad));
        }
      }
    }
  }

  const NormBackward<T>& p_;
  const View& v_;
  const Tiling t_;
  const bool chunked_;
  T* const stored_;
  std::unique_ptr<double[]> parameter_sums_;  // [block][db, dw][channels]
};

}  // namespace

template <typename T>
void column_norm_bwd(const NormBackward<T>& p) {
  const View& v = p.config.view;
  if (v.numel() == 0) {
    if (p.dweight != nullptr) std::fill_n(p.dweight, v.channels(), acc_t<T>(0));
    if (p.dbias != nullptr) std::fill_n(p.dbias, v.channels(), acc_t<T>(0));
    return;
  }
  if (v.inner == 0) {
    if (!is_single_pixel(v)) return pixel_norm_bwd(p);
    NormBackward<T> row = p;
    row.config.view = pixel_as_row(v);
    return row_norm_bwd(row);
  }
  if (is_plane(v)) return plane_norm_bwd(p);
  Backward<T>(p).run();
}

#define FASTNORM_INSTANTIATE(T) template void column_norm_bwd<T>(const NormBackward<T>&);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)
#undef FASTNORM_INSTANTIATE

}  // namespace fastnorm::cpu
