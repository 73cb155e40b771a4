// Dropout on the CPU: one pass over memory each way.
//
// Forward and backward are one kernel, because the backward pass is the forward one of the
// gradient: keep ? scale * g : 0, where an activation puts g = dy * activation'(x + bias). The
// derivative comes before the mask, so that a dropped element's gradient is 0 even at inf.
//
// Work is cut into blocks of kMaskBlock elements of the mask; neither a block's bits nor its
// arithmetic know which thread runs it.
#include "cpu/dropout_cpu.h"

#include <ATen/Parallel.h>

#include "cpu/chunk.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread is worth waking for
static_assert(kMaskBlock == kChunk);

// From here on an output is stored past the caches, where its bits cost less than its bytes.
constexpr int64_t kStreamBytes = 8 << 20;

template <typename T>
bool past_caches(const T* in, const T* out, const DropoutConfig& config) {
  return in != out && config.view.shared > 1 &&
         config.view.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// values += bias of the columns that begin at `column`
template <typename A>
void add_bias(const A* bias, A* values, int64_t n, int64_t column, int64_t columns) {
  while (n > 0) {
    const int64_t count = std::min(n, columns - column);
    add_chunk<A>(bias + column, values, count);
    values += count;
    n -= count;
    column = 0;
  }
}

// One pass, forward or backward: what a stretch of elements becomes when it is kept or dropped.
template <typename T>
struct Pass {
  using A = acc_t<T>;
  const DropoutConfig& config;
  const T* in;  // x or dy
  const T* x;   // null in the forward pass; x where the activation's derivative is taken
  const A* bias;
  const T* residual;
  T* out;
  int64_t columns;
  A scale, shift, dropped;
  bool stream;

  explicit Pass(const DropoutForward<T>& p)
      : config(p.config),
        in(p.x),
        x(nullptr),
        bias(p.bias),
        residual(p.residual),
        out(p.y),
        columns(p.columns),
        scale(static_cast<A>(p.config.dropout.scale)),
        shift(static_cast<A>(p.config.shift)),
        dropped(static_cast<A>(p.config.dropped)),
        stream(past_caches(p.x, p.y, p.config)) {}

  explicit Pass(const DropoutBackward<T>& p)
      : config(p.config),
        in(p.dy),
        x(p.x),
        bias(p.bias),
        residual(nullptr),
        out(p.dx),
        columns(p.columns),
        scale(static_cast<A>(p.config.dropout.scale)),
        shift(0),
        dropped(0),
        stream(past_caches(p.dy, p.dx, p.config)) {}

  bool shifted() const { return shift != A(0) || dropped != A(0); }
  bool plain() const {
    return bias == nullptr && residual == nullptr && config.activation == Activation::None &&
           !shifted();
  }

  // in -> values, with bias and activation.
  void begin(A* values, int64_t first, int64_t n) const {
    load_chunk(in + first, values, n);
    if (x != nullptr) {
      A pre[kChunk];
      load_chunk(x + first, pre, n);
      if (bias != nullptr) add_bias(bias, pre, n, first % columns, columns);
      activate_chunk_backward(config.activation, pre, values, n);
    } else {
      if (bias != nullptr) add_bias(bias, values, n, first % columns, columns);
      activate_chunk(config.activation, values, n);
    }
  }

  void end(A* values, int64_t first, int64_t n) const {
    if (residual != nullptr) add_chunk(residual + first, values, n);
    store_chunk(values, out + first, n);
  }

  // A stretch (n <= kChunk) that is kept or dropped element by element.
  void masked(int64_t first, int64_t n, const KeepMask* mask) const {
    if (plain()) return scale_kept(in + first, out + first, mask, n, scale, stream);
    A values[kChunk];
    begin(values, first, n);
    scale_kept(values, values, mask, n, scale);
    if (shifted()) {
      for (int64_t i = 0; i < n; ++i) values[i] += mask[i] ? shift : dropped;
    }
    end(values, first, n);
  }

  // A stretch that is kept, or dropped, as a whole.
  void whole(int64_t first, int64_t n, bool keep) const {
    if (shifted()) return whole_shifted(first, n, keep);
    if (residual == nullptr) {
      if (keep) {
        scale_stretch(in + first, out + first, n, scale, stream);
      } else {
        zero_stretch(out + first, n, stream);
      }
    } else {
      keep ? scale_add_stretch(in + first, residual + first, out + first, n, scale, stream)
           : copy_stretch(residual + first, out + first, n, stream);
    }
  }

  void whole_shifted(int64_t first, int64_t n, bool keep) const {
    for_each_wide<A>(n, [&](auto tag, int64_t i) {
      using V = decltype(load(tag, in));
      V value = keep ? load(tag, in + first + i) * V(scale) + V(shift) : V(dropped);
      if (residual != nullptr) value = value + load(tag, residual + first + i);
      store(tag, out + first + i, value);
    });
  }
};

// shared == 1: element i has its own bit.
template <typename T>
void each_element(const Pass<T>& pass) {
  const Dropout& dropout = pass.config.dropout;
  const int64_t numel = pass.config.view.numel();
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  at::parallel_for(0, blocks_of(numel, kMaskBlock), kGrain / kMaskBlock,
                   [&](int64_t begin, int64_t end) {
                     if (pass.plain()) {
                       const int64_t first = begin * kMaskBlock;
                       const int64_t n = std::min(end * kMaskBlock, numel) - first;
                       apply_dropout(pass.in + first, pass.out + first, n, first, dropout);
                       return;
                     }
                     MaskBuffer buffer;
                     for (int64_t b = begin; b < end; ++b) {
                       const int64_t first = b * kMaskBlock;
                       const int64_t n = std::min(kMaskBlock, numel - first);
                       pass.masked(first, n, buffer.fill(first, n, seed, dropout.threshold));
                     }
                   });
}

// inner == 1: row o of `shared` elements has bit o.
template <typename T>
void each_row(const Pass<T>& pass) {
  const Dropout& dropout = pass.config.dropout;
  const MaskView& view = pass.config.view;
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  at::parallel_for(0, view.numel(), kGrain, [&](int64_t begin, int64_t end) {
    MaskBuffer buffer;
    const KeepMask* mask = nullptr;
    int64_t mask_begin = 0, mask_end = 0;
    for (int64_t first = begin; first < end;) {
      const int64_t row = first / view.shared;
      if (row >= mask_end) {
        mask_begin = row;
        mask_end = std::min({row + kMaskBlock, view.outer, (end - 1) / view.shared + 1});
        mask = buffer.fill(row, mask_end - row, seed, dropout.threshold);
      }
      const int64_t n = std::min(end, (row + 1) * view.shared) - first;
      pass.whole(first, n, mask[row - mask_begin] != 0);
      first += n;
    }
    end_streaming();
  });
}

// Rows (o, s) of `inner` elements share the bits of o.
template <typename T>
void each_column(const Pass<T>& pass) {
  const Dropout& dropout = pass.config.dropout;
  const MaskView& view = pass.config.view;
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const int64_t grain = std::max<int64_t>(1, kGrain / view.inner);
  at::parallel_for(0, view.outer * view.shared, grain, [&](int64_t begin, int64_t end) {
    MaskBuffer buffer;
    for (int64_t row = begin; row < end;) {
      const int64_t o = row / view.shared;
      const int64_t last = std::min(end, (o + 1) * view.shared);
      for (int64_t column = 0; column < view.inner; column += kMaskBlock) {
        const int64_t n = std::min(kMaskBlock, view.inner - column);
        const KeepMask* mask = buffer.fill(o * view.inner + column, n, seed, dropout.threshold);
        for (int64_t r = row; r < last; ++r) pass.masked(r * view.inner + column, n, mask);
      }
      row = last;
    }
    end_streaming();
  });
}

// Nothing is dropped: the fused rest alone.
template <typename T>
void keep_all(const Pass<T>& pass) {
  const int64_t numel = pass.config.view.numel();
  at::parallel_for(0, blocks_of(numel, kChunk), kGrain / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kChunk;
      const int64_t n = std::min(kChunk, numel - first);
      acc_t<T> values[kChunk];
      pass.begin(values, first, n);
      pass.end(values, first, n);
    }
  });
}

template <typename T>
void run(const Pass<T>& pass) {
  const MaskView& view = pass.config.view;
  if (pass.config.dropout.seed == nullptr) return keep_all(pass);
  if (view.shared == 1) return each_element(pass);
  view.inner == 1 ? each_row(pass) : each_column(pass);
}

}  // namespace

template <typename T>
void dropout_fwd(const DropoutForward<T>& p) {
  run(Pass<T>(p));
}

template <typename T>
void dropout_bwd(const DropoutBackward<T>& p) {
  run(Pass<T>(p));
}

#define FASTNORM_INSTANTIATE(T)                           \
  template void dropout_fwd<T>(const DropoutForward<T>&); \
  template void dropout_bwd<T>(const DropoutBackward<T>&);
FASTNORM_FOR_EACH_DTYPE(FASTNORM_INSTANTIATE)
#undef FASTNORM_INSTANTIATE

}  // namespace fastnorm::cpu
