// What svdq_linear does with a warp's 16 x 128 sums: bias, low-rank product, one of five ends. All in registers.
//
// Every plan's main loop ends in finish_rows(acc, row0, col0, e); all lanes of the warp call it. Lane = 4 * g + q:
//   acc[j][0..1]  row row0 + g, columns col0 + 8 j + 2 q + {0, 1};  acc[j][2..3]  row row0 + g + 8;  j = 0..15
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

// ---- stores: a quad exchanges words so that every lane writes 16 bytes ------------------------------------------

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

// acc as h, and a lane gets eight neighbouring columns: w[t][half] are col0 + 32 t + 8 q .. + 7 of row g + 8 half.
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

__device__ __forceinline__ void store_rows(const u32 (&w)[4][2][4], int row0, int col0, h_t* out, size_t stride,
                                           int m, int n) {
  const int row = row0 + lane_id() / 4, column = col0 + 8 * (lane_id() & 3);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int t = 0; t < 4; ++t)
      if (row + 8 * half < m && column + 32 * t < n)
        *reinterpret_cast<uint4*>(out + (row + 8 * half) * stride + column + 32 * t) =
            make_uint4(w[t][half][0], w[t][half][1], w[t][half][2], w[t][half][3]);
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// ---- the ends ---------------------------------------------------------------------------------------------------

#if EPILOGUE == GELU || EPILOGUE == GELU_QUANTIZE
// y / (1 + exp(-2 u)) = y / 2 (1 + tanh u), u = sqrt(2 / pi) (y + 0.044715 y^3)
__device__ __forceinline__ float gelu(float y) {
  const float u = y * fmaf(0.0356774081f, y * y, 0.7978845608f);
  return __fdividef(y, 1.0f + __expf(-2.0f * u));
}
#endif

#if EPILOGUE == QK_NORM_ROPE
// Columns q | k | v, a head a tile: x / rms(x) * weight, then neighbouring pairs turn by the row's angles.
__device__ __forceinline__ void norm_and_turn(float (&acc)[16][4], int row0, const float* weight,
                                              const Epilogue& e) {
  const int g = lane_id() / 4, q = lane_id() & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 16; ++j)
      squares = fmaf(acc[j][2 * half], acc[j][2 * half], fmaf(acc[j][2 * half + 1], acc[j][2 * half + 1], squares));
    const float scale = rsqrtf(quad_sum(squares) * (1.0f / HEAD) + RMS_EPS);
    const size_t angles = size_t(min(row0 + g + 8 * half, e.m - 1)) * (HEAD / 2) + q;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 w = *reinterpret_cast<const float2*>(weight + 8 * j + 2 * q);
      const float cos = e.cos[angles + 4 * j], sin = e.sin[angles + 4 * j];
      const float even = acc[j][2 * half] * scale * w.x, odd = acc[j][2 * half + 1] * scale * w.y;
      acc[j][2 * half] = even * cos - odd * sin;
      acc[j][2 * half + 1] = even * sin + odd * cos;
    }
  }
}
#endif

#if EPILOGUE == GATE_RESIDUAL
__device__ __forceinline__ float2 gate_pair(const Epilogue& e, int column) {
  if (e.gate_is_float) return *reinterpret_cast<const float2*>(static_cast<const float*>(e.gate) + column);
  return unpack_h2(*reinterpret_cast<const u32*>(static_cast<const h_t*>(e.gate) + column));
}

// acc = residual + gate * acc. Everything is read before anything is written: out may be the residual.
__device__ __forceinline__ void gate_onto_residual(float (&acc)[16][4], int row0, int col0, const Epilogue& e) {
  const int g = lane_id() / 4, q = lane_id() & 3;
  u32 residual[16][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const size_t row = min(row0 + g + 8 * half, e.m - 1);
    const h_t* from = e.residual + row * e.residual_stride + col0 + 2 * q;
#pragma unroll
    for (int j = 0; j < 16; ++j)
      residual[j][half] = col0 + 8 * j < e.n ? *reinterpret_cast<const u32*>(from + 8 * j) : 0;
  }
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float2 gate = col0 + 8 * j < e.n ? gate_pair(e, col0 + 8 * j + 2 * q) : make_float2(0.0f, 0.0f);
    const float2 above = unpack_h2(residual[j][0]), below = unpack_h2(residual[j][1]);
    acc[j][0] = stay_in_range(fmaf(gate.x, acc[j][0], above.x));
    acc[j][1] = stay_in_range(fmaf(gate.y, acc[j][1], above.y));
    acc[j][2] = stay_in_range(fmaf(gate.x, acc[j][2], below.x));
    acc[j][3] = stay_in_range(fmaf(gate.y, acc[j][3], below.y));
  }
}
#endif

#if EPILOGUE == GELU_QUANTIZE
// next_low += x @ proj_down over this tile's 128 channels. Both operands of the mma take channels in the order in
// which a lane has them. Sums of 128 in fp32, then integers: the total does not depend on the tiles' order.
__device__ __forceinline__ void project_down(const u32 (&x)[4][2][4], int row0, int col0, const Epilogue& e) {
  const int g = lane_id() / 4, q = lane_id() & 3;
#pragma unroll 1
  for (int s = 0; s < e.next_rank / 16; ++s) {
    if (e.next_rank_scales[s] == 0.0f) continue;
    const uint4* down = e.next_down + (size_t(s) * (e.n / 32) + col0 / 32) * 64 + lane_id();
    float sums[2][4] = {};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (col0 + 32 * t >= e.n) break;
      const u32 first[4] = {x[t][0][0], x[t][1][0], x[t][0][1], x[t][1][1]};
      const u32 second[4] = {x[t][0][2], x[t][1][2], x[t][0][3], x[t][1][3]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // 16 channels: A fragments, of whose words two are B of 8 ranks
        const uint4 a = __ldg(down + (2 * t + i) * 32);
        mma_h_k16(sums[0], i ? second : first, a.x, a.z);
        mma_h_k16(sums[1], i ? second : first, a.y, a.w);
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + g + 8 * half;
        unsigned long long* to = e.next_low + size_t(row) * e.next_rank + 16 * s + 8 * tile + q;
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // ranks q and q + 4, not 2 q and 2 q + 1: a quad adds to 32 bytes at once
          const float even = __shfl_sync(0xffffffffu, sums[tile][2 * half], 4 * g + q / 2 + 2 * i);
          const float odd = __shfl_sync(0xffffffffu, sums[tile][2 * half + 1], 4 * g + q / 2 + 2 * i);
          const long long fixed = __float2ll_rn((q & 1 ? odd : even) * LOW_ONE);
          if (row < e.m) atomicAdd(to + 4 * i, static_cast<unsigned long long>(fixed));
        }
      }
  }
}

// (x + shift) / smooth of eight neighbouring columns.
__device__ __forceinline__ void smooth_columns(float (&v)[8], const u32 (&x)[4], int column, const Epilogue& e) {
#if OUT_FORMAT == FORMAT_UINT4
  const float shift = e.shift;
#else
  const float shift = 0.0f;
#endif
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 c = *reinterpret_cast<const float4*>(e.smooth + column + i);
    const float4 inverse = *reinterpret_cast<const float4*>(e.inverse + column + i);
    const float2 low = unpack_h2(x[i / 2]), high = unpack_h2(x[i / 2 + 1]);
    v[i] = divide(low.x + shift, c.x, inverse.x);
    v[i + 1] = divide(low.y + shift, c.y, inverse.y);
    v[i + 2] = divide(high.x + shift, c.z, inverse.z);
    v[i + 3] = divide(high.y + shift, c.w, inverse.w);
  }
}

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

// One row of the tile, x[t] columns col0 + 32 t + 8 q .. + 7: codes and scales as quantize_act lays them out.
__device__ __forceinline__ void quantize_row(const u32 (&x)[4][2][4], int half, int row, int col0,
                                             const Epilogue& e) {
  const int q = lane_id() & 3, safe_row = min(row, e.m - 1);
#if OUT_FORMAT == FORMAT_E4M3
  const float scale = __fadd_rn(__fmul_rn(e.slope, e.row_scales ? e.row_scales[safe_row] : 1.0f), e.offset);
  const float inverse = reciprocal_of_scale(scale);
  if (col0 == 0 && q == 0 && row < e.m) static_cast<float*>(e.scales)[row] = scale;
#endif
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {  // 64 columns, of which a lane has twice eight
    const int base = col0 + 64 * pair, column = base + 8 * q;
    if (base >= e.n) break;
    float v[2][8];
    smooth_columns(v[0], x[2 * pair][half], column, e);
    smooth_columns(v[1], x[2 * pair + 1][half], column + 32, e);
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
#elif OUT_FORMAT == FORMAT_E4M3
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (row < e.m)
        *reinterpret_cast<uint2*>(e.codes + size_t(row) * e.n + column + 32 * i) = make_uint2(
            e4m3_pair(v[i][0] * inverse, v[i][1] * inverse) | e4m3_pair(v[i][2] * inverse, v[i][3] * inverse) << 16,
            e4m3_pair(v[i][4] * inverse, v[i][5] * inverse) | e4m3_pair(v[i][6] * inverse, v[i][7] * inverse)
                                                                  << 16);
#else
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (row < e.m)
        *reinterpret_cast<uint4*>(reinterpret_cast<h_t*>(e.codes) + size_t(row) * e.n + column + 32 * i) =
            make_uint4(pack_h2(v[i][0], v[i][1]), pack_h2(v[i][2], v[i][3]), pack_h2(v[i][4], v[i][5]),
                       pack_h2(v[i][6], v[i][7]));
#endif
  }
}
#endif  // GELU_QUANTIZE

__device__ __forceinline__ void finish_rows(float (&acc)[16][4], int row0, int col0, const Epilogue& e) {
  add_bias(acc, col0, e);
  add_low_rank(acc, row0, col0, e);
#if EPILOGUE == GELU || EPILOGUE == GELU_QUANTIZE
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] = gelu(acc[j][i]);
#elif EPILOGUE == QK_NORM_ROPE
  const int third = e.n / 3;
  if (col0 < 2 * third) norm_and_turn(acc, row0, col0 < third ? e.norm_q : e.norm_k, e);
#elif EPILOGUE == GATE_RESIDUAL
  gate_onto_residual(acc, row0, col0, e);
#endif
  u32 w[4][2][4];
  gather_columns(w, acc);
#if EPILOGUE == GELU_QUANTIZE
  project_down(w, row0, col0, e);
#pragma unroll
  for (int half = 0; half < 2; ++half) quantize_row(w, half, row0 + lane_id() / 4 + 8 * half, col0, e);
#else
  store_rows(w, row0, col0, e.out, e.out_stride, e.m, e.n);
#endif
}
