// What svdq_linear does with a warp's 16 x 128 sums: bias, low-rank product, one of five ends. All in registers.
//
// A plan's main loop ends in finish_rows(acc, row0, col0, e); all lanes of the warp call it. (svdq_linear.w4a8_sm90 has
// the numbers in another order, adds bias and low-rank product itself, and calls the parts.) Lane = 4 * g + q:
//   acc[j][0..1]  row row0 + g, columns col0 + 8 j + 2 q + {0, 1};  acc[j][2..3]  row row0 + g + 8;  j = 0..15
// Then a quad exchanges numbers, so that every lane reads and writes 16 bytes at a time:
//   v[t][half]    row row0 + g + 8 half, columns col0 + 32 t + 8 q .. + 7; w the same as h, in pairs
// acc holds activation scale x weight scale x code sums, wtscale and wcscales included; row0 is a multiple of 16,
// col0 of 128. Rows from m on and columns from n on (a multiple of 8; 64 for GELU_QUANTIZE) are computed and not
// stored.
//
// A kernel takes EPILOGUE_PARAMETERS last and says `const Epilogue e = {EPILOGUE_ARGUMENTS};`. Chosen by defines:
//   EPILOGUE    below          LOW_FIXED  1: `low` is int64 in units of 2^-28, 0: fp32
//   OUT_FORMAT  FORMAT_*, of GELU_QUANTIZE
// Truth: engine/reference/svdq_linear.py
#pragma once

#include "common/codes.cuh"
#include "common/mma.cuh"

#define PLAIN 0
#define QK_NORM_ROPE 1
#define GATE_RESIDUAL 2
#define GELU_QUANTIZE 3
#define GELU 4

#if EPILOGUE == GELU_QUANTIZE && (OUT_FORMAT == FORMAT_E4M3 || OUT_FORMAT == FORMAT_NVFP4)
#include "common/float_codes.cuh"
#endif

constexpr float RMS_EPS = 1e-6f;
constexpr int HEAD = 128;  // channels of an attention head: one tile of columns

struct Epilogue {
  const float* bias;         // (N) fp32, or null
  const void* low;           // (M, rank) low-rank activations, rows low_stride apart
  const uint4* proj_up;      // (N/128, rank/16, 8, 32) x 16 bytes: pack_proj_up in engine/kernels/_arrange.py
  const float* rank_scales;  // (rank/16)
  int low_stride, rank, m, n;
#if EPILOGUE == GELU_QUANTIZE
  u8* codes;                      // (M, N) in OUT_FORMAT
  void* scales;                   // of OUT_FORMAT; e4m3: (M) fp32 written by the first columns
  const float *smooth, *inverse;  // (N) smooth_factor of the next linear, and 1 / smooth_factor
  const uint4* next_down;         // (next_rank/16, N/32, 2, 32) x 16 bytes: factors of its ArrangedTarget
  const float* next_rank_scales;  // (next_rank/16)
  unsigned long long* next_low;   // (M, next_rank) in units of 2^-28, zeroed: the sums are added
  const float* row_scales;        // (M) e4m3 only: a row's output scale is slope * row_scales[m] + offset
  int next_rank;
  float shift, slope, offset;
#else
  h_t* out;  // (M, N), rows out_stride apart, 16-byte aligned
  int out_stride;
#if EPILOGUE == QK_NORM_ROPE
  const float *norm_q, *norm_k;  // (128)
  const float *cos, *sin;        // (M, 64)
#elif EPILOGUE == GATE_RESIDUAL
  const h_t* residual;  // (M, N), rows residual_stride apart; may be out
  const void* gate;     // (N) fp32 or h
  int residual_stride, gate_is_float;
#endif
#endif
};

#define LINEAR_PARAMETERS \
  const float *bias, const void *low, const uint4 *proj_up, const float *rank_scales, int low_stride, int rank, \
      int m, int n
#define LINEAR_ARGUMENTS bias, low, proj_up, rank_scales, low_stride, rank, m, n
#if EPILOGUE == GELU_QUANTIZE
#define EPILOGUE_PARAMETERS \
  LINEAR_PARAMETERS, u8 *codes, void *scales, const float *smooth, const float *inverse, const uint4 *next_down, \
      const float *next_rank_scales, unsigned long long *next_low, const float *row_scales, int next_rank, \
      float shift, float slope, float offset
#define EPILOGUE_ARGUMENTS \
  LINEAR_ARGUMENTS, codes, scales, smooth, inverse, next_down, next_rank_scales, next_low, row_scales, next_rank, \
      shift, slope, offset
#elif EPILOGUE == QK_NORM_ROPE
#define EPILOGUE_PARAMETERS \
  LINEAR_PARAMETERS, h_t *out, int out_stride, const float *norm_q, const float *norm_k, const float *cos, \
      const float *sin
#define EPILOGUE_ARGUMENTS LINEAR_ARGUMENTS, out, out_stride, norm_q, norm_k, cos, sin
#elif EPILOGUE == GATE_RESIDUAL
#define EPILOGUE_PARAMETERS \
  LINEAR_PARAMETERS, h_t *out, int out_stride, const h_t *residual, const void *gate, int residual_stride, \
      int gate_is_float
#define EPILOGUE_ARGUMENTS LINEAR_ARGUMENTS, out, out_stride, residual, gate, residual_stride, gate_is_float
#else
#define EPILOGUE_PARAMETERS LINEAR_PARAMETERS, h_t *out, int out_stride
#define EPILOGUE_ARGUMENTS LINEAR_ARGUMENTS, out, out_stride
#endif

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

// ---- what every end needs ---------------------------------------------------------------------------------------

__device__ __forceinline__ void add_bias(float (&acc)[16][4], int col0, const Epilogue& e) {
  if (e.bias == nullptr) return;
  const float* bias = e.bias + col0 + 2 * (lane_id() & 3);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float2 b = col0 + 8 * j < e.n ? *reinterpret_cast<const float2*>(bias + 8 * j) : make_float2(0.0f, 0.0f);
    acc[j][0] += b.x, acc[j][1] += b.y, acc[j][2] += b.x, acc[j][3] += b.y;
  }
}

// Low-rank activations of two neighbouring ranks, times their scale, as h.
__device__ __forceinline__ u32 scaled_low(const Epilogue& e, size_t row, int rank, float scale) {
  const size_t at = row * e.low_stride + rank;
#if LOW_FIXED
  const longlong2 fixed = *reinterpret_cast<const longlong2*>(static_cast<const long long*>(e.low) + at);
  const float2 low = make_float2(__ll2float_rn(fixed.x) / LOW_ONE, __ll2float_rn(fixed.y) / LOW_ONE);
#else
  const float2 low = *reinterpret_cast<const float2*>(static_cast<const float*>(e.low) + at);
#endif
  return pack_h2(low.x * scale, low.y * scale);
}

// acc += h(low * scale) @ proj_up^T, 16 ranks at a time; ranks whose scale is 0 are left out, so that a LoRA at
// strength 0 changes no bit.
__device__ __forceinline__ void add_low_rank(float (&acc)[16][4], int row0, int col0, const Epilogue& e) {
  const int slices = e.rank / 16, g = lane_id() / 4, q = lane_id() & 3;
  const size_t row = min(row0 + g, e.m - 1), row8 = min(row0 + g + 8, e.m - 1);
  const uint4* up = e.proj_up + size_t(col0 / 128) * slices * 256 + lane_id();
#pragma unroll 1
  for (int s = 0; s < slices; ++s, up += 256) {
    const float scale = e.rank_scales[s];
    if (scale == 0.0f) continue;
    const int rank = 16 * s + 2 * q;
    const u32 a[4] = {
        scaled_low(e, row, rank, scale),
        scaled_low(e, row8, rank, scale),
        scaled_low(e, row, rank + 8, scale),
        scaled_low(e, row8, rank + 8, scale),
    };
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint4 b = __ldg(up + 32 * j);
      mma_h_k16(acc[2 * j], a, b.x, b.y);
      mma_h_k16(acc[2 * j + 1], a, b.z, b.w);
    }
  }
}

// ---- a quad exchanges words: eight neighbouring columns for each lane -------------------------------------------

// Afterwards w[i] is what lane i of the quad held in w[q].
__device__ __forceinline__ void transpose_in_quad(u32 (&w)[4]) {
  const bool odd = lane_id() & 1, upper = lane_id() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? got : w[i];
    w[i + 1] = odd ? w[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
    w[i] = upper ? got : w[i];
    w[i + 2] = upper ? w[i + 2] : got;
  }
}

__device__ __forceinline__ void gather_columns(u32 (&w)[4][2][4], const float (&acc)[16][4]) {
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[t][half][i] = pack_h2(acc[4 * t + i][2 * half], acc[4 * t + i][2 * half + 1]);
      transpose_in_quad(w[t][half]);
    }
}

__device__ __forceinline__ void gather_sums(float (&v)[4][2][8], const float (&acc)[16][4]) {
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(acc[4 * t + i][2 * half + odd]);
        transpose_in_quad(words);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[t][half][2 * i + odd] = __uint_as_float(words[i]);
      }
}

__device__ __forceinline__ void pack_columns(u32 (&w)[4][2][4], const float (&v)[4][2][8]) {
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) w[t][half][i] = pack_h2(v[t][half][2 * i], v[t][half][2 * i + 1]);
}

__device__ __forceinline__ void load_eight(float (&v)[8], const float* from) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
  }
}

__device__ __forceinline__ void unpack_eight(float (&v)[8], const uint4& words) {
  const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack_h2(w[i]);
    v[2 * i] = two.x, v[2 * i + 1] = two.y;
  }
}

#if EPILOGUE != GELU_QUANTIZE
__device__ __forceinline__ void store_rows(const u32 (&w)[4][2][4], int row0, int col0, const Epilogue& e) {
  const int row = row0 + lane_id() / 4, column = col0 + 8 * (lane_id() & 3);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int t = 0; t < 4; ++t)
      if (row + 8 * half < e.m && column + 32 * t < e.n)
        *reinterpret_cast<uint4*>(e.out + size_t(row + 8 * half) * e.out_stride + column + 32 * t) =
            make_uint4(w[t][half][0], w[t][half][1], w[t][half][2], w[t][half][3]);
}
#endif

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// ---- the ends ---------------------------------------------------------------------------------------------------

// What an end asks memory for long before it needs it.
struct Ahead {
#if EPILOGUE == GATE_RESIDUAL
  uint4 residual[4][2];  // a lane reads what it will write: out may be the residual
#elif EPILOGUE == GELU_QUANTIZE
  float scale[2];  // e4m3: of rows g and g + 8
#endif

  __device__ __forceinline__ Ahead(int row0, int col0, const Epilogue& e) {
#if EPILOGUE == GATE_RESIDUAL || EPILOGUE == GELU_QUANTIZE
    const int column = col0 + 8 * (lane_id() & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(row0 + lane_id() / 4 + 8 * half, e.m - 1);
#if EPILOGUE == GATE_RESIDUAL
      const h_t* from = e.residual + size_t(row) * e.residual_stride + column;
#pragma unroll
      for (int t = 0; t < 4; ++t)
        residual[t][half] =
            column + 32 * t < e.n ? *reinterpret_cast<const uint4*>(from + 32 * t) : make_uint4(0, 0, 0, 0);
#else
      scale[half] = __fadd_rn(__fmul_rn(e.slope, e.row_scales ? e.row_scales[row] : 1.0f), e.offset);
#endif
    }
#endif
  }
};

#if EPILOGUE == GELU || EPILOGUE == GELU_QUANTIZE
__device__ __forceinline__ float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// y / (1 + exp(-2 u)) = y / 2 (1 + tanh u), u = sqrt(2 / pi) (y + 0.044715 y^3), of four: they share one reciprocal,
// which no product overflows.
__device__ __forceinline__ void gelu(float (&y)[4]) {
  float below[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float u = y[i] * fmaf(-0.1029432396f, y[i] * y[i], -2.3022081981f);  // -2 u / ln 2
    below[i] = 1.0f + exp2_approximately(fminf(u, 30.0f));
  }
  const float first = below[0] * below[1], second = below[2] * below[3];
  const float inverse = __fdividef(1.0f, first * second);
  const float first_inverse = inverse * second, second_inverse = inverse * first;
  y[0] *= first_inverse * below[1], y[1] *= first_inverse * below[0];
  y[2] *= second_inverse * below[3], y[3] *= second_inverse * below[2];
}

__device__ __forceinline__ void gelu(float (&acc)[16][4]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) gelu(acc[j]);
}
#endif

#if EPILOGUE == QK_NORM_ROPE
// Columns q | k | v, a head a tile: x / rms(x) * weight, then neighbouring pairs turn by the row's angles.
__device__ __forceinline__ void end_sums(float (&v)[4][2][8], const Ahead&, int row0, int col0, const Epilogue& e) {
  const int third = e.n / 3;
  if (col0 >= 2 * third) return;
  const float* weight = (col0 < third ? e.norm_q : e.norm_k) + 8 * (lane_id() & 3);
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float squares = 0.0f;
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int i = 0; i < 8; ++i) squares = fmaf(v[t][half][i], v[t][half][i], squares);
    scale[half] = rsqrtf(quad_sum(squares) * (1.0f / HEAD) + RMS_EPS);
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    float w[8];
    load_eight(w, weight + 32 * t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(row0 + lane_id() / 4 + 8 * half, e.m - 1);
      const size_t angles = size_t(row) * (HEAD / 2) + 16 * t + 4 * (lane_id() & 3);
      const float4 cos = *reinterpret_cast<const float4*>(e.cos + angles);
      const float4 sin = *reinterpret_cast<const float4*>(e.sin + angles);
      const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
      float(&x)[8] = v[t][half];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float even = x[2 * i] * scale[half] * w[2 * i], odd = x[2 * i + 1] * scale[half] * w[2 * i + 1];
        x[2 * i] = even * c[i] - odd * s[i];
        x[2 * i + 1] = even * s[i] + odd * c[i];
      }
    }
  }
}
#endif

#if EPILOGUE == GATE_RESIDUAL
__device__ __forceinline__ void load_gate(float (&gate)[8], int column, const Epilogue& e) {
  if (e.gate_is_float)
    load_eight(gate, static_cast<const float*>(e.gate) + column);
  else
    unpack_eight(gate, *reinterpret_cast<const uint4*>(static_cast<const h_t*>(e.gate) + column));
}

// v = residual + gate * v
__device__ __forceinline__ void end_sums(float (&v)[4][2][8], const Ahead& ahead, int, int col0, const Epilogue& e) {
  const int column = col0 + 8 * (lane_id() & 3);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    float gate[8];
    load_gate(gate, min(column + 32 * t, e.n - 8), e);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float to[8];
      unpack_eight(to, ahead.residual[t][half]);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[t][half][i] = stay_in_range(fmaf(gate[i], v[t][half][i], to[i]));
    }
  }
}
#endif

#if EPILOGUE == GELU_QUANTIZE
// sums = x @ proj_down over this tile's 128 channels and 16 ranks, C fragments of the two eights of them; down: factors
// of the tile. Both operands of the mma take channels in the order in which a lane has them.
__device__ __forceinline__ void project_slice(float (&sums)[2][4], const u32 (&x)[4][2][4], const uint4* down,
                                              int col0, int n) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    if (col0 + 32 * t >= n) break;
    const u32 first[4] = {x[t][0][0], x[t][1][0], x[t][0][1], x[t][1][1]};
    const u32 second[4] = {x[t][0][2], x[t][1][2], x[t][0][3], x[t][1][3]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // 16 channels: A fragments, of whose words two are B of 8 ranks
      const uint4 a = down[(2 * t + i) * 32 + lane_id()];
      mma_h_k16(sums[0], i ? second : first, a.x, a.z);
      mma_h_k16(sums[1], i ? second : first, a.y, a.w);
    }
  }
}

// In fixed point: what is added is an integer, and the total does not depend on the order of tiles.
__device__ __forceinline__ void fix_low(long long (&fixed)[4], const float (&sums)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) fixed[i] = __float2ll_rn(sums[i] * LOW_ONE);
}

// Fixed-point sums of 8 ranks, a C fragment, onto next_low.
__device__ __forceinline__ void add_low(const long long (&sums)[4], int row0, int rank, const Epilogue& e) {
  const int g = lane_id() / 4, q = lane_id() & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + g + 8 * half;
    unsigned long long* to = e.next_low + size_t(row) * e.next_rank + rank + q;
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // ranks q and q + 4, not 2 q and 2 q + 1: a quad adds to 32 bytes at once
      const long long even = __shfl_sync(0xffffffffu, sums[2 * half], 4 * g + q / 2 + 2 * i);
      const long long odd = __shfl_sync(0xffffffffu, sums[2 * half + 1], 4 * g + q / 2 + 2 * i);
      if (row < e.m) atomicAdd(to + 4 * i, static_cast<unsigned long long>(q & 1 ? odd : even));
    }
  }
}

// next_low += x @ proj_down over this tile's channels
__device__ __forceinline__ void project_down(const u32 (&x)[4][2][4], int row0, int col0, const Epilogue& e) {
#pragma unroll 1
  for (int s = 0; s < e.next_rank / 16; ++s) {
    if (e.next_rank_scales[s] == 0.0f) continue;
    float sums[2][4] = {};
    project_slice(sums, x, e.next_down + (size_t(s) * (e.n / 32) + col0 / 32) * 64, col0, e.n);
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      long long fixed[4];
      fix_low(fixed, sums[eight]);
      add_low(fixed, row0, 16 * s + 8 * eight, e);
    }
  }
}

// smooth_factor of eight neighbouring columns, and 1 / smooth_factor.
struct Smoothing {
  float factor[8], inverse[8];

  __device__ __forceinline__ Smoothing(const float* factors, const float* inverses) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(factor + i) = *reinterpret_cast<const float4*>(factors + i);
      *reinterpret_cast<float4*>(inverse + i) = *reinterpret_cast<const float4*>(inverses + i);
    }
  }

  // v = (x + shift) / smooth_factor
  __device__ __forceinline__ void divide_columns(float (&v)[8], const u32 (&x)[4], float shift) const {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float2 two = unpack_h2(x[i / 2]);
      v[i] = divide(two.x + shift, factor[i], inverse[i]);
      v[i + 1] = divide(two.y + shift, factor[i + 1], inverse[i + 1]);
    }
  }
};

__device__ __forceinline__ float largest_of(const float (&v)[8]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[i]));
  return largest;
}

// Eight codes of neighbouring columns, the first in the lowest bits.
__device__ __forceinline__ u32 codes_of(const float (&v)[8], float inverse_scale) {
  u32 codes = 0;
#if OUT_FORMAT == FORMAT_INT4 || OUT_FORMAT == FORMAT_UINT4
#pragma unroll
  for (int i = 0; i < 8; ++i)
#if OUT_FORMAT == FORMAT_UINT4
    codes |= u32(uint4_code(v[i], inverse_scale)) << (4 * i);
#else
    codes |= u32(int4_code(v[i], inverse_scale) & 15) << (4 * i);
#endif
#elif OUT_FORMAT == FORMAT_NVFP4
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= e2m1_pair(v[2 * i] * inverse_scale, v[2 * i + 1] * inverse_scale) << (8 * i);
#endif
  return codes;
}

// The tile's rows, x[t] columns col0 + 32 t + 8 q .. + 7: codes and scales as quantize_act lays them out.
// smooth, inverse: from the tile's first column on.
__device__ __forceinline__ void quantize_rows(const u32 (&x)[4][2][4], const Ahead& ahead, int row0, int col0,
                                              const float* smooth, const float* inverse, const Epilogue& e) {
  const int q = lane_id() & 3;
  const float shift = OUT_FORMAT == FORMAT_UINT4 ? e.shift : 0.0f;
#if OUT_FORMAT == FORMAT_E4M3
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane_id() / 4 + 8 * half;
    if (col0 == 0 && q == 0 && row < e.m) static_cast<float*>(e.scales)[row] = ahead.scale[half];
  }
#endif
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {  // 64 columns, of which a lane has twice eight
    const int base = col0 + 64 * pair, column = base + 8 * q;
    if (base >= e.n) break;
    const float *factors = smooth + 64 * pair + 8 * q, *inverses = inverse + 64 * pair + 8 * q;
    const Smoothing smoothing[2] = {Smoothing(factors, inverses), Smoothing(factors + 32, inverses + 32)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane_id() / 4 + 8 * half;
      float v[2][8];
#pragma unroll
      for (int i = 0; i < 2; ++i) smoothing[i].divide_columns(v[i], x[2 * pair + i][half], shift);
#if OUT_FORMAT == FORMAT_INT4 || OUT_FORMAT == FORMAT_UINT4
      const float top = OUT_FORMAT == FORMAT_UINT4 ? UINT4_MAX : INT4_MAX;
      const float scale = quad_max(fmaxf(largest_of(v[0]), largest_of(v[1]))) * (1.0f / top);
      const float inverse = reciprocal_of_scale(scale);
      if (row < e.m) {
        if (q == 0) static_cast<float*>(e.scales)[size_t(base / 64) * e.m + row] = scale;
        u8* to = e.codes + size_t(row) * (e.n / 2) + column / 2;
        *reinterpret_cast<u32*>(to) = codes_of(v[0], inverse);
        *reinterpret_cast<u32*>(to + 16) = codes_of(v[1], inverse);
      }
#elif OUT_FORMAT == FORMAT_NVFP4
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float largest = largest_of(v[i]);  // a group is 16 columns: two lanes
        const float both = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        const u8 code = u8(e4m3_pair(fminf(both * (1.0f / E2M1_MAX), E4M3_MAX), 0.0f));
        const float inverse = reciprocal_of_scale(e4m3_value(code));
        if (row < e.m) {
          if (q % 2 == 0) static_cast<u8*>(e.scales)[size_t(row) * (e.n / 16) + (column + 32 * i) / 16] = code;
          *reinterpret_cast<u32*>(e.codes + size_t(row) * (e.n / 2) + (column + 32 * i) / 2) =
              codes_of(v[i], inverse);
        }
      }
#else
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (row < e.m) {
#if OUT_FORMAT == FORMAT_E4M3
          const float by = reciprocal_of_scale(ahead.scale[half]);
          *reinterpret_cast<uint2*>(e.codes + size_t(row) * e.n + column + 32 * i) =
              make_uint2(e4m3_pair(v[i][0] * by, v[i][1] * by) | e4m3_pair(v[i][2] * by, v[i][3] * by) << 16,
                         e4m3_pair(v[i][4] * by, v[i][5] * by) | e4m3_pair(v[i][6] * by, v[i][7] * by) << 16);
#else
          *reinterpret_cast<uint4*>(reinterpret_cast<h_t*>(e.codes) + size_t(row) * e.n + column + 32 * i) =
              make_uint4(pack_h2(v[i][0], v[i][1]), pack_h2(v[i][2], v[i][3]), pack_h2(v[i][4], v[i][5]),
                         pack_h2(v[i][6], v[i][7]));
#endif
        }
#endif
    }
  }
}
#endif  // GELU_QUANTIZE

__device__ __forceinline__ void finish_rows(float (&acc)[16][4], int row0, int col0, const Epilogue& e) {
  const Ahead ahead(row0, col0, e);
  add_bias(acc, col0, e);
  add_low_rank(acc, row0, col0, e);
  u32 w[4][2][4];
#if EPILOGUE == QK_NORM_ROPE || EPILOGUE == GATE_RESIDUAL
  float v[4][2][8];
  gather_sums(v, acc);
  end_sums(v, ahead, row0, col0, e);
  pack_columns(w, v);
#else
#if EPILOGUE != PLAIN
  gelu(acc);
#endif
  gather_columns(w, acc);
#endif
#if EPILOGUE == GELU_QUANTIZE
  project_down(w, row0, col0, e);
  quantize_rows(w, ahead, row0, col0, e.smooth + col0, e.inverse + col0, e);
#else
  store_rows(w, row0, col0, e);
#endif
}
