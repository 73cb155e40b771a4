// Random bits for dropout: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011), indexed by element, so that a mask depends on (seed, element index, p) alone.
//
// Elements 8c .. 8c+7 share the call with counter (c mod 2^32, c / 2^32, 0, 0) and key
// (seed mod 2^32, seed / 2^32). Element 8c+j uses the low (j even) or high (j odd) 16 bits of
// word j / 2, and is kept when they are below the threshold.
#pragma once

#include <cstdint>

#include "common/norm.h"

namespace fastnorm {

struct Philox4 {
  uint32_t word[4];

  // 16 random bits of element j of the 8 that share the call.
  FASTNORM_HD uint32_t bits16(int j) const { return (word[j >> 1] >> (16 * (j & 1))) & 0xffffu; }
};

FASTNORM_HD Philox4 philox4x32_10(uint64_t counter, uint64_t seed) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Whether the element at `index` of the tensor's memory order is kept.
FASTNORM_HD bool philox_keep(uint64_t index, uint64_t seed, uint32_t threshold) {
  return philox4x32_10(index / 8, seed).bits16(static_cast<int>(index % 8)) < threshold;
}

}  // namespace fastnorm
