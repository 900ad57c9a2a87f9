// The fused op on an NVIDIA GPU: residual add, steering by latched gates, RMSNorm, one block per row.
// What it computes is written down in kernels/; here every edit is ADD and no gate is a row's own.
//
// No torch in this file: nvcc compiles it alone, and a test runs the same source on the CPU.
//
// Which thread takes which numbers follows from H and the dtype of x alone, never from how many rows there are or how
// they are aligned: the same row gives the same bits in every launch. Products and sums are __fmul_rn and __fadd_rn,
// which no compiler fuses.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../contract.h"

namespace steerfast {
namespace cuda {

struct Arguments {
  const void* x;
  const void* residual;
  const void* weight;
  const void* vectors;
  const int32_t* rows;
  const float* values;
  const float* strength;
  const float* table;
  void* normed;
  void* new_residual;
  int64_t x_stride;
  int64_t residual_stride;
  int hidden_size;
  int stack;
  float eps;
  Norm norm;
  bool wide;  // 16-byte loads and stores; see can_be_wide
};

constexpr int max_threads = 1024;
constexpr int per_thread = 8;  // numbers of a row that a thread holds in registers
constexpr int held_size = max_threads * per_thread;

// A thread takes `packs` packs of 16 bytes of x, the first at its own index, the next a block further on.
template <class X>
constexpr int pack_size = 16 / sizeof(X);
template <class X>
constexpr int packs = per_thread / pack_size<X>;

// ptxas of CUDA 13.0 aims at two blocks of 1024 threads per multiprocessor on sm_100 and spills there for float32;
// told that one is enough it does not. For the other dtypes it finds fewer registers by itself (0: not told).
template <class X>
constexpr int min_blocks = sizeof(X) == 4 ? 1 : 0;

inline int threads(int hidden_size) {
  const int needed = (hidden_size + per_thread - 1) / per_thread;
  return needed >= max_threads ? max_threads : (needed + 31) / 32 * 32;
}

inline bool can_be_wide(const Arguments& a, int x_bytes) {
  const void* const pointers[] = {a.x, a.residual, a.weight, a.vectors, a.normed, a.new_residual};
  uintptr_t together = uintptr_t(a.x_stride * x_bytes) | uintptr_t(a.residual_stride * x_bytes) |
                       uintptr_t(a.hidden_size) * x_bytes;
  for (const void* pointer : pointers) together |= uintptr_t(pointer);
  return together % 16 == 0;
}

// ---- numbers in and out of memory, always float32 in registers ----

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

__device__ __forceinline__ void narrow(float& out, float value) { out = value; }
__device__ __forceinline__ void narrow(__nv_bfloat16& out, float value) { out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(__half& out, float value) { out = __float2half_rn(value); }

template <class X>
__device__ __forceinline__ float rounded(float value) {
  X narrowed;
  narrow(narrowed, value);
  return widen(narrowed);
}

template <int bytes>
struct Word;
template <>
struct Word<8> {
  typedef uint2 type;
};
template <>
struct Word<16> {
  typedef uint4 type;
};

// `size` numbers at p, or the `count` that the row still has; the others are 0.
template <int size, class T>
__device__ __forceinline__ void load(float (&out)[size], const T* p, int count, bool wide) {
  T in[size];
  if (wide) {
    constexpr int bytes = size * sizeof(T) < 16 ? 8 : 16, words = size * sizeof(T) / bytes;
    typename Word<bytes>::type raw[words];
#pragma unroll
    for (int i = 0; i < words; ++i) raw[i] = reinterpret_cast<const typename Word<bytes>::type*>(p)[i];
    memcpy(&in, &raw, sizeof in);
#pragma unroll
    for (int i = 0; i < size; ++i) out[i] = widen(in[i]);
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i) out[i] = i < count ? widen(p[i]) : 0.0f;
  }
}

template <int size, class X>
__device__ __forceinline__ void store(X* p, const float (&value)[size], int count, bool wide) {
  X out[size];
#pragma unroll
  for (int i = 0; i < size; ++i) narrow(out[i], value[i]);
  if (wide) {
    uint4 raw;
    memcpy(&raw, &out, sizeof raw);
    *reinterpret_cast<uint4*>(p) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (i < count) p[i] = out[i];
  }
}

// ---- what the slots of a row do to it ----

struct Moves {
  float beta[max_stack];  // 0: nothing
  int64_t slot[max_stack];
};

__device__ __forceinline__ Moves moves_of(const Arguments& a, int64_t row) {
  const int32_t* record = a.rows + row * (1 + a.stack);
  Moves moves;
#pragma unroll
  for (int k = 0; k < max_stack; ++k) moves.slot[k] = k < a.stack ? record[1 + k] : -1;
#pragma unroll
  for (int k = 0; k < max_stack; ++k) {
    moves.beta[k] = 0.0f;
    if (moves.slot[k] < 0) continue;
    const float* numbers = a.table + moves.slot[k] * table_width;
    const int64_t own = int64_t(record[0]) * a.stack + k;
    const float gate = numbers[gate_column] == float(Gate::always) ? 1.0f : a.values[own];
    const float alpha = __fmul_rn(numbers[strength_column], a.strength[own]);
    if (gate != 0.0f) moves.beta[k] = __fmul_rn(gate, alpha);  // a shut gate wins over a strength that is not finite
  }
  return moves;
}

template <int size, class B>
__device__ __forceinline__ void displace(float (&y)[size], const Arguments& a, const Moves& moves, int column,
                                         int count, bool wide) {
#pragma unroll
  for (int k = 0; k < max_stack; ++k) {
    if (moves.beta[k] == 0.0f) continue;
    float v[size];
    load(v, static_cast<const B*>(a.vectors) + moves.slot[k] * a.hidden_size + column, count, wide);
#pragma unroll
    for (int i = 0; i < size; ++i) y[i] = __fadd_rn(y[i], __fmul_rn(moves.beta[k], v[i]));
  }
}

// ---- the norm ----

// The sum of a number per thread, in every thread.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float of_warp[32];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value = __fadd_rn(value, __shfl_xor_sync(0xffffffff, value, other));
  if (lane == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < int(blockDim.x) / 32 ? of_warp[lane] : 0.0f;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value = __fadd_rn(value, __shfl_xor_sync(0xffffffff, value, other));
  return value;
}

__device__ __forceinline__ float reciprocal_root(float squares, int hidden_size, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, float(hidden_size)), eps)));
}

// What the norm reads: y as it is, or as it was stored. Its squares are added to `squares`.
template <class X, int size>
__device__ __forceinline__ void square(float& squares, float (&y)[size], Norm norm, int count) {
#pragma unroll
  for (int i = 0; i < size; ++i) {
    if (!norms_unrounded(norm)) y[i] = rounded<X>(y[i]);
    if (i < count) squares = __fadd_rn(squares, __fmul_rn(y[i], y[i]));
  }
}

template <class X, int size>
__device__ __forceinline__ void scale(float (&n)[size], const float (&w)[size], float rstd, Norm norm) {
#pragma unroll
  for (int i = 0; i < size; ++i) {
    float y = __fmul_rn(n[i], rstd);
    if (norm == Norm::llama || norm == Norm::vllm_ir) y = rounded<X>(y);
    n[i] = __fmul_rn(y, norm == Norm::gemma ? __fadd_rn(1.0f, w[i]) : w[i]);
  }
}

// ---- kernels ----

// Rows of up to held_size numbers with everything aligned: read once, kept in registers.
template <class X, class B, class W>
__global__ void __launch_bounds__(max_threads, min_blocks<X>) held_row(const Arguments a) {
  constexpr int size = pack_size<X>, count = packs<X>;
  const int64_t row = blockIdx.x;
  float y[count][size], w[count][size];
#pragma unroll
  for (int j = 0; j < count; ++j) {
    const int column = (threadIdx.x + j * blockDim.x) * size;
    const int rest = a.hidden_size - column;
#pragma unroll
    for (int i = 0; i < size; ++i) y[j][i] = w[j][i] = 0.0f;
    if (rest <= 0) continue;
    float other[size];
    load(y[j], static_cast<const X*>(a.x) + row * a.x_stride + column, rest, true);
    load(other, static_cast<const X*>(a.residual) + row * a.residual_stride + column, rest, true);
    load(w[j], static_cast<const W*>(a.weight) + column, rest, true);
#pragma unroll
    for (int i = 0; i < size; ++i) y[j][i] = __fadd_rn(y[j][i], other[i]);
  }
  const Moves moves = moves_of(a, row);
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < count; ++j) {
    const int column = (threadIdx.x + j * blockDim.x) * size;
    const int rest = a.hidden_size - column;
    if (rest <= 0) continue;
    displace<size, B>(y[j], a, moves, column, rest, true);
    store(static_cast<X*>(a.new_residual) + row * a.hidden_size + column, y[j], rest, true);
    square<X>(squares, y[j], a.norm, rest);
  }
  const float rstd = reciprocal_root(block_sum(squares), a.hidden_size, a.eps);
#pragma unroll
  for (int j = 0; j < count; ++j) {
    const int column = (threadIdx.x + j * blockDim.x) * size;
    const int rest = a.hidden_size - column;
    if (rest <= 0) continue;
    scale<X>(y[j], w[j], rstd, a.norm);
    store(static_cast<X*>(a.normed) + row * a.hidden_size + column, y[j], rest, true);
  }
}

// The numbers of one pack before and after, for a row that is not held.
template <int size, class X, class B>
__device__ __forceinline__ void edited(float (&y)[size], const Arguments& a, const Moves& moves, int64_t row,
                                       int column, int rest) {
  float other[size];
  load(y, static_cast<const X*>(a.x) + row * a.x_stride + column, rest, a.wide);
  load(other, static_cast<const X*>(a.residual) + row * a.residual_stride + column, rest, a.wide);
#pragma unroll
  for (int i = 0; i < size; ++i) y[i] = __fadd_rn(y[i], other[i]);
  displace<size, B>(y, a, moves, column, rest, a.wide);
}

// All other rows: what the sum of squares was taken of is worked out a second time.
template <class X, class B, class W>
__global__ void __launch_bounds__(max_threads, min_blocks<X>) any_row(const Arguments a) {
  constexpr int size = pack_size<X>;
  const int64_t row = blockIdx.x;
  const Moves moves = moves_of(a, row);
  const int step = blockDim.x * size;
  float squares = 0.0f, y[size], w[size];
  for (int column = threadIdx.x * size; column < a.hidden_size; column += step) {
    const int rest = a.hidden_size - column;
    edited<size, X, B>(y, a, moves, row, column, rest);
    store(static_cast<X*>(a.new_residual) + row * a.hidden_size + column, y, rest, a.wide);
    square<X>(squares, y, a.norm, rest);
  }
  const float rstd = reciprocal_root(block_sum(squares), a.hidden_size, a.eps);
  for (int column = threadIdx.x * size; column < a.hidden_size; column += step) {
    const int rest = a.hidden_size - column;
    float unused = 0.0f;
    edited<size, X, B>(y, a, moves, row, column, rest);
    square<X>(unused, y, a.norm, 0);
    load(w, static_cast<const W*>(a.weight) + column, rest, a.wide);
    scale<X>(y, w, rstd, a.norm);
    store(static_cast<X*>(a.normed) + row * a.hidden_size + column, y, rest, a.wide);
  }
}

// ---- launches: Launch is called with a kernel, its blocks, its threads and its argument ----

template <class X, class B, class W, class Launch>
void launch_as(Arguments& a, int rows, const Launch& launch) {
  a.wide = can_be_wide(a, sizeof(X));
  const bool held = a.wide && a.hidden_size <= held_size;
  launch(held ? held_row<X, B, W> : any_row<X, B, W>, rows, threads(a.hidden_size), a);
}

template <class X, class B, class Launch>
void launch_as(Arguments& a, DType weight, int rows, const Launch& launch) {
  if (weight == DType::f32) launch_as<X, B, float>(a, rows, launch);
  if (weight == DType::bf16) launch_as<X, B, __nv_bfloat16>(a, rows, launch);
  if (weight == DType::f16) launch_as<X, B, __half>(a, rows, launch);
}

template <class X, class Launch>
void launch_as(Arguments& a, DType bank, DType weight, int rows, const Launch& launch) {
  if (bank == DType::f32) launch_as<X, float>(a, weight, rows, launch);
  if (bank == DType::bf16) launch_as<X, __nv_bfloat16>(a, weight, rows, launch);
  if (bank == DType::f16) launch_as<X, __half>(a, weight, rows, launch);
}

template <class Launch>
void launch(Arguments& a, DType x, DType bank, DType weight, int rows, const Launch& launch) {
  if (x == DType::f32) launch_as<float>(a, bank, weight, rows, launch);
  if (x == DType::bf16) launch_as<__nv_bfloat16>(a, bank, weight, rows, launch);
  if (x == DType::f16) launch_as<__half>(a, bank, weight, rows, launch);
}

}  // namespace cuda
}  // namespace steerfast
