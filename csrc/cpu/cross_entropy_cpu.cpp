// Cross-entropy with label smoothing: loss and gradient of a row in one visit.
//
// For a row of logits x with target y, class weights w, prior u and smoothing e, over the allowed
// classes A = {k : x_k > -inf}:
//
//   t'_k = (1 - e) [k = y] + e u_k / Z,  Z = sum_A u      mass = sum_A w_k t'_k
//   s = sum exp(x_k - m),  m = max x                      log p_k = x_k - m - log s
//   loss = -sum w_k t'_k log p_k
//        = mass log s - (1 - e) w_y (x_y - m) - (e / Z) sum_A u_k w_k (x_k - m)
//   dloss/dx_k = mass p_k - w_k t'_k
//
// The row is read once from memory, a chunk at a time: exp(x_k - b) is stored with the largest
// logit b met so far, so that the gradient needs only one factor per chunk, mass exp(b - m) / s.
// Sums are taken in the accumulation type within a chunk and in double over chunks.
//
// A logit of -inf shows as a sum of logits that is not finite; only then are the sums over A taken
// again, one element at a time.
#include "cpu/cross_entropy_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/chunk.h"

namespace fastnorm::cpu {
namespace {

// Elements of a task: enough to outweigh its start.
constexpr int64_t kGrain = 32768;

// sum over A of u, u w and u w (x - m).
struct Smoothing {
  double prior = 0, weighted = 0, logits = 0;
};

template <typename T>
class Rows {
  using A = acc_t<T>;
  using Vec = at::vec::Vectorized<A>;

 public:
  explicit Rows(const CrossEntropy<T>& p)
      : p_(p),
        exps_(p.grad != nullptr ? new A[p.classes + Vec::size()] : nullptr),
        bases_((p.classes + kChunk - 1) / kChunk) {
    if (p.smoothing > 0) {
      for (int64_t k = 0; k < p.classes; ++k) {
        all_.prior += prior(k);
        all_.weighted += static_cast<double>(prior(k)) * weight(k);
      }
    }
  }

  void run(int64_t row) {
    const int64_t y = p_.target[row];
    T* grad = p_.grad == nullptr ? nullptr : p_.grad + row * p_.classes;
    if (y == p_.ignore_index) {
      p_.loss[row] = p_.mass[row] = 0;
      if (grad != nullptr) std::fill(grad, grad + p_.classes, T(0));
      return;
    }
    const T* x = p_.x + row * p_.classes;
    read(x);
    if (!std::isfinite(max_)) {
      // Nothing allowed, or an infinity or NaN to begin with.
      p_.loss[row] = p_.mass[row] = std::numeric_limits<A>::quiet_NaN();
      if (grad != nullptr) std::fill(grad, grad + p_.classes, static_cast<T>(p_.loss[row]));
      return;
    }
    const bool smooth = p_.smoothing > 0;
    const bool masked = smooth && !std::isfinite(sums_.logits);
    if (masked) sums_ = allowed_sums(x);
    // Where every allowed class has a prior of 0, nothing is left to smooth with.
    const double share = smooth && sums_.prior > 0 ? p_.smoothing / sums_.prior : 0.0;
    const double hard = (1 - p_.smoothing) * weight(y);
    const double mass = hard + share * sums_.weighted;
    double loss = mass * std::log(sum_) - share * sums_.logits;
    if (hard != 0) loss -= hard * (static_cast<double>(static_cast<A>(x[y])) - max_);
    p_.loss[row] = static_cast<A>(loss);
    p_.mass[row] = static_cast<A>(mass);
    if (grad != nullptr) write(x, y, mass, share, hard, masked, grad);
  }

 private:
  A weight(int64_t k) const { return p_.weight == nullptr ? A(1) : p_.weight[k]; }
  A prior(int64_t k) const { return p_.prior == nullptr ? A(1) : p_.prior[k]; }

  // Largest logit, sum of exps and, with smoothing, the sums of the logits, all of a row.
  void read(const T* x) {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    alignas(64) A chunk[kChunk + Vec::size()];
    max_ = kLowest;
    sum_ = 0;
    sums_ = all_;
    for (int64_t first = 0; first < p_.classes; first += kChunk) {
      const int64_t n = std::min(kChunk, p_.classes - first);
      load_chunk(x + first, chunk, n);
      Vec(kLowest).store(chunk + n);
      Vec largest(kLowest);
      for (int64_t i = 0; i < n; i += Vec::size()) {
        largest = at::vec::maximum(largest, Vec::loadu(chunk + i));
      }
      const A before = max_;
      max_ = std::max(max_, reduce_max(largest));  // NaN, should there be one, reaches the sum
      const A base = std::isfinite(max_) ? max_ : A(0);
      Vec total(A(0));
      for (int64_t i = 0; i < n; i += Vec::size()) {
        const Vec e = fast_exp(Vec::loadu(chunk + i) - Vec(base));
        total = total + e;
        if (exps_ != nullptr) e.store(exps_.get() + first + i);
      }
      if (max_ > before) sum_ *= std::exp(static_cast<double>(before) - max_);
      sum_ += Wide<A>(total, Vec(A(0))).sum();
      bases_[first / kChunk] = base;
      if (p_.smoothing > 0) add_logits(chunk, first, n, base);
    }
    if (p_.smoothing > 0) sums_.logits -= sums_.weighted * max_;
    if (std::isnan(sum_)) max_ = std::numeric_limits<A>::quiet_NaN();
  }

  static A reduce_max(Vec v) {
    A lanes[Vec::size()];
    v.store(lanes);
    return *std::max_element(lanes, lanes + Vec::size());
  }

  // sums_.logits += sum u w x over a chunk; the difference to the base keeps the digits.
  void add_logits(const A* chunk, int64_t first, int64_t n, A base) {
    if (p_.weight == nullptr && p_.prior == nullptr) {
      sums_.logits += static_cast<double>(base) * n + wide_sum<A>(n, [&](auto tag, int64_t i) {
                        return load(tag, chunk + i) - base;
                      });
      return;
    }
    const A weights =
        wide_sum<A>(n, [&](auto tag, int64_t i) { return coefficient(tag, first + i); });
    sums_.logits += static_cast<double>(base) * weights + wide_sum<A>(n, [&](auto tag, int64_t i) {
                      return coefficient(tag, first + i) * (load(tag, chunk + i) - base);
                    });
  }

  // u_k w_k
  template <typename Tag>
  auto coefficient(Tag tag, int64_t k) const {
    if (p_.weight == nullptr) return load(tag, p_.prior + k);
    if (p_.prior == nullptr) return load(tag, p_.weight + k);
    return load(tag, p_.prior + k) * load(tag, p_.weight + k);
  }

  Smoothing allowed_sums(const T* x) const {
    Smoothing s;
    for (int64_t k = 0; k < p_.classes; ++k) {
      const double logit = static_cast<A>(x[k]);
      if (logit == -std::numeric_limits<double>::infinity()) continue;
      const double c = static_cast<double>(prior(k)) * weight(k);
      s.prior += prior(k);
      s.weighted += c;
      s.logits += c * (logit - max_);
    }
    return s;
  }

  // grad = scale * (mass p - w t')
  void write(const T* x, int64_t y, double mass, double share, double hard, bool masked, T* grad) {
    const A* exps = exps_.get();
    const bool uniform = p_.weight == nullptr && p_.prior == nullptr;
    const A smooth = static_cast<A>(p_.scale * share);
    for (int64_t first = 0; first < p_.classes; first += kChunk) {
      const int64_t n = std::min(kChunk, p_.classes - first);
      const double shift = std::exp(static_cast<double>(bases_[first / kChunk]) - max_);
      const A factor = static_cast<A>(p_.scale * mass * shift / sum_);
      for_each_wide<A>(n, [&](auto tag, int64_t i) {
        const int64_t k = first + i;
        const auto e = load(tag, exps + k);
        if (uniform) {
          store(tag, grad + k, fmadd(e, decltype(e)(factor), decltype(e)(-smooth)));
        } else {
          const auto c = coefficient(tag, k) * decltype(e)(-smooth);
          store(tag, grad + k, fmadd(e, decltype(e)(factor), c));
        }
      });
    }
    if (masked) {
      for (int64_t k = 0; k < p_.classes; ++k) {
        if (static_cast<A>(x[k]) == -std::numeric_limits<A>::infinity()) grad[k] = T(0);
      }
    }
    // The target's own element again, so that its two parts are rounded together.
    const bool allowed = static_cast<A>(x[y]) != -std::numeric_limits<A>::infinity();
    const double shift = std::exp(static_cast<double>(bases_[y / kChunk]) - max_);
    double own = mass * shift * exps[y] / sum_ - hard;
    if (allowed) own -= share * prior(y) * weight(y);
    grad[y] = static_cast<T>(static_cast<A>(p_.scale * own));
  }

  const CrossEntropy<T>& p_;
  std::unique_ptr<A[]> exps_;  // exp(x - base of its chunk)
  std::vector<A> bases_;
  Smoothing all_;  // as if every class were allowed; the logits at 0
  // Of the current row:
  A max_ = 0;
  double sum_ = 0;
  Smoothing sums_;
};

}  // namespace

template <typename T>
void cross_entropy(const CrossEntropy<T>& p) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.classes));
  at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    Rows<T> rows(p);
    for (int64_t row = begin; row < end; ++row) rows.run(row);
  });
}

template void cross_entropy(const CrossEntropy<float>&);
template void cross_entropy(const CrossEntropy<double>&);
template void cross_entropy(const CrossEntropy<c10::BFloat16>&);
template void cross_entropy(const CrossEntropy<c10::Half>&);

}  // namespace fastnorm::cpu
