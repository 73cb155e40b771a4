// Runs CUDA kernels on the CPU: every CUDA thread is a fiber on one OS thread.
//
// The unchanged csrc/cuda/*.cuh files are compiled with g++ with tests/simt/include first on the
// include path; launch() stands for <<<>>>. Fibers run until a collective (barrier, shuffle, vote)
// and are resumed in a chosen order; a kernel whose result depends on that order has a race.
// A collective that can't complete ends the launch with a report naming file and line of each
// stuck group of threads. Shared memory comes from dynamic_shared() only, so that the CTAs of a
// cluster each have their own and its size is exactly the launch's; it is filled with NaN bits
// before each block. Global memory is reached through the cache-hint intrinsics (__ldg, __stcs,
// ...), which check alignment and bounds and count bytes, requests and 128-byte segments.
//
// Not covered: memory order between blocks, rounding of approximate intrinsics, register limits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#define FASTNORM_SIMT 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(4) char4 {
  signed char x, y, z, w;
};
struct alignas(4) ushort2 {
  unsigned short x, y;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = struct CUstream_st*;

namespace simt {

struct Block;
struct Warp;

struct Site {
  const char* what;
  const char* file;
  int line;
};

struct Fiber;
extern Fiber* current;

// What a kernel may ask about its own thread; Fiber (simt.cpp) begins with it.
struct ThreadView {
  dim3 thread, block, block_dim, grid_dim;
  unsigned char* shared;
  unsigned rank_in_cluster, cluster_size;
};
inline const ThreadView& self() { return *reinterpret_cast<const ThreadView*>(current); }

struct Launch {
  dim3 grid, block;
  size_t shared = 0;           // bytes of dynamic shared memory
  unsigned cluster = 1;        // CTAs per cluster, along x
  bool cooperative = false;    // whole grid resident: grid barriers allowed
  bool large_cluster = false;  // cudaFuncAttributeNonPortableClusterSizeAllowed
};

// Returns 0, or 1 with the reason in simt_last_error().
int run(const char* name, const Launch& config, const std::function<void()>& body);

template <typename... P, typename... A>
int launch(const char* name, const Launch& config, void (*kernel)(P...), A... args) {
  return run(name, config, [=] { kernel(P(args)...); });
}

[[noreturn]] void fail(const std::string& message);

void sync_threads(Site site);
void sync_cluster(Site site);
void arrive_cluster(Site site);
void wait_cluster(Site site);
void sync_grid(Site site);
unsigned char* shared_of_rank(const void* pointer, unsigned rank);

// Gathers one 64-bit value from each lane of `mask`; returns the 32 slots of the warp.
// The array stays valid until this lane's next collective.
const uint64_t* gather(unsigned mask, uint64_t value, Site site);
unsigned lane_id();

// Called once per access of global memory. `hint` is the cache operator's name.
void global_access(const void* pointer, unsigned bytes, bool store, const char* hint);
// Shared accesses that go through shared_load / shared_store of pack.cuh: bank conflicts.
void shared_access(const void* pointer, unsigned bytes, bool store);

void copy_async(void* shared_target, const void* source, unsigned bytes, Site site);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);

inline unsigned char* dynamic_shared() { return self().shared; }

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <typename T>
T shuffle(Shuffle kind, unsigned mask, T value, int operand, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) {
    fail(std::string(site.what) + ": width must be a power of two in 1..32");
  }
  const uint64_t* slots = gather(mask, to_bits(value), site);
  const int lane = static_cast<int>(lane_id());
  const int first = lane & ~(width - 1);
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = first + (operand & (width - 1));
      break;
    case Shuffle::kUp:
      source = lane - operand < first ? lane : lane - operand;
      break;
    case Shuffle::kDown:
      source = lane + operand >= first + width ? lane : lane + operand;
      break;
    case Shuffle::kXor:
      source = (lane ^ operand) >= first + width ? lane : lane ^ operand;
      break;
  }
  if (!((mask >> source) & 1u)) {
    fail(std::string(site.what) + " reads lane " + std::to_string(source) +
         ", which is not in its mask, at " + site.file + ":" + std::to_string(site.line));
  }
  return from_bits<T>(slots[source]);
}

inline unsigned ballot(unsigned mask, bool predicate, Site site) {
  const uint64_t* slots = gather(mask, predicate ? 1 : 0, site);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (((mask >> lane) & 1u) && slots[lane]) result |= 1u << lane;
  }
  return result;
}

template <typename V>
__forceinline__ V load(const V* pointer, const char* hint) {
  global_access(pointer, sizeof(V), false, hint);
  V value;
  std::memcpy(&value, pointer, sizeof(V));
  return value;
}
template <typename V>
__forceinline__ void store(V* pointer, const V& value, const char* hint) {
  global_access(pointer, sizeof(V), true, hint);
  std::memcpy(pointer, &value, sizeof(V));
}

}  // namespace simt

#define SIMT_SITE(what) (simt::Site{what, __FILE__, __LINE__})
#define SIMT_FIRST(first, ...) first
#define SIMT_WIDTH_(a, b, c, width, ...) width

#define threadIdx (simt::self().thread)
#define blockIdx (simt::self().block)
#define blockDim (simt::self().block_dim)
#define gridDim (simt::self().grid_dim)
constexpr int warpSize = 32;

#define __syncthreads() simt::sync_threads(SIMT_SITE("__syncthreads"))
#define __syncwarp(...)                                                      \
  ((void)simt::gather(SIMT_FIRST(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu), 0, \
                      SIMT_SITE("__syncwarp")))
#define SIMT_SHUFFLE(name, kind, mask, value, operand, ...)                  \
  simt::shuffle(simt::Shuffle::kind, mask, value, static_cast<int>(operand), \
                SIMT_FIRST(__VA_ARGS__ __VA_OPT__(, ) 32), SIMT_SITE(name))
#define __shfl_sync(...) SIMT_SHUFFLE("__shfl_sync", kIndex, __VA_ARGS__)
#define __shfl_up_sync(...) SIMT_SHUFFLE("__shfl_up_sync", kUp, __VA_ARGS__)
#define __shfl_down_sync(...) SIMT_SHUFFLE("__shfl_down_sync", kDown, __VA_ARGS__)
#define __shfl_xor_sync(...) SIMT_SHUFFLE("__shfl_xor_sync", kXor, __VA_ARGS__)
#define __ballot_sync(mask, predicate) \
  simt::ballot(mask, (predicate) != 0, SIMT_SITE("__ballot_sync"))
#define __any_sync(mask, predicate) \
  (simt::ballot(mask, (predicate) != 0, SIMT_SITE("__any_sync")) != 0)
#define __all_sync(mask, predicate) (simt::ballot(mask, !(predicate), SIMT_SITE("__all_sync")) == 0)

#define __pipeline_memcpy_async(target, source, bytes) \
  simt::copy_async(target, source, bytes, SIMT_SITE("__pipeline_memcpy_async"))
#define __pipeline_commit() simt::copy_async_commit()
#define __pipeline_wait_prior(groups) simt::copy_async_wait(groups)

#define SIMT_CACHE_OPERATOR(suffix)                  \
  template <typename V>                              \
  __forceinline__ V __ld##suffix(const V* pointer) { \
    return simt::load(pointer, #suffix);             \
  }
SIMT_CACHE_OPERATOR(g)
SIMT_CACHE_OPERATOR(ca)
SIMT_CACHE_OPERATOR(cg)
SIMT_CACHE_OPERATOR(cs)
SIMT_CACHE_OPERATOR(lu)
SIMT_CACHE_OPERATOR(cv)
#undef SIMT_CACHE_OPERATOR
#define SIMT_CACHE_OPERATOR(suffix)                                            \
  template <typename V>                                                        \
  __forceinline__ void __st##suffix(V* pointer, std::common_type_t<V> value) { \
    simt::store(pointer, value, #suffix);                                      \
  }
SIMT_CACHE_OPERATOR(wb)
SIMT_CACHE_OPERATOR(cg)
SIMT_CACHE_OPERATOR(cs)
SIMT_CACHE_OPERATOR(wt)
#undef SIMT_CACHE_OPERATOR

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(simt::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return simt::from_bits<float>(x); }
inline void __trap() { simt::fail("__trap()"); }
using std::max;
using std::min;
