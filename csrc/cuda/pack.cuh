// Memory access of the CUDA kernels: packs of up to 16 bytes, with the cache hint in the name.
//
// Every access to global memory goes through these functions, so that the emulator of tests/simt
// can check its bounds and alignment and count its bytes.
//
//   load                 read-only for the whole launch, and read again (weights, statistics)
//   load_streaming       read-only, read once (activations): first to leave the cache
//   load_coherent        may have been written by this launch: past L1, from L2
//   store                read again soon (partial sums, statistics, results)
//   store_streaming      written once, not read again on this device soon
//   shared_load/_store   dynamic shared memory, own or a cluster sibling's
//   copy_async           global to shared without registers; visible after copy_async_wait
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "common/norm.h"

#define FASTNORM_DEVICE __device__ __forceinline__

namespace fastnorm {

template <int bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = unsigned char;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// n neighbours in memory, moved by one instruction.
template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  static_assert(sizeof(T) * n <= 16 && (n & (n - 1)) == 0, "at most 16 bytes, a power of two");
  using Word = typename WordOf<static_cast<int>(sizeof(T)) * n>::type;
  T v[n];

  FASTNORM_DEVICE Word word() const {
    Word w;
    memcpy(&w, v, sizeof(w));
    return w;
  }
  static FASTNORM_DEVICE Pack of(Word w) {
    Pack p;
    memcpy(p.v, &w, sizeof(w));
    return p;
  }
};

// Whether packs of 16 bytes that start at these pointers are aligned.
inline bool aligned_to_16(std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* pointer : pointers) all |= reinterpret_cast<uintptr_t>(pointer);
  return all % 16 == 0;
}

// Elements of T in 16 bytes.
template <typename T>
inline constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

#define FASTNORM_LOAD(name, intrinsic)                                     \
  template <int n, typename T>                                             \
  FASTNORM_DEVICE Pack<T, n> name(const T* p) {                            \
    using P = Pack<T, n>;                                                  \
    return P::of(intrinsic(reinterpret_cast<const typename P::Word*>(p))); \
  }
#define FASTNORM_STORE(name, intrinsic)                                       \
  template <int n, typename T>                                                \
  FASTNORM_DEVICE void name(T* p, const Pack<T, n>& value) {                  \
    intrinsic(reinterpret_cast<typename Pack<T, n>::Word*>(p), value.word()); \
  }
FASTNORM_LOAD(load, __ldg)
FASTNORM_LOAD(load_streaming, __ldcs)
FASTNORM_LOAD(load_coherent, __ldcg)
FASTNORM_STORE(store, __stwb)
FASTNORM_STORE(store_streaming, __stcs)
#undef FASTNORM_LOAD
#undef FASTNORM_STORE

// One element.
template <typename T>
FASTNORM_DEVICE T load(const T* p) {
  return load<1>(p).v[0];
}
template <typename T>
FASTNORM_DEVICE void store(T* p, T value) {
  store(p, Pack<T, 1>{{value}});
}

// The type sums and parameters have inside a kernel: float, and double for double.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

FASTNORM_DEVICE float widen(float x) { return x; }
FASTNORM_DEVICE double widen(double x) { return x; }
FASTNORM_DEVICE float widen(__half x) { return __half2float(x); }
FASTNORM_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
FASTNORM_DEVICE T narrow(Accumulate<T> x);
template <>
FASTNORM_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
FASTNORM_DEVICE double narrow<double>(double x) {
  return x;
}
template <>
FASTNORM_DEVICE __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
FASTNORM_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T, int n>
FASTNORM_DEVICE void widen(const Pack<T, n>& pack, Accumulate<T> (&out)[n]) {
#pragma unroll
  for (int e = 0; e < n; ++e) out[e] = widen(pack.v[e]);
}
template <typename T, int n>
FASTNORM_DEVICE Pack<T, n> narrow(const Accumulate<T> (&in)[n]) {
  Pack<T, n> pack;
#pragma unroll
  for (int e = 0; e < n; ++e) pack.v[e] = narrow<T>(in[e]);
  return pack;
}

// Values of the accumulate type that may need more than one pack: n a power of two, p aligned to
// the smaller of 16 bytes and n values.
template <int n, typename A>
FASTNORM_DEVICE void load_values(const A* p, A (&out)[n]) {
  constexpr int m = n < kPackSize<A> ? n : kPackSize<A>;
#pragma unroll
  for (int first = 0; first < n; first += m) {
    const Pack<A, m> pack = load<m>(p + first);
#pragma unroll
    for (int e = 0; e < m; ++e) out[first + e] = pack.v[e];
  }
}
template <int n, typename A>
FASTNORM_DEVICE void store_values(A* p, const A (&in)[n]) {
  constexpr int m = n < kPackSize<A> ? n : kPackSize<A>;
#pragma unroll
  for (int first = 0; first < n; first += m) {
    Pack<A, m> pack;
#pragma unroll
    for (int e = 0; e < m; ++e) pack.v[e] = in[first + e];
    store(p + first, pack);
  }
}

// Weight or bias: in the input's type or, beside 16-bit inputs, in float. Null: absent.
struct Parameter {
  const void* data = nullptr;
  bool wide = false;  // stored in the accumulate type
};

// n parameters from `first` on, a multiple of n; one branch, uniform over the launch. The caller
// asks for packs only where the launcher found the pointer aligned.
template <typename T, int n>
FASTNORM_DEVICE void load_parameter(const Parameter& parameter, int64_t first,
                                    Accumulate<T> (&out)[n]) {
  using A = Accumulate<T>;
  if (parameter.wide) {
    load_values<n>(static_cast<const A*>(parameter.data) + first, out);
  } else {
    widen(load<n>(static_cast<const T*>(parameter.data) + first), out);
  }
}

// Dynamic shared memory of this block, exactly the bytes of the launch, 16-byte aligned. The only
// shared memory of the kernels: the emulator gives every CTA of a cluster its own.
FASTNORM_DEVICE unsigned char* dynamic_shared() {
#ifdef FASTNORM_SIMT
  return simt::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char fastnorm_dynamic_shared[];
  return fastnorm_dynamic_shared;
#endif
}

template <int n, typename T>
FASTNORM_DEVICE Pack<T, n> shared_load(const T* p) {
#ifdef FASTNORM_SIMT
  simt::shared_access(p, sizeof(T) * n, false);
#endif
  return *reinterpret_cast<const Pack<T, n>*>(p);
}
template <int n, typename T>
FASTNORM_DEVICE void shared_store(T* p, const Pack<T, n>& value) {
#ifdef FASTNORM_SIMT
  simt::shared_access(p, sizeof(T) * n, true);
#endif
  *reinterpret_cast<Pack<T, n>*>(p) = value;
}
template <typename T>
FASTNORM_DEVICE T shared_load(const T* p) {
  return shared_load<1>(p).v[0];
}
template <typename T>
FASTNORM_DEVICE void shared_store(T* p, T value) {
  shared_store(p, Pack<T, 1>{{value}});
}

// As store_values.
template <int n, typename A>
FASTNORM_DEVICE void shared_store_values(A* p, const A (&in)[n]) {
  constexpr int m = n < kPackSize<A> ? n : kPackSize<A>;
#pragma unroll
  for (int first = 0; first < n; first += m) {
    Pack<A, m> pack;
#pragma unroll
    for (int e = 0; e < m; ++e) pack.v[e] = in[first + e];
    shared_store(p + first, pack);
  }
}

// 4, 8 or 16 bytes; both addresses aligned to them.
template <int n, typename T>
FASTNORM_DEVICE void copy_async(T* shared_target, const T* source) {
  __pipeline_memcpy_async(shared_target, source, sizeof(T) * n);
}
// The same of any size; below 4 bytes through a register.
template <int n, typename T>
FASTNORM_DEVICE void fetch_async(T* shared_target, const T* source) {
  if constexpr (sizeof(T) * n >= 4) {
    copy_async<n>(shared_target, source);
  } else {
    shared_store(shared_target, load_streaming<n>(source));
  }
}
// Closes the group of the copies issued since the last commit.
FASTNORM_DEVICE void copy_async_commit() { __pipeline_commit(); }
// Until at most `groups_left` of this thread's groups are under way. Other threads see the data
// after a barrier that follows. The intrinsic itself doesn't keep the compiler from loads that are
// too early.
template <int groups_left>
FASTNORM_DEVICE void copy_async_wait() {
  __pipeline_wait_prior(groups_left);
#ifndef FASTNORM_SIMT
  asm volatile("" ::: "memory");
#endif
}

}  // namespace fastnorm
