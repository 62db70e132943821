// Numbers in few bits, by the operations of engine/reference/quantize_act.py: a code is the same, fused or not.
#pragma once

#include "common/half.cuh"

// Formats of activations (contract of quantize_act, svdq_linear and the GELU epilogue).
#define FORMAT_INT4 0
#define FORMAT_UINT4 1
#define FORMAT_E4M3 2
#define FORMAT_NVFP4 3
#define FORMAT_HALF 4

constexpr float INT4_MAX = 7.0f, UINT4_MAX = 15.0f, E2M1_MAX = 6.0f, E4M3_MAX = 448.0f;
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
constexpr float LOW_ONE = 268435456.0f;  // 2^28: low-rank activations in fixed point

// x / c correctly rounded, where inverse = 1.0f / c is (Markstein): three operations where a division takes ten.
__device__ __forceinline__ float divide(float x, float c, float inverse) {
  const float quotient = x * inverse;
  return fmaf(fmaf(-quotient, c, x), inverse, quotient);
}

// A group too small to divide by has codes 0.
__device__ __forceinline__ float reciprocal_of_scale(float scale) {
  return scale < SMALLEST_NORMAL ? 0.0f : __frcp_rn(scale);
}

__device__ __forceinline__ int int4_code(float v, float inverse_scale) {
  return min(max(__float2int_rn(v * inverse_scale), -8), 7);
}

__device__ __forceinline__ int uint4_code(float v, float inverse_scale) {
  return min(max(__float2int_rn(v * inverse_scale), 0), 15);
}
