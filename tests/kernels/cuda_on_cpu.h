// As much of CUDA C++ as csrc/cuda/steer.cuh uses, for a C++20 compiler: a block's threads are threads of the CPU, its
// blocks run one after the other. A 16-byte access that is not aligned faults here as it does on a GPU.
#pragma once

#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// ---- arithmetic: compiled without fusing, so plain operators round every step ----

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half value) { return float(value.value); }
inline __half __float2half_rn(float value) { return {_Float16(value)}; }

// ---- threads ----

namespace cuda_on_cpu {

struct Warp {
  std::barrier<> barrier{32};
  float values[32];
};

struct Block {
  explicit Block(int threads) : barrier(threads), warps(threads / 32) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline Block* block = nullptr;

template <class Kernel, class Argument>
void launch(Kernel kernel, int blocks, int threads, const Argument& argument) {
  Block together(threads);
  block = &together;
  std::vector<std::thread> workers;
  for (int thread = 0; thread < threads; ++thread)
    workers.emplace_back([&, thread] {
      threadIdx.x = thread;
      blockDim.x = threads;
      for (int index = 0; index < blocks; ++index) {
        blockIdx.x = index;
        kernel(argument);
        together.barrier.arrive_and_wait();  // the next block has the same shared memory
      }
    });
  for (std::thread& worker : workers) worker.join();
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block->barrier.arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int other) {
  cuda_on_cpu::Warp& warp = *cuda_on_cpu::block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  warp.values[lane] = value;
  warp.barrier.arrive_and_wait();
  const float received = warp.values[lane ^ other];
  warp.barrier.arrive_and_wait();
  return received;
}
