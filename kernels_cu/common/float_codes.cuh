// e4m3 and e2m1 from fp32: nearest, ties to even, saturating. In software before sm_89 (e4m3) and sm_100 (e2m1).
#pragma once

#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include "common/codes.cuh"

// Two codes, the first in the low byte.
__device__ __forceinline__ u32 e4m3_pair(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float e4m3_value(u8 code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

// Halves below 2, whole numbers below 4, then even ones: adding a number whose last place is as large rounds to them.
__device__ __forceinline__ u32 e2m1_code(float v) {
  const float a = fminf(fabsf(v), E2M1_MAX);
  const float coarse = a < 2.0f ? 4194304.0f : a < 4.0f ? 8388608.0f : 16777216.0f;
  const u32 below = a < 2.0f ? 0 : a < 4.0f ? 2 : 4;
  return (__float_as_uint(a + coarse) - __float_as_uint(coarse) + below) | (__float_as_uint(v) >> 31 << 3);
}

// Two codes, the first in the low nibble.
__device__ __forceinline__ u32 e2m1_pair(float low, float high) {
#if __CUDA_ARCH__ >= 1000
  return __nv_cvt_float2_to_fp4x2(make_float2(low, high), __NV_E2M1, cudaRoundNearest);
#else
  return e2m1_code(low) | e2m1_code(high) << 4;
#endif
}
