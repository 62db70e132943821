// The main loop of the w4a16 operations: 4-bit weights become h in registers, on their way into a 16-bit mma.
//
//   act      (M, K) h, row-major
//   weights  (N/128) x records of RECORD_STEPS steps of k32 (engine/kernels/_arrange.py), N filled up with zeros:
//              codes   2048 bytes a step: (4, 32, 4) words, tiles 4 i .. 4 i + 3 of a lane. Code 2 s + r of a
//                      word's lower half is channel 16 s + 8 r + 2 q of the tile's column g, the upper half has the
//                      channels behind them: shifted and masked, a word is a register of a B fragment
//              scales  WEIGHTS_INT4   (2, 8, 8) h: eight tiles of column g; codes are c + 8, B is h(c * scale)
//                      WEIGHTS_NVFP4  a step (2, 8, 8, 2) bytes: eight tiles, k16; 5 bits exponent, 3 mantissa
//                      WEIGHTS_ZEROS  as INT4, then zeros alike; codes are 0..15, B is h(c * scale + zero)
// Work: 128 x 128 a block, 4 warps of 32 x 128; each B register serves two row tiles.
#pragma once

#include "common/pipeline.cuh"

#define WEIGHTS_INT4 0
#define WEIGHTS_NVFP4 1
#define WEIGHTS_ZEROS 2

#if H_BF16
typedef __nv_bfloat162 h2_t;
__device__ __forceinline__ h2_t both(float x) { return __float2bfloat162_rn(x); }
#else
typedef __half2 h2_t;
__device__ __forceinline__ h2_t both(float x) { return __float2half2_rn(x); }
#endif
__device__ __forceinline__ h2_t as_h2(u32 bits) { return *reinterpret_cast<const h2_t*>(&bits); }
__device__ __forceinline__ u32 as_bits(h2_t pair) { return *reinterpret_cast<const u32*>(&pair); }

constexpr int STEP_CODES = 2048, STEP_ACT = BLOCK_ROWS * 64;
constexpr int STEP_SCALES = WEIGHTS == WEIGHTS_ZEROS ? 512 : 256;

// (word & mask) | bits in one operation; left to itself the compiler takes two.
__device__ __forceinline__ u32 masked_or(u32 word, u32 mask, u32 bits) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// Register i = 2 s + r of a B fragment as integers or e2m1 numbers, still without their scale.
__device__ __forceinline__ h2_t unscaled(u32 word, int i) {
#if WEIGHTS == WEIGHTS_NVFP4
  // Sign to the top, exponent and mantissa to the low end of h's exponent: value * 2^-126 (bf16), 2^-14 (fp16).
  // Where the four codes of a half lie is NVFP4_PLACES in engine/kernels/_arrange.py.
  constexpr u32 SIGN = 0x80008000u, MAGNITUDE = H_BF16 ? 0x01c001c0u : 0x0e000e00u;
  if (i == 0) return as_h2(word & (SIGN | MAGNITUDE));
  if (i == 1) return as_h2(word << (H_BF16 ? 3 : 8) & (SIGN | MAGNITUDE));
  if (i == 2) return as_h2(masked_or(word << (H_BF16 ? 1 : 7), SIGN, word >> 3 & MAGNITUDE));
  return as_h2(masked_or(word << (H_BF16 ? 2 : 15), SIGN, word << (H_BF16 ? 6 : 5) & MAGNITUDE));
#else
  constexpr float ZERO = WEIGHTS == WEIGHTS_INT4 ? 8.0f : 0.0f;
#if H_BF16
  const u32 bits = masked_or(word >> (4 * i), 0x000f000fu, 0x43004300u);  // 128 + code
  return __hfma2(as_h2(bits), both(1.0f), both(-128.0f - ZERO));
#else
  const u32 shifted = i < 2 ? word : word >> 8;
  if (i % 2 == 0)  // 1024 + code
    return __hsub2(as_h2(masked_or(shifted, 0x000f000fu, 0x64006400u)), both(1024.0f + ZERO));
  const u32 bits = masked_or(shifted, 0x00f000f0u, 0x64006400u);  // 1024 + 16 code
  return __hfma2(as_h2(bits), both(1.0f / 16.0f), both(-64.0f - ZERO));
#endif
#endif
}

// Steps of k32, 64 bytes of a row of act. RECORD_STEPS of them share a record.
template <int RECORD_STEPS>
struct HalfTile {
  static constexpr int STAGE_BYTES = STEP_ACT + STEP_CODES + STEP_SCALES;
  static constexpr int RECORD_CODES = RECORD_STEPS * STEP_CODES;
  static constexpr int RECORD_BYTES = RECORD_CODES + (WEIGHTS == WEIGHTS_NVFP4 ? RECORD_STEPS : 1) * STEP_SCALES;

  float (&acc)[ROW_TILES][16][4];
  const u8 *act, *record;
  int rows[3], step = 0, m;  // rows: from this thread's row to the ones 32, 64, 96 below, in bytes

  __device__ __forceinline__ HalfTile(float (&acc)[ROW_TILES][16][4], const h_t* x, const u8* weights, int k, int m)
      : acc(acc), m(m) {
    const int thread = threadIdx.x, first = blockIdx.x * BLOCK_ROWS + thread / 4;
    record = weights + size_t(blockIdx.y) * (k / (32 * RECORD_STEPS)) * RECORD_BYTES + thread * 16;
    // Rows beyond M repeat the last one; they are not stored.
    act = reinterpret_cast<const u8*>(x + size_t(min(first, m - 1)) * k) + thread % 4 * 16;
#pragma unroll
    for (int i = 0; i < 3; ++i) rows[i] = (min(first + 32 * (i + 1), m - 1) - min(first, m - 1)) * k * 2;
  }

  // Rows of 64 bytes; the quarters change places every 2 rows, so that 8 rows of ldmatrix meet all 32 banks.
  static __device__ __forceinline__ int act_place(int row, int quarter) {
    return row * 64 + (quarter ^ (row >> 1 & 3)) * 16;
  }

  __device__ __forceinline__ void load(u8* stage) {
    const int thread = threadIdx.x;
    u8* to = stage + act_place(thread / 4, thread % 4);
    cp_async16(to, act);
#pragma unroll
    for (int i = 0; i < 3; ++i) cp_async16(to + (i + 1) * 32 * 64, act + rows[i]);
    to = stage + STEP_ACT + thread * 16;
    cp_async16(to, record + step * STEP_CODES);
    if (thread < STEP_SCALES / 16)
      cp_async16(to + STEP_CODES, record + RECORD_CODES + (WEIGHTS == WEIGHTS_NVFP4 ? step * STEP_SCALES : 0));
    act += 64;
    if (++step == RECORD_STEPS) step = 0, record += RECORD_BYTES;
  }

  __device__ __forceinline__ void multiply(const u8* stage) {
    const int lane = lane_id(), row = threadIdx.x / 32 * WARP_ROWS;
    const u8* codes = stage + STEP_ACT + lane * 16;
    const u8* scales = stage + STEP_ACT + STEP_CODES + lane / 4 * 16;
    u32 a[2][ROW_TILES][4];
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t)
        ldmatrix_x4(a[s][t], stage + act_place(row + 16 * t + lane % 16, 2 * s + lane / 16));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 scale = *reinterpret_cast<const uint4*>(scales + 128 * i);
      const u32 scale_pairs[4] = {scale.x, scale.y, scale.z, scale.w};
#if WEIGHTS == WEIGHTS_ZEROS
      const uint4 zero = *reinterpret_cast<const uint4*>(scales + 256 + 128 * i);
      const u32 zero_pairs[4] = {zero.x, zero.y, zero.z, zero.w};
#endif
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 four = *reinterpret_cast<const uint4*>(codes + 512 * (2 * i + half));
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int jj = 0; jj < 4; ++jj) {
          const int j = 8 * i + 4 * half + jj, pair = 2 * half + jj / 2;
#pragma unroll
          for (int s = 0; s < 2; ++s) {
#if WEIGHTS == WEIGHTS_NVFP4
            const h2_t by = wide_scale(scale_pairs[pair], 2 * (jj % 2) + s);
#else
            const h2_t by = as_h2(__byte_perm(scale_pairs[pair], 0, jj % 2 ? 0x3232 : 0x1010));
#endif
            u32 b[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#if WEIGHTS == WEIGHTS_ZEROS
              const h2_t zero = as_h2(__byte_perm(zero_pairs[pair], 0, jj % 2 ? 0x3232 : 0x1010));
              b[r] = as_bits(__hfma2(unscaled(words[jj], 2 * s + r), by, zero));
#else
              b[r] = as_bits(__hmul2(unscaled(words[jj], 2 * s + r), by));
#endif
            }
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t) mma_h_k16(acc[t][j], a[s][t], b[0], b[1]);
          }
        }
      }
    }
  }

#if WEIGHTS == WEIGHTS_NVFP4
  // Byte `which` of the word, exponent + 10 and mantissa, twice as h: the scale * 2^118 (bf16) or 2^7 (fp16).
  static __device__ __forceinline__ h2_t wide_scale(u32 word, int which) {
    const u32 code = __byte_perm(word, 0, 0x4040 | which << 8 | which);
    return as_h2(H_BF16 ? (code << 4) + (235u << 7) * 0x00010001u : (code << 7) + (12u << 10) * 0x00010001u);
  }
#endif
};
