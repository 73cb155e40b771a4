// What the three forms of the column geometry share.
//
//   form    reduced elements                      statistic of     file
//   plane   planes of `inner` contiguous elements  a channel        plane_norm_cpu.cpp
//   column  columns of a [rows][row_size] matrix   some columns     column_norm_cpu.cpp
//   pixel   a strided column per pixel             a pixel          pixel_norm_cpu.cpp
//
// Sums run in the accumulation type over pieces whose extent depends on the shape alone, then in
// double over the pieces in index order, so that no result depends on who computed it. Deviations
// are taken from a shift K near the mean: with d = x - K over n elements,
//
//   mean = K + sum(d) / n,   m2 = sum(d^2) - sum(d)^2 / n,
//
// which loses about (1 + (mean - K)^2 / variance) rounding errors. K is the mean of the first
// rows of the piece, itself taken from the first element's deviations, so that equal elements
// give that element and a variance of zero, both exact.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <memory>
#include <vector>

#include "common/stats.h"
#include "cpu/chunk.h"

namespace fastnorm::cpu {

// Elements in the accumulation type that take half of a 512 KB L2.
constexpr int64_t kResident = 64 * 1024;

// Rows that share one load and store of their column's sums.
constexpr int kRowGroup = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Memory of one thread, kept between calls: fresh pages would cost more than many kernels do.
enum class Slot { Sums, Columns, Gradient, Partial, Folds };

template <typename E, Slot kSlot>
E* thread_scratch(int64_t count) {
  thread_local std::vector<E> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

template <typename E>
std::unique_ptr<E[]> uninitialized(int64_t count) {
  return std::unique_ptr<E[]>(new E[count]);
}

// f(task) for every task, in parallel where the tasks of a thread move enough bytes.
template <typename F>
void parallel_tasks(int64_t tasks, int64_t bytes_per_task, F&& f) {
  constexpr int64_t kGrainBytes = 64 * 1024;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_task));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

// The last tasks of a thread first: what it read last in the pass before is still in its cache.
template <typename F>
void parallel_tasks_reversed(int64_t tasks, int64_t bytes_per_task, F&& f) {
  constexpr int64_t kGrainBytes = 64 * 1024;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_task));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = end; task-- > begin;) f(task);
  });
}

// A running sum that takes both kinds of element.
template <typename A>
struct LaneSum {
  Wide<A> wide;
  A one = 0;

  void add(Wide<A> v) { wide += v; }
  void add(A v) { one += v; }
  void add_product(Wide<A> a, Wide<A> b) { wide = fmadd(a, b, wide); }
  void add_product(A a, A b) { one = fmadd(a, b, one); }
  A total() const { return wide.sum() + one; }
};

// From the rounded variance, so that forward and backward use the same number.
template <typename A>
inline double inverse_std(A var, double eps) {
  return 1.0 / std::sqrt(static_cast<double>(var) + eps);
}

// `count` stretches of `length` elements, `stride` apart in a tensor, one after the other in
// scratch.
struct Stretches {
  int64_t offset, length, count = 1, stride = 0;

  int64_t size() const { return count * length; }
  // f(offset in the tensor, offset in scratch)
  template <typename F>
  void for_each(F&& f) const {
    for (int64_t s = 0; s < count; ++s) f(offset + s * stride, s * length);
  }
};

// From the norm in `values` to the output.
template <typename T>
inline void finish_forward(const NormConfig& c, const Stretches& at, acc_t<T>* values,
                           const T* residual, T* y) {
  if (residual != nullptr) {
    at.for_each([&](int64_t i, int64_t j) { add_chunk(residual + i, values + j, at.length); });
  }
  const bool dropout = c.dropout.seed != nullptr;
  if (c.activation != Activation::None) {
    if (at.count == 1 && !dropout) {
      return activate_chunk(c.activation, values, y + at.offset, at.length);
    }
    activate_chunk(c.activation, values, values, at.size());
  }
  at.for_each([&](int64_t i, int64_t j) {
    if (dropout) apply_dropout(values + j, at.length, i, c.dropout);
    store_chunk(values + j, y + i, at.length);
  });
}

// From the gradient of the output to that of the norm, `grad`. `pre`, needed by an activation
// only, is the norm; it is overwritten.
template <typename T>
inline void start_backward(const NormConfig& c, const Stretches& at, const T* dy, const T* residual,
                           acc_t<T>* pre, acc_t<T>* grad, T* dresidual) {
  const bool dropout = c.dropout.seed != nullptr, active = c.activation != Activation::None;
  const bool direct = at.count == 1 && !dropout && active;
  if (active && residual != nullptr) {
    at.for_each([&](int64_t i, int64_t j) { add_chunk(residual + i, pre + j, at.length); });
  }
  if (direct) {
    activate_chunk_backward(c.activation, pre, dy + at.offset, grad, at.length);
  } else {
    at.for_each([&](int64_t i, int64_t j) {
      load_chunk(dy + i, grad + j, at.length);
      if (dropout) apply_dropout(grad + j, at.length, i, c.dropout);
    });
    if (active) activate_chunk_backward(c.activation, pre, grad, grad, at.size());
  }
  if (dresidual == nullptr) return;
  at.for_each([&](int64_t i, int64_t j) { store_chunk(grad + j, dresidual + i, at.length); });
}

// Whether the second pass may read the gradient that the pass of the sums has written. In 16 bits
// it is not quite what was summed, and among few values most of it cancels.
template <typename T>
inline bool is_exact_enough(const View& view) {
  return sizeof(T) > 2 || std::min(view.reduce_outer, view.tail) * view.reduce_inner >= 64;
}
template <typename T>
inline bool reads_back(const NormBackward<T>& p) {
  return p.dresidual != nullptr && is_exact_enough<T>(p.config.view);
}

// A ReLU without dropout is worked out within the loops of the norm, not chunk by chunk.
template <typename P>
inline bool is_fused_relu(const P& p) {
  return p.config.activation == Activation::Relu && p.config.dropout.seed == nullptr;
}

// The gradient that a ReLU lets through.
template <typename V>
inline V relu_gradient(V pre, V grad) {
  return Math<V>::where_nonpositive(pre, V(0), grad);
}

// Whether the gradient of the norm differs from that of the output, or has to be written.
template <typename T>
inline bool has_backward_epilogue(const NormBackward<T>& p) {
  return p.config.activation != Activation::None || p.config.dropout.seed != nullptr ||
         p.dresidual != nullptr;
}

// What a backward call has to do: a pass of sums, a map of gradients to dx, or both.
template <typename T>
class BackwardPasses {
 protected:
  explicit BackwardPasses(const NormBackward<T>& p)
      : epilogue_(has_backward_epilogue(p)),
        relu_(is_fused_relu(p) && (p.dresidual == nullptr || p.residual != nullptr)),
        parameters_(p.dweight != nullptr || p.dbias != nullptr),
        sums_(parameters_ || (p.dx != nullptr && !p.config.frozen)),
        map_needed_(sums_ ? p.dx != nullptr && !p.config.frozen
                          : p.dx != nullptr || p.dresidual != nullptr),
        fused_dx_(sums_ && p.config.frozen ? p.dx : nullptr) {}

  // Where the sums' pass leaves the gradient, so that the map need not work it out again. dx can
  // hold it until the map where the two passes are `split`, and no cache does.
  T* stored_gradient(const NormBackward<T>& p, bool split) const {
    if (!sums_ || !map_needed_ || !epilogue_) return nullptr;
    if (reads_back(p)) return p.dresidual;
    return !relu_ && split && is_exact_enough<T>(p.config.view) ? p.dx : nullptr;
  }

  const bool epilogue_, relu_, parameters_, sums_, map_needed_;
  T* const fused_dx_;  // dx, where frozen statistics let the sums' pass write it
};

// Whether rows that are `stride` apart lie in pages of their own. The hardware foresees one run per
// page: rows within one are read singly, or asked for.
template <typename T>
constexpr bool is_page_apart(int64_t stride) {
  return stride * static_cast<int64_t>(sizeof(T)) >= 4096;
}

// Asks for what a row group ahead holds.
template <int R, typename T>
inline void prefetch_rows(const T* x, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) __builtin_prefetch(x + (kRowGroup + r) * stride);
}

// sum += d, square += d^2 over R rows of n columns, d = x - shift.
template <int R, bool kPrefetch, typename T, typename A>
inline void add_moments(const T* x, int64_t stride, int64_t n, const A* shift, A* sum, A* square) {
  for_each_wide<A>(n, [&](auto tag, int64_t j) {
    if constexpr (kPrefetch) prefetch_rows<R>(x + j, stride);
    const auto k = load(tag, shift + j);
    auto d = load(tag, x + j) - k;
    auto s = d, q = d * d;
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) {
      d = load(tag, x + r * stride + j) - k;
      s = s + d;
      q = fmadd(d, d, q);
    }
    store(tag, sum + j, load(tag, sum + j) + s);
    store(tag, square + j, load(tag, square + j) + q);
  });
}

// The mean of `rows` rows, from the deviations from the first.
template <typename T, typename A>
inline void mean_of_rows(const T* x, int64_t stride, int64_t rows, int64_t n, A* mean) {
  const A scale = A(1) / static_cast<A>(rows);
  for_each_wide<A>(n, [&](auto tag, int64_t j) {
    const auto first = load(tag, x + j);
    auto s = first - first;
    for (int64_t r = 1; r < rows; ++r) s = s + (load(tag, x + r * stride + j) - first);
    store(tag, mean + j, first + s * scale);
  });
}

// sum and square over `rows` rows of n columns, from nothing; `centered` chooses the shift.
template <typename T, typename A>
inline void column_moments(const T* x, int64_t stride, int64_t rows, int64_t n, bool centered,
                           A* shift, A* sum, A* square) {
  std::fill_n(sum, n, A(0));
  std::fill_n(square, n, A(0));
  if (centered && rows > 0) {
    mean_of_rows(x, stride, std::min<int64_t>(rows, kRowGroup), n, shift);
  } else {
    std::fill_n(shift, n, A(0));
  }
  int64_t r = 0;
  for (; r + kRowGroup <= rows; r += kRowGroup) {
    const T* group = x + r * stride;
    if (is_page_apart<T>(stride)) {
      add_moments<kRowGroup, false>(group, stride, n, shift, sum, square);
    } else {
      add_moments<kRowGroup, true>(group, stride, n, shift, sum, square);
    }
  }
  for (; r < rows; ++r) add_moments<1, false>(x + r * stride, stride, n, shift, sum, square);
}

// The mean and the squared deviations of `count` elements behind each of n sums.
template <typename A>
inline void finish_moments(const A* shift, const A* sum, const A* square, int64_t count, int64_t n,
                           bool centered, double* mean, double* m2) {
  const double scale = count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
  for (int64_t j = 0; j < n; ++j) {
    const double s = sum[j], centered_square = square[j] - s * s * scale;
    mean[j] = centered ? shift[j] + s * scale : 0.0;
    m2[j] = !centered ? square[j] : centered_square < 0.0 ? 0.0 : centered_square;
  }
}

// sum_g += g, sum_gd += g d over R rows, d = x - mean; g = grad(tag, d, r, j).
template <int R, typename T, typename A, typename F>
inline void add_gradients(const T* x, int64_t stride, int64_t n, const A* mean, A* sum_g, A* sum_gd,
                          F&& grad) {
  for_each_wide<A>(n, [&](auto tag, int64_t j) {
    const auto m = load(tag, mean + j);
    auto d = load(tag, x + j) - m;
    auto g = grad(tag, d, 0, j);
    auto s = g, q = g * d;
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) {
      d = load(tag, x + r * stride + j) - m;
      g = grad(tag, d, r, j);
      s = s + g;
      q = fmadd(g, d, q);
    }
    store(tag, sum_g + j, load(tag, sum_g + j) + s);
    store(tag, sum_gd + j, load(tag, sum_gd + j) + q);
  });
}

// The same over any number of rows; grad takes rows from 0 on. Two at a time load and store the
// sums half as often, where the hardware follows them.
template <typename T, typename A, typename F>
inline void add_gradient_rows(const T* x, int64_t stride, int64_t rows, int64_t n, const A* mean,
                              A* sum_g, A* sum_gd, F&& grad) {
  int64_t r = 0;
  for (; is_page_apart<T>(stride) && r + 2 <= rows; r += 2) {
    add_gradients<2>(
        x + r * stride, stride, n, mean, sum_g, sum_gd,
        [&](auto tag, auto d, int64_t i, int64_t j) { return grad(tag, d, r + i, j); });
  }
  for (; r < rows; ++r) {
    add_gradients<1>(
        x + r * stride, stride, n, mean, sum_g, sum_gd,
        [&](auto tag, auto d, int64_t i, int64_t j) { return grad(tag, d, r + i, j); });
  }
}

// Merges `pieces` rows of n means and squared deviations, `stride` apart, into the first; count(i)
// elements are behind piece i. Equal means stay as they are.
template <typename F>
inline void merge_pieces(int64_t pieces, int64_t stride, int64_t n, F&& count, double* mean,
                         double* m2) {
  if (pieces == 1) return;
  constexpr int64_t kBlock = 64;
  double total = 0;
  for (int64_t i = 0; i < pieces; ++i) total += static_cast<double>(count(i));
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = std::min(kBlock, n - first);
    double shift[kBlock] = {}, square[kBlock] = {};
    double* const mean0 = mean + first;
    double* const m20 = m2 + first;
    for (int64_t i = 1; i < pieces; ++i) {
      const double share = static_cast<double>(count(i)) / total;
      const double* m = mean0 + i * stride;
      if (share > 0) {
        for (int64_t j = 0; j < size; ++j) shift[j] += share * (m[j] - mean0[j]);
      }
    }
    for (int64_t i = 0; i < pieces; ++i) {
      const double weight = static_cast<double>(count(i));
      const double* m = mean0 + i * stride;
      const double* q = m20 + i * stride;
      if (weight > 0) {
        for (int64_t j = 0; j < size; ++j) {
          const double d = m[j] - mean0[j] - shift[j];
          square[j] += q[j] + weight * d * d;
        }
      }
    }
    for (int64_t j = 0; j < size; ++j) mean0[j] += shift[j];
    std::copy_n(square, size, m20);
  }
}

// Merges the means and squared deviations of n columns of `count` elements each into the first.
// Equal means stay as they are.
inline void merge_columns(int64_t n, int64_t count, double* mean, double* m2) {
  if (n == 1) return;
  const auto deviation = [=](auto tag, int64_t i, double from) {
    const auto m = load(tag, mean + i);
    return m - std::remove_const_t<decltype(m)>(from);
  };
  const double first = mean[0], weight = static_cast<double>(count);
  const double shift =
      wide_sum<double>(n, [&](auto tag, int64_t i) { return deviation(tag, i, first); }) /
      static_cast<double>(n);
  m2[0] = wide_sum<double>(n, [&](auto tag, int64_t i) {
    const auto d = deviation(tag, i, first + shift);
    return fmadd(d * std::remove_const_t<decltype(d)>(weight), d, load(tag, m2 + i));
  });
  mean[0] = first + shift;
}

// Adds rows 1 .. pieces - 1 of n sums, `stride` apart, to row 0.
inline void add_pieces(int64_t pieces, int64_t stride, int64_t n, double* sums) {
  for (int64_t i = 1; i < pieces; ++i) {
    for (int64_t j = 0; j < n; ++j) sums[j] += sums[i * stride + j];
  }
}

template <typename T>
void plane_norm_fwd(const NormForward<T>& p);
template <typename T>
void plane_norm_bwd(const NormBackward<T>& p);
template <typename T>
void pixel_norm_fwd(const NormForward<T>& p);
template <typename T>
void pixel_norm_bwd(const NormBackward<T>& p);

// One pixel per sample: the channels are a contiguous row.
inline bool is_single_pixel(const View& v) { return v.kept == 1 && v.tail == v.reduce_outer; }

inline View pixel_as_row(const View& v) { return View{v.outer, 1, 1, v.reduce_outer, 1, 1}; }

}  // namespace fastnorm::cpu
