// modulation_w4a16: x W^T + bias for one to eight rows of x and 4-bit weights, read once.
//
//   x       (B, K)           h      row-major
//   codes   (T, K/64, 32, 4) u32    T tiles of 16 outputs. A lane (4 g + q) has 16 bytes of each tile and group: outputs g
//                                   and g + 8, channels 16 q .. 16 q + 15. Word i, nibble 4 e + 2 s + r: output g + 8 r,
//                                   channel 16 q + 4 i + 2 s + e
//   scales  (T, K/64, 8, 4)  16 bit of g: scale and zero of output g, scale and zero of output g + 8; zero = -scale * point
//   bias    (O)              fp32   or null
//   out     (B, O)           h
// Work:   a block makes 16 outputs for eight rows of x, its warps share the groups of K and add up in fixed order. Codes are
//         operand A of an mma, x is B; A of ones makes the sum of x, for the zeros. Everything is fp32 from the products on:
//         sum over groups of scale * (codes x) + zero * (sum of x).
//         A code becomes h by one AND (OR). fp16: as it is, a subnormal, code * 2^-24. bf16: 128 + code; the zero takes
//         128 scale off again, which costs 2^-23 * 136 / 15 of the largest product, far below the rounding to bf16.
// Launch: grid (T, ceil(B / 8)), block 256.
// Bound:  memory: 0.5 bytes a weight and 4 bytes a group. All loads of a warp (6 groups) are on their way at once.
// Limits: 80 registers, 4 KiB shared memory.
// Truth:  engine/reference/modulation_w4a16.py
#include "common/mma.cuh"

constexpr int GROUP = 64, TILE_ROWS = 16, TILE_BATCH = 8, NUM_WARPS = 8, AT_ONCE = 6;
#if H_BF16
constexpr u32 CODE_BASE = 0x43004300u, ONES = 0x3f803f80u;
constexpr float CODE_SCALE = 1.0f, CODE_OFFSET = 128.0f;
#else
constexpr u32 CODE_BASE = 0, ONES = 0x3c003c00u;
constexpr float CODE_SCALE = 16777216.0f, CODE_OFFSET = 0.0f;
#endif

// Scales keep the type of the file, which need not be h.
__device__ __forceinline__ float2 scale_and_zero(u32 pair) {
#if SCALES_BF16
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
#endif
}

// w & mask | base, of which the compiler would make two instructions.
__device__ __forceinline__ u32 two_codes(u32 w) {
  u32 pair;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(pair) : "r"(w), "r"(0x000f000fu), "r"(CODE_BASE));
  return pair;
}

struct Words {  // one row of x, 16 channels
  uint4 half[2];
};

// c += (scale * codes + zero) of one group times x.
__device__ __forceinline__ void add_group(float (&c)[4], uint4 codes, uint2 scales, Words x) {
  const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
  const u32 b[8] = {x.half[0].x, x.half[0].y, x.half[0].z, x.half[0].w, x.half[1].x, x.half[1].y, x.half[1].z, x.half[1].w};
  const u32 ones[4] = {ONES, ONES, ONES, ONES};
  float products[4] = {}, sums[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 a[4] = {two_codes(words[i]), two_codes(words[i] >> 4), two_codes(words[i] >> 8), two_codes(words[i] >> 12)};
    mma_h_k16(products, a, b[2 * i], b[2 * i + 1]);
    mma_h_k16(sums, ones, b[2 * i], b[2 * i + 1]);
  }
  const float2 upper = scale_and_zero(scales.x), lower = scale_and_zero(scales.y);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 one = i < 2 ? upper : lower;
    c[i] = fmaf(one.x * CODE_SCALE, products[i], c[i]);
    c[i] = fmaf(fmaf(one.x, -CODE_OFFSET, one.y), sums[i], c[i]);
  }
}

extern "C" __global__ void __launch_bounds__(32 * NUM_WARPS, 3)
modulation_w4a16(const h_t* __restrict__ x, const uint4* __restrict__ codes, const uint2* __restrict__ scales,
                 const float* __restrict__ bias, h_t* __restrict__ out, int batch, int num_groups, int num_rows) {
  __shared__ float parts[NUM_WARPS][TILE_ROWS][TILE_BATCH];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, q = lane & 3;
  const int batch0 = blockIdx.y * TILE_BATCH;
  const size_t group0 = static_cast<size_t>(blockIdx.x) * num_groups + warp;
  codes += group0 * 32 + lane;
  scales += group0 * 8 + g;
  const bool has_x = batch0 + g < batch;
  const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<size_t>(has_x ? batch0 + g : 0) * num_groups * GROUP +
                                                     warp * GROUP + 16 * q);
  constexpr int STRIDE = NUM_WARPS;  // groups from one of a warp's to its next

  float c[4] = {};  // outputs g, g + 8; rows of x 2 q, 2 q + 1
#pragma unroll 1
  for (int left = num_groups - warp; left > 0; left -= AT_ONCE * STRIDE) {
    uint4 held[AT_ONCE];
    uint2 held_scales[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (i * STRIDE >= left) break;
      held[i] = __ldcs(codes + i * STRIDE * 32);
      held_scales[i] = __ldcs(scales + i * STRIDE * 8);
    }
    Words next{};
    if (has_x) next = *reinterpret_cast<const Words*>(from);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (i * STRIDE >= left) break;
      const Words now = next;
      if (has_x && (i + 1) * STRIDE < left) next = *reinterpret_cast<const Words*>(from + (i + 1) * STRIDE * (GROUP / 8));
      add_group(c, held[i], held_scales[i], now);
    }
    codes += AT_ONCE * STRIDE * 32;
    scales += AT_ONCE * STRIDE * 8;
    from += AT_ONCE * STRIDE * (GROUP / 8);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) parts[warp][g + 8 * (i / 2)][2 * q + (i & 1)] = c[i];
  __syncthreads();
  if (threadIdx.x >= TILE_ROWS * TILE_BATCH) return;
  const int row = threadIdx.x % TILE_ROWS, column = threadIdx.x / TILE_ROWS;
  const int output = blockIdx.x * TILE_ROWS + row;
  if (output >= num_rows || batch0 + column >= batch) return;
  float sum = bias == nullptr ? 0.0f : bias[output];
#pragma unroll
  for (int i = 0; i < NUM_WARPS; ++i) sum += parts[i][row][column];
  out[static_cast<size_t>(batch0 + column) * num_rows + output] = to_h(sum);
}
