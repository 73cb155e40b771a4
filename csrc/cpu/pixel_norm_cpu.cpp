// The pixel form: layer and RMS norm over the channels of NCHW, without a permute. A statistic
// spans the C rows, `kept` apart, of one pixel's column. A task is a range of pixels over all rows,
// narrow enough to stay in L2 between the sums and the map, so that DRAM is read once; sums per
// pixel are those of the column form, weight and bias are scalars of a row.
//
// Backward, with xhat = (x - mean) r, g the gradient of the norm, w_c the weight of row c:
//   dbias_c = sum(g), dweight_c = sum(g xhat)   over pixels and samples
//   dx = r w g + c (x - mean) + e,  e = -r sum(w g) / C,  c = -r^2 sum(w g xhat) / C
#include "cpu/column_cpu.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t kMaxPixels = 256;
constexpr int64_t kChunkRows = 128;       // rows summed in the accumulation type
constexpr int64_t kParameterBlocks = 64;  // partial sums of the parameter gradients

struct PixelTiling {
  int64_t rows, stride, tile, tiles;

  explicit PixelTiling(const View& v) : rows(v.reduce_outer), stride(v.kept) {
    const int64_t fit = std::clamp<int64_t>(kResident / rows / 16 * 16, 32, kMaxPixels);
    tiles = ceil_div(stride, fit);
    tile = std::min(round_up(ceil_div(stride, tiles), 16), stride);
    tiles = ceil_div(stride, tile);
  }
  int64_t chunks() const { return ceil_div(rows, kChunkRows); }
  int64_t pixels(int64_t first) const { return std::min(tile, stride - first); }
};

template <typename A>
struct Pixels {
  alignas(64) A mean[kMaxPixels], rstd[kMaxPixels], c[kMaxPixels], e[kMaxPixels];

  void load_statistics(const NormConfig& config, const A* mean_in, const A* var_in, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      mean[j] = mean_in != nullptr ? mean_in[j] : A(0);
      rstd[j] = static_cast<A>(inverse_std(var_in[j], config.eps));
    }
  }

  // out = (x - mean) rstd weight + bias
  template <typename T, typename O>
  void normalize(const T* x, A weight, A bias, O* out, int64_t n) const {
    for_each_wide<A>(n, [&](auto tag, int64_t j) {
      const auto xhat = (load(tag, x + j) - load(tag, mean + j)) * load(tag, rstd + j);
      using V = std::decay_t<decltype(xhat)>;
      store(tag, out + j, fmadd(xhat, V(weight), V(bias)));
    });
  }
};

template <typename T>
class PixelForward {
  using A = acc_t<T>;

 public:
  explicit PixelForward(const NormForward<T>& p) : p_(p), v_(p.config.view), t_(v_) {}

  void run() {
    parallel_tasks(v_.outer * t_.tiles, t_.rows * t_.tile * int64_t(sizeof(T)),
                   [&](int64_t task) { visit(task / t_.tiles, task % t_.tiles * t_.tile); });
  }

 private:
  void visit(int64_t o, int64_t first) {
    const int64_t n = t_.pixels(first), statistic = o * v_.kept + first;
    const int64_t offset = o * v_.reduce_outer * t_.stride + first;
    if (!p_.config.frozen) statistics(o, statistic, p_.x + offset, n);
    Pixels<A> pixels;
    pixels.load_statistics(p_.config, p_.mean != nullptr ? p_.mean + statistic : nullptr,
                           p_.var + statistic, n);
    const bool epilogue = has_epilogue(p_.config, p_.residual);
    alignas(64) A values[kMaxPixels];
    for (int64_t r = v_.rows_of(o); r-- > 0;) {
      const int64_t index = offset + r * t_.stride;
      const A weight = p_.weight != nullptr ? p_.weight[r] : A(1);
      const A bias = p_.bias != nullptr ? p_.bias[r] : A(0);
      if (!epilogue) {
        pixels.normalize(p_.x + index, weight, bias, p_.y + index, n);
      } else {
        pixels.normalize(p_.x + index, weight, bias, values, n);
        finish_forward(p_.config, {index, n}, values, p_.residual, p_.y);
      }
    }
  }

  void statistics(int64_t o, int64_t statistic, const T* x, int64_t n) {
    const bool centered = p_.config.statistic == Statistic::MeanVar;
    const int64_t rows = v_.rows_of(o), chunks = ceil_div(rows, kChunkRows);
    const auto count = [&](int64_t i) { return std::min(kChunkRows, rows - i * kChunkRows); };
    double* mean = thread_scratch<double, Slot::Partial>(2 * chunks * n);
    double* m2 = mean + chunks * n;
    alignas(64) A shift[kMaxPixels], sum[kMaxPixels], square[kMaxPixels];
    for (int64_t i = 0; i < chunks; ++i) {
      column_moments(x + i * kChunkRows * t_.stride, t_.stride, count(i), n, centered, shift, sum,
                     square);
      finish_moments(shift, sum, square, count(i), n, centered, mean + i * n, m2 + i * n);
    }
    merge_pieces(chunks, n, n, count, mean, m2);
    for (int64_t j = 0; j < n; ++j) {
      if (p_.mean != nullptr) p_.mean[statistic + j] = static_cast<A>(mean[j]);
      p_.var[statistic + j] = static_cast<A>(m2[j] / static_cast<double>(rows));
    }
  }

  const NormForward<T>& p_;
  const View& v_;
  const PixelTiling t_;
};

template <typename T>
class PixelBackward {
  using A = acc_t<T>;

 public:
  explicit PixelBackward(const NormBackward<T>& p)
      : p_(p), v_(p.config.view), t_(v_), epilogue_(has_backward_epilogue(p)) {
    parameters_ = p.dweight != nullptr || p.dbias != nullptr;
    sums_ = parameters_ || (p.dx != nullptr && !p.config.frozen);
  }

  void run() {
    const int64_t tasks = v_.outer * t_.tiles, step = ceil_div(tasks, kParameterBlocks);
    const int64_t blocks = ceil_div(tasks, step), channels = v_.channels();
    const auto parameters = uninitialized<double>(2 * blocks * channels);
    std::fill_n(parameters.get(), 2 * blocks * channels, 0.0);
    parallel_tasks(blocks, 2 * step * t_.rows * t_.tile * int64_t(sizeof(T)), [&](int64_t block) {
      double* db = parameters.get() + 2 * block * channels;
      for (int64_t task = block * step; task < std::min(tasks, (block + 1) * step); ++task) {
        visit(task / t_.tiles, task % t_.tiles * t_.tile, db, db + channels);
      }
    });
    add_pieces(blocks, 2 * channels, 2 * channels, parameters.get());
    for (int64_t c = 0; c < channels; ++c) {
      if (p_.dbias != nullptr) p_.dbias[c] = static_cast<A>(parameters[c]);
      if (p_.dweight != nullptr) p_.dweight[c] = static_cast<A>(parameters[channels + c]);
    }
  }

 private:
  void visit(int64_t o, int64_t first, double* db, double* dw) {
    const int64_t n = t_.pixels(first), statistic = o * v_.kept + first, rows = v_.rows_of(o);
    const int64_t offset = o * v_.reduce_outer * t_.stride + first;
    Pixels<A> pixels;
    pixels.load_statistics(p_.config, p_.mean != nullptr ? p_.mean + statistic : nullptr,
                           p_.var + statistic, n);
    std::fill_n(pixels.c, n, A(0));
    std::fill_n(pixels.e, n, A(0));
    // An activation's derivative and a mask are worked out once if their result stays in L2.
    A* cache = nullptr;
    if (epilogue_ && sums_ && !reads_back(p_)) {
      cache = thread_scratch<A, Slot::Gradient>(rows * n);
    }
    if (sums_) sums(rows, offset, n, pixels, cache, db, dw);
    T* dresidual = sums_ ? nullptr : p_.dresidual;
    if (p_.dx == nullptr && dresidual == nullptr) return;
    alignas(64) A pre[kMaxPixels], grad[kMaxPixels];
    for (int64_t r = rows; r-- > 0;) {
      const int64_t index = offset + r * t_.stride;
      if (!epilogue_) {
        to_input(index, r, n, p_.dy + index, pixels);
      } else if (sums_ && reads_back(p_)) {
        // What the sums' pass has written.
        if (p_.dx != nullptr) to_input(index, r, n, p_.dresidual + index, pixels);
      } else if (cache != nullptr) {
        to_input(index, r, n, cache + r * n, pixels);
      } else {
        gradient(index, r, n, pixels, pre, grad, dresidual);
        to_input(index, r, n, grad, pixels);
      }
    }
  }

  A weight(int64_t r) const { return p_.weight != nullptr ? p_.weight[r] : A(1); }

  void gradient(int64_t index, int64_t r, int64_t n, const Pixels<A>& pixels, A* pre, A* grad,
                T* dresidual) {
    if (p_.config.activation != Activation::None) {
      pixels.normalize(p_.x + index, weight(r), p_.bias != nullptr ? p_.bias[r] : A(0), pre, n);
    }
    start_backward(p_.config, {index, n}, p_.dy, p_.residual, pre, grad, dresidual);
  }

  // c and e of every pixel; adds to db and dw.
  void sums(int64_t rows, int64_t offset, int64_t n, Pixels<A>& pixels, A* cache, double* db,
            double* dw) {
    alignas(64) A pre[kMaxPixels], grad[kMaxPixels], sum_g[kMaxPixels], sum_gx[kMaxPixels];
    double total_g[kMaxPixels] = {}, total_gx[kMaxPixels] = {};
    for (int64_t r0 = 0; r0 < rows; r0 += kChunkRows) {
      std::fill_n(sum_g, n, A(0));
      std::fill_n(sum_gx, n, A(0));
      for (int64_t r = r0; r < std::min(rows, r0 + kChunkRows); ++r) {
        const int64_t index = offset + r * t_.stride;
        if (!epilogue_) {
          add_row(p_.x + index, p_.dy + index, r, n, pixels, sum_g, sum_gx, db, dw);
        } else {
          A* g = cache != nullptr ? cache + r * n : grad;
          gradient(index, r, n, pixels, pre, g, p_.dresidual);
          add_row(p_.x + index, g, r, n, pixels, sum_g, sum_gx, db, dw);
        }
      }
      for (int64_t j = 0; j < n; ++j) total_g[j] += sum_g[j];
      for (int64_t j = 0; j < n; ++j) total_gx[j] += sum_gx[j];
    }
    if (p_.config.frozen) return;
    const bool centered = p_.config.statistic == Statistic::MeanVar;
    const double scale = 1.0 / static_cast<double>(rows);
    for (int64_t j = 0; j < n; ++j) {
      const double r = pixels.rstd[j];
      pixels.c[j] = static_cast<A>(-r * r * total_gx[j] * scale);
      pixels.e[j] = centered ? static_cast<A>(-r * total_g[j] * scale) : A(0);
    }
  }

  // sum_g += w g, sum_gx += w g xhat per pixel; the row's own sums go to its channel.
  template <typename G>
  void add_row(const T* x, const G* g, int64_t r, int64_t n, const Pixels<A>& pixels, A* sum_g,
               A* sum_gx, double* db, double* dw) {
    LaneSum<A> row_g, row_gx;
    const A w = weight(r);
    // Rows are too far apart for the hardware to foresee: 10 to 20 % of a backward pass.
    const int64_t ahead = 2 * t_.stride;
    for_each_wide<A>(n, [&](auto tag, int64_t j) {
      prefetch(x + ahead + j);
      if constexpr (std::is_same_v<G, T>) prefetch(g + ahead + j);
      const auto v = load(tag, g + j);
      const auto xhat =
          (load(tag, x + j) - load(tag, pixels.mean + j)) * load(tag, pixels.rstd + j);
      using V = std::decay_t<decltype(v)>;
      const auto wv = v * V(w);
      row_g.add(v);
      row_gx.add_product(v, xhat);
      store(tag, sum_g + j, load(tag, sum_g + j) + wv);
      store(tag, sum_gx + j, fmadd(wv, V(xhat), load(tag, sum_gx + j)));
    });
    db[r] += row_g.total();
    dw[r] += row_gx.total();
  }

  template <typename G>
  void to_input(int64_t index, int64_t r, int64_t n, const G* g, const Pixels<A>& pixels) {
    if (p_.dx == nullptr) return;
    const T* x = p_.x + index;
    T* dx = p_.dx + index;
    const A w = weight(r);
    for_each_wide<A>(n, [&](auto tag, int64_t j) {
      const auto d = load(tag, x + j) - load(tag, pixels.mean + j);
      using V = std::decay_t<decltype(d)>;
      const V wg = load(tag, g + j) * V(w);
      store(tag, dx + j,
            fmadd(wg, load(tag, pixels.rstd + j),
                  fmadd(load(tag, pixels.c + j), V(d), load(tag, pixels.e + j))));
    });
  }

  const NormBackward<T>& p_;
  const View& v_;
  const PixelTiling t_;
  const bool epilogue_;
  bool parameters_, sums_;
};

}  // namespace

template <typename T>
void pixel_norm_fwd(const NormForward<T>& p) {
  PixelForward<T>(p).run();
}

template <typename T>
void pixel_norm_bwd(const NormBackward<T>& p) {
  PixelBackward<T>(p).run();
}

#define FASTNORM_PIXEL_NORM(T)                            \
  template void pixel_norm_fwd<T>(const NormForward<T>&); \
  template void pixel_norm_bwd<T>(const NormBackward<T>&);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_PIXEL_NORM)
#undef FASTNORM_PIXEL_NORM

}  // namespace fastnorm::cpu
