// Dropout masks on the CPU: philox.h, a chunk at a time.
#pragma once

#include "common/philox.h"

namespace fastnorm::cpu {

// values[i] becomes values[i] * scale where element first_index + i is kept, otherwise +0.
template <typename A>
inline void apply_dropout(A* values, int64_t n, uint64_t first_index, const Dropout& dropout) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const A scale = static_cast<A>(dropout.scale);
  int64_t i = 0;
  while (i < n) {
    const uint64_t index = first_index + i;
    const Philox4 bits = philox4x32_10(index / 8, seed);
    for (int j = static_cast<int>(index % 8); j < 8 && i < n; ++j, ++i) {
      values[i] = bits.bits16(j) < dropout.threshold ? values[i] * scale : A(0);
    }
  }
}

}  // namespace fastnorm::cpu
