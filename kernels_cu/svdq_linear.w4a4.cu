// svdq_linear.w4a4: 4-bit activations x 4-bit weights, then the low-rank branch and an epilogue.
//
//   act      (M, K/2)      uint8  codes, even column in the low nibble; signed, or 0..15 if ACT_UNSIGNED
//   ascales  (K/64, M)     fp32   one scale per row and group
//   weights  (N/128, K/64) records of 4352 bytes (pack_w4a4 in engine/kernels/_arrange.py), N filled up with zeros:
//              codes   (8, 32, 4) words: tiles 2 p and 2 p + 1, lane, {even tile's b0 b1, odd tile's b0 b1}
//              scales  (4, 4, 8) h: tiles 4 i .. 4 i + 3, q, the tile's columns 2 q and 2 q + 1
//   outer    (N to 128)    fp32   a scale per out channel, or null
// Work:   128 x 128 a block, 4 warps of 32 x 128. An mma m16n8k64 is one group; its integer sums start from MAGIC,
//         so that their bits are the float MAGIC_FLOAT + sum. fma(that, w, -MAGIC_FLOAT * w) is w * sum without any
//         rounding, since w has at most 11 bits and the sum 13; a second fma brings the activation's scale and the
//         running sum.
// Launch: grid (ceil(M/128), ceil(N/128)), block 128.
// Bound:  sm_80: fp32 units (8 fma an mma, 16 cycles of theirs against 8 of the tensor unit); sm_86, 89: tensor
//         units. From sm_90 on the compiler puts int8 and shifts in the place of s4 mma: right, and slow.
// Limits: 255 registers, 33 KiB of shared memory; two blocks an SM.
// Truth:  engine/reference/svdq_linear.py
#include "common/pipeline.cuh"

constexpr int MAGIC = 0x4B400000;  // 1.5 * 2^23 as a float: room for sums of either sign
constexpr float MAGIC_FLOAT = 12582912.0f;
constexpr int ACT_BYTES = BLOCK_ROWS * 32, CODE_BYTES = 4096, RECORD_BYTES = CODE_BYTES + 256;

struct Int4Tile {
  static constexpr int STAGE_BYTES = ACT_BYTES + RECORD_BYTES;

  float (&acc)[ROW_TILES][16][4];
  const u8 *act, *record;
  const float* ascales;             // of the group after the next, row g of this warp
  float ascale[ROW_TILES][2] = {};  // of the next group: on their way while one is multiplied
  int second_row, m, rows_left, groups_left;

  __device__ __forceinline__ Int4Tile(float (&acc)[ROW_TILES][16][4], const u8* codes, const float* scales,
                                      const u8* weights, int k, int m)
      : acc(acc), m(m), groups_left(k / 64) {
    const int row0 = blockIdx.x * BLOCK_ROWS, thread = threadIdx.x;
    record = weights + size_t(blockIdx.y) * (k / 64) * RECORD_BYTES + thread * 16;
    // Rows beyond M repeat the last one; they are not stored.
    const int first = min(row0 + thread / 2, m - 1), second = min(row0 + thread / 2 + 64, m - 1);
    act = codes + size_t(first) * (k / 2) + thread % 2 * 16;
    second_row = (second - first) * (k / 2);
    const int row = row0 + thread / 32 * WARP_ROWS + lane_id() / 4;
    ascales = scales + row;
    rows_left = m - row;
    fetch_scales();
  }

  __device__ __forceinline__ void fetch_scales() {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i)
      if (8 * i < rows_left && groups_left > 0) ascale[i / 2][i % 2] = __ldg(ascales + 8 * i);
    ascales += m, --groups_left;
  }

  // Rows of 32 bytes; the halves change places every 4 rows, so that 8 rows of ldmatrix meet all 32 banks.
  static __device__ __forceinline__ int act_place(int row, int half) {
    return row * 32 + (half ^ (row >> 2 & 1)) * 16;
  }

  __device__ __forceinline__ void load(u8* stage) {
    const int thread = threadIdx.x;
    u8* to = stage + act_place(thread / 2, thread % 2);
    cp_async16(to, act);
    cp_async16(to + 64 * 32, act + second_row);
    to = stage + ACT_BYTES + thread * 16;
    cp_async16(to, record);
    cp_async16(to + 2048, record + 2048);
    if (thread < 16) cp_async16(to + CODE_BYTES, record + CODE_BYTES);
    act += 32, record += RECORD_BYTES;
  }

  __device__ __forceinline__ void multiply(const u8* stage) {
    const int lane = lane_id(), row = threadIdx.x / 32 * WARP_ROWS;
    const u8* codes = stage + ACT_BYTES + lane * 16;
    const u8* wscales = stage + ACT_BYTES + CODE_BYTES + (lane & 3) * 16;
    u32 a[ROW_TILES][4];
    float scale[ROW_TILES][2];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      ldmatrix_x4(a[t], stage + act_place(row + 16 * t + lane % 16, lane / 16));
      scale[t][0] = ascale[t][0], scale[t][1] = ascale[t][1];
    }
    fetch_scales();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i == 2 && m < 0) return;  // never: but without a branch ptxas starts all 32 mma at once, and spills
      const uint4 w = *reinterpret_cast<const uint4*>(wscales + 64 * i);
      const u32 pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int jj = 0; jj < 4; jj += 2) {
        const uint4 b = *reinterpret_cast<const uint4*>(codes + 512 * (2 * i + jj / 2));
        multiply_tile(4 * i + jj, a, scale, b.x, b.y, unpack_h2(pairs[jj]));
        multiply_tile(4 * i + jj + 1, a, scale, b.z, b.w, unpack_h2(pairs[jj + 1]));
      }
    }
  }

  __device__ __forceinline__ void multiply_tile(int j, const u32 (&a)[ROW_TILES][4],
                                                const float (&ascale)[ROW_TILES][2], u32 b0, u32 b1, float2 w) {
    const float2 offset = make_float2(-MAGIC_FLOAT * w.x, -MAGIC_FLOAT * w.y);
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      int sums[4];
      mma_int4_k64(sums, a[t], b0, b1, MAGIC);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float (&c)[4] = acc[t][j];
        c[2 * r] = fmaf(fmaf(__int_as_float(sums[2 * r]), w.x, offset.x), ascale[t][r], c[2 * r]);
        c[2 * r + 1] = fmaf(fmaf(__int_as_float(sums[2 * r + 1]), w.y, offset.y), ascale[t][r], c[2 * r + 1]);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    svdq_linear(const u8* act, const float* ascales, const u8* weights, const float* outer, int k,
                EPILOGUE_PARAMETERS) {
  __shared__ __align__(128) u8 shared[STAGES * Int4Tile::STAGE_BYTES];
  const Epilogue e = {EPILOGUE_ARGUMENTS};
  float acc[ROW_TILES][16][4] = {};
  Int4Tile tile(acc, act, ascales, weights, k, m);
  sum_over_k(tile, shared, k / 64);
  finish_block(acc, outer, e);
}
