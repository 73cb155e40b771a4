// Small kernels, right and wrong, that test the emulator itself.
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"

namespace {

using namespace fastnorm;

// out[i] = in[n-1-i] within a block, through shared memory.
__global__ void reverse_kernel(const float* in, float* out, bool with_barrier) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const unsigned t = threadIdx.x, first = blockIdx.x * blockDim.x;
  shared_store(shared + t, load(in + first + t));
  if (with_barrier) __syncthreads();
  store(out + first + t, shared_load(shared + blockDim.x - 1 - t));
}

__global__ void shared_overrun_kernel(float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  store(out + threadIdx.x, shared[threadIdx.x]);
}

__global__ void past_end_kernel(float* out, int n) { store(out + threadIdx.x, 1.0f * n); }

// Plain stores that the emulator can't see: for the AddressSanitizer build.
__global__ void raw_past_end_kernel(float* out) { out[threadIdx.x] = 1.0f; }

__global__ void misaligned_kernel(const float* in, float* out) { store(out, load<4>(in + 1).v[0]); }

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  store(out + threadIdx.x, 1.0f);
}

__global__ void early_return_kernel(float* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  store(out + threadIdx.x, 1.0f);
}

__global__ void lost_lane_kernel(float* out) {
  float v = 1.0f;
  if (threadIdx.x % 32 != 7) {
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  } else {
    __syncwarp(0x80u);
    __syncthreads();
  }
  store(out + threadIdx.x, v);
}

// Each lane's prefix sum, minimum of the vote results, by groups of `width` lanes.
__global__ void shuffles_kernel(const int* in, int* out, int width) {
  const int t = static_cast<int>(threadIdx.x);
  int v = load(in + t);
  const int original = v;
  for (int d = 1; d < width; d *= 2) {
    const int below = __shfl_up_sync(kFullWarp, v, d, width);
    if (t % width >= d) v += below;
  }
  const int last = __shfl_sync(kFullWarp, v, width - 1, width);
  const int next = __shfl_down_sync(kFullWarp, original, 1, width);
  const unsigned odd = __ballot_sync(kFullWarp, original & 1);
  const bool any = __any_sync(kFullWarp, original < 0), all = __all_sync(kFullWarp, original < 50);
  __syncwarp();
  int result = v + 1000 * last + 100000 * next;
  if (threadIdx.x % 32 < 16) {  // half-warp masks may interleave freely
    result += __shfl_xor_sync(0x0000ffffu, result, 8) - result;
  } else {
    result += __shfl_xor_sync(0xffff0000u, result, 8) - result;
  }
  store(out + 2 * t, result);
  store(out + 2 * t + 1, static_cast<int>(odd) ^ (any ? 1 << 30 : 0) ^ (all ? 1 << 29 : 0));
}

__global__ void block_sum_kernel(const float* in, float* out) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  float v[2] = {load(in + t), 1.0f};
  block_sum(v, scratch);
  store(out + t, v[0] / v[1]);
}

__global__ void cluster_sum_kernel(const float* in, float* out, bool arrive) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  if (arrive) cluster_arrive();
  const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  float v[1] = {load(in + t)};
  if (arrive) cluster_wait();
  cluster_sum(v, scratch);
  store(out + t, v[0]);
}

// All blocks add up what all blocks have written.
__global__ void grid_sum_kernel(const float* in, float* partial, float* out) {
  if (threadIdx.x == 0) store(partial + blockIdx.x, load(in + blockIdx.x));
  cooperative_groups::this_grid().sync();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += load_coherent<1>(partial + b).v[0];
  store(out + blockIdx.x * blockDim.x + threadIdx.x, sum);
}

// Stores and loads the same elements, in either order.
__global__ void update_kernel(float* out, bool store_first, bool read_only) {
  float* own = out + threadIdx.x;
  if (store_first) store(own, 1.0f);
  const float v = read_only ? load(own) : load_coherent<1>(own).v[0];
  store(own, v + 1.0f);
}

__global__ void async_kernel(const float* in, float* out, bool wait) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  copy_async<4>(shared + 4 * threadIdx.x, in + 4 * threadIdx.x);
  copy_async_commit();
  if (wait) copy_async_wait<0>();
  __syncthreads();
  store(out + threadIdx.x, shared_load(shared + (4 * threadIdx.x + 5) % (4 * blockDim.x)));
  if (!wait) copy_async_wait<0>();
}

// Reads and writes with a stride, in elements, to test the counters.
__global__ void strided_kernel(const float* in, float* out, int stride) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const float v = load(in + threadIdx.x * stride);
  shared_store(shared + threadIdx.x * stride, v);
  __syncwarp();
  store_streaming(out + 4 * threadIdx.x, Pack<float, 4>{{v, v, v, v}});
}

__global__ void convert_kernel(const float* in, __half* half, __nv_bfloat16* bfloat, float* back) {
  const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  const float v = load(in + t);
  store(half + t, narrow<__half>(v));
  store(bfloat + t, narrow<__nv_bfloat16>(v));
  store(back + 2 * t, widen(load_coherent<1>(half + t).v[0]));
  store(back + 2 * t + 1, widen(load_coherent<1>(bfloat + t).v[0]));
}

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default"))) int

ENTRY reverse(const float* in, float* out, unsigned blocks, unsigned threads, int with_barrier) {
  return simt::launch("reverse", {blocks, threads, threads * sizeof(float)}, reverse_kernel, in,
                      out, with_barrier != 0);
}
ENTRY shared_overrun(float* out, unsigned threads) {
  return simt::launch("shared_overrun", {1, threads, threads * sizeof(float)},
                      shared_overrun_kernel, out);
}
ENTRY past_end(float* out, unsigned threads) {
  return simt::launch("past_end", {1, threads}, past_end_kernel, out, 1);
}
ENTRY raw_past_end(float* out, unsigned threads) {
  return simt::launch("raw_past_end", {1, threads}, raw_past_end_kernel, out);
}
ENTRY misaligned(const float* in, float* out) {
  return simt::launch("misaligned", {1, 1}, misaligned_kernel, in, out);
}
ENTRY divergent_barrier(float* out) {
  return simt::launch("divergent_barrier", {1, 64}, divergent_barrier_kernel, out);
}
ENTRY early_return(float* out) {
  return simt::launch("early_return", {1, 64}, early_return_kernel, out);
}
ENTRY lost_lane(float* out) { return simt::launch("lost_lane", {1, 64}, lost_lane_kernel, out); }
ENTRY shuffles(const int* in, int* out, int width) {
  return simt::launch("shuffles", {1, 64}, shuffles_kernel, in, out, width);
}
ENTRY block_sums(const float* in, float* out, unsigned blocks, unsigned threads) {
  return simt::launch("block_sum", {blocks, threads, 2 * kMaxWarps * sizeof(float)},
                      block_sum_kernel, in, out);
}
ENTRY cluster_sums(const float* in, float* out, unsigned blocks, unsigned threads, unsigned cluster,
                   int arrive) {
  simt::Launch config{blocks, threads, (kMaxWarps + kMaxCluster) * sizeof(float), cluster};
  return simt::launch("cluster_sum", config, cluster_sum_kernel, in, out, arrive != 0);
}
ENTRY grid_sum(const float* in, float* partial, float* out, unsigned blocks, int cooperative) {
  simt::Launch config{blocks, 32};
  config.cooperative = cooperative != 0;
  return simt::launch("grid_sum", config, grid_sum_kernel, in, partial, out);
}
ENTRY update(float* out, int store_first, int read_only) {
  return simt::launch("update", {1, 32}, update_kernel, out, store_first != 0, read_only != 0);
}
ENTRY async_copy(const float* in, float* out, unsigned threads, int wait) {
  return simt::launch("async_copy", {1, threads, 4 * threads * sizeof(float)}, async_kernel, in,
                      out, wait != 0);
}
ENTRY strided(const float* in, float* out, int stride) {
  return simt::launch("strided", {1, 32, 32 * static_cast<size_t>(stride) * sizeof(float)},
                      strided_kernel, in, out, stride);
}
ENTRY convert(const float* in, void* half, void* bfloat, float* back, unsigned blocks) {
  return simt::launch("convert", {blocks, 32}, convert_kernel, in, static_cast<__half*>(half),
                      static_cast<__nv_bfloat16*>(bfloat), back);
}
ENTRY limits(unsigned threads, unsigned long shared, unsigned cluster, unsigned blocks) {
  return simt::launch("limits", {blocks, threads, shared, cluster}, past_end_kernel,
                      static_cast<float*>(nullptr), 0);
}
