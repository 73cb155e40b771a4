// Penalties on parameters: value and gradient in one read of w.
//
//   Ω(w) = l1 Σ|w| + l2/2 Σw²,   dΩ/dw = l1 sign(w) + l2 w,   sign(0) = 0
//
// torch needs a pass for the gradient, one for a temporary of signs, and one for each sum. All
// tensors are cut into blocks of a fixed size; the sums of a block are taken in the accumulation
// type and added up in order, so the value depends on the shapes alone.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/vec_math.h"
#include "torch_utils.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t kPenaltyBlock = 16384;

// Summed in the accumulation type; longer sums are taken in double. A second sum over a stretch
// finds it in L1.
constexpr int64_t kSumStretch = 1024;

template <typename A>
Wide<A> sign(Wide<A> x) {
  using Vec = typename Wide<A>::Vec;
  const Vec zero(A(0));
  return {x.lo.gt(zero) - x.lo.lt(zero), x.hi.gt(zero) - x.hi.lt(zero)};
}
inline float sign(float x) { return static_cast<float>((x > 0) - (x < 0)); }
inline double sign(double x) { return static_cast<double>((x > 0) - (x < 0)); }

// grad += l1 sign(w) + l2 w over n elements, and the sum of term(w) in the same loop.
template <typename T, typename F>
acc_t<T> add_gradient(const T* w, T* grad, int64_t n, acc_t<T> l1, acc_t<T> l2, F&& term) {
  return wide_sum<acc_t<T>>(n, [&](auto tag, int64_t i) {
    const auto x = load(tag, w + i);
    using V = std::decay_t<decltype(x)>;
    store(tag, grad + i, fmadd(V(l1), sign(x), fmadd(V(l2), x, load(tag, grad + i))));
    return term(x);
  });
}

struct Block {
  size_t tensor;
  int64_t first, count;
};

at::Tensor add_penalty_grad_(at::TensorList grads, at::TensorList params, double l1, double l2) {
  TORCH_CHECK(!params.empty() && grads.size() == params.size(),
              "add_penalty_grad_: expected as many gradients as parameters, at least one; got ",
              grads.size(), " and ", params.size());
  const at::ScalarType dtype = params[0].scalar_type();
  std::vector<Block> blocks;
  for (size_t t = 0; t < params.size(); ++t) {
    const at::Tensor &w = params[t], &g = grads[t];
    TORCH_CHECK(w.is_non_overlapping_and_dense() && w.scalar_type() == dtype &&
                    g.scalar_type() == dtype && g.sizes() == w.sizes() &&
                    g.strides() == w.strides(),
                "add_penalty_grad_: expected dense tensors of one dtype, gradients like their "
                "parameters");
    for (int64_t first = 0; first < w.numel(); first += kPenaltyBlock) {
      blocks.push_back({t, first, std::min(kPenaltyBlock, w.numel() - first)});
    }
  }
  at::Tensor sums = at::empty({2}, params[0].options().dtype(accumulate_type(dtype)));
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    std::vector<double> parts(2 * blocks.size());
    const int64_t count = static_cast<int64_t>(blocks.size());
    at::parallel_for(0, count, 2, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Block& block = blocks[b];
        const T* w = params[block.tensor].const_data_ptr<T>() + block.first;
        T* grad = grads[block.tensor].mutable_data_ptr<T>() + block.first;
        const A a1 = static_cast<A>(l1), a2 = static_cast<A>(l2);
        const auto magnitude = [](auto x) { return x * sign(x); };
        const auto square = [](auto x) { return x * x; };
        for (int64_t at = 0; at < block.count; at += kSumStretch) {
          const int64_t n = std::min(kSumStretch, block.count - at);
          // A sum that the penalty lacks is not taken.
          if (l1 == 0) {
            parts[2 * b + 1] += add_gradient(w + at, grad + at, n, a1, a2, square);
            continue;
          }
          parts[2 * b] += add_gradient(w + at, grad + at, n, a1, a2, magnitude);
          if (l2 != 0) {
            parts[2 * b + 1] +=
                wide_sum<A>(n, [&](auto tag, int64_t i) { return square(load(tag, w + at + i)); });
          }
        }
      }
    });
    double l1_sum = 0, l2_sum = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      l1_sum += parts[2 * b];
      l2_sum += parts[2 * b + 1];
    }
    A* out = sums.mutable_data_ptr<A>();
    out[0] = static_cast<A>(l1_sum);
    out[1] = static_cast<A>(l2_sum);
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) { m.impl("add_penalty_grad_", &add_penalty_grad_); }

}  // namespace fastnorm::cpu
