// The network's 16-bit type h: bf16 where H_BF16 is 1, else fp16; conversions round to nearest, ties to even.
#pragma once

#include <cuda_fp16.h>
#if H_BF16
#include <cuda_bf16.h>
#endif

typedef unsigned int u32;
typedef unsigned char u8;

#if H_BF16
typedef __nv_bfloat16 h_t;
__device__ __forceinline__ float to_float(h_t x) { return __bfloat162float(x); }
__device__ __forceinline__ h_t to_h(float x) { return __float2bfloat16_rn(x); }
#else
typedef __half h_t;
__device__ __forceinline__ float to_float(h_t x) { return __half2float(x); }
__device__ __forceinline__ h_t to_h(float x) { return __float2half_rn(x); }
#endif

__device__ __forceinline__ float round_to_h(float x) { return to_float(to_h(x)); }

// Two numbers in a word, the first in the low half: a neighbouring pair of columns as it stands in memory.
__device__ __forceinline__ u32 pack_h2(float low, float high) {
#if H_BF16
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
#else
  const __half2 pair = __floats2half2_rn(low, high);
#endif
  return *reinterpret_cast<const u32*>(&pair);
}

__device__ __forceinline__ float2 unpack_h2(u32 pair) {
#if H_BF16
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
#endif
}

// FLUX's residual stream leaves fp16's range now and then.
__device__ __forceinline__ float stay_in_range(float x) {
#if H_BF16
  return x;
#else
  return fminf(fmaxf(x, -65504.0f), 65504.0f);
#endif
}
