// svdq_linear.w4a8: e4m3 activations x 4-bit integer weights by mma.sync, then the low-rank branch and an epilogue.
//
//   act      (M, K)        uint8  e4m3
//   ascales  (M)           fp32   one scale per row
//   weights  (N/128, K/64) records (pack_w4a8 in engine/kernels/_arrange_w4a8.py), N filled up with zeros:
//              codes   (8, 32, 4) words: tiles 2 p and 2 p + 1, lane, {k 0..31, k 32..63 of the even tile, of the odd one}
//              scales  (128)
//   outer    (N to 128)    fp32   wtscale x wcscales and what e4m3.cuh asks for, per out channel
// Work:   128 x 128 a block, 4 warps of 32 x 128. Two mma m16n8k32 are one group; their sums start from 0 and are scaled
//         into the running ones: fp32 over K.
// Launch: grid (ceil(M/128), ceil(N/128)), block 128, shared memory STAGES * STAGE_BYTES.
// Limits: 255 registers, 51200 bytes of shared memory
// Bound:  tensor units on sm_89 and sm_120. sm_90 puts 16-bit mma in the place of this one: right, and slow.
// Truth:  engine/reference/svdq_linear.py
#include "common/e4m3.cuh"
#include "common/pipeline.cuh"

constexpr int ACT_BYTES = BLOCK_ROWS * GROUP, CODE_BYTES = 4096, RECORD_BYTES = CODE_BYTES + 128 * SCALE_BYTES;

constexpr int PAIRS = __CUDA_ARCH__ == 900 ? 2 : 4;  // of tiles that are multiplied at a time

struct E4M3Tile {
  static constexpr int STAGE_BYTES = ACT_BYTES + RECORD_BYTES;

  float (&acc)[ROW_TILES][16][4];
  const u8 *act, *record;
  int k, rows;  // of the 4 rows of this thread, 32 apart, those below M
  int pairs;    // of tiles below N, up to 8 or more

  __device__ __forceinline__ E4M3Tile(float (&acc)[ROW_TILES][16][4], const u8* codes, const u8* weights, int k, int m,
                                      int n)
      : acc(acc), k(k), pairs((n - int(blockIdx.y) * BLOCK_COLUMNS + 15) / 16) {
    const int row = blockIdx.x * BLOCK_ROWS + threadIdx.x / 4;
    act = codes + size_t(row) * k + threadIdx.x % 4 * 16;
    rows = (m - row + 31) / 32;
    record = weights + size_t(blockIdx.y) * (k / GROUP) * RECORD_BYTES + threadIdx.x * 16;
  }

  // Rows of 64 bytes; the quarters change places every 2 rows, so that 8 rows of ldmatrix meet all 32 banks.
  static __device__ __forceinline__ int act_place(int row, int quarter) {
    return row * GROUP + (quarter ^ (row >> 1 & 3)) * 16;
  }

  __device__ __forceinline__ void load(u8* stage) {
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u8* from = i < rows ? act + size_t(32 * i) * k : record;
      cp_async16(stage + act_place(thread / 4 + 32 * i, thread % 4), from, i < rows);
    }
    u8* to = stage + ACT_BYTES + thread * 16;
    cp_async16(to, record);
    cp_async16(to + 2048, record + 2048);
    if (thread < 8 * SCALE_BYTES) cp_async16(to + CODE_BYTES, record + CODE_BYTES);
    act += GROUP, record += RECORD_BYTES;
  }

  __device__ __forceinline__ void multiply(const u8* stage) {
    const int lane = lane_id(), row = threadIdx.x / 32 * WARP_ROWS;
    const u8* codes = stage + ACT_BYTES + lane * 16;
    const u8* scales = stage + ACT_BYTES + CODE_BYTES + 2 * (lane & 3) * SCALE_BYTES;
    u32 a[ROW_TILES][2][4];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix_x4(a[t][i], stage + act_place(row + 16 * t + lane % 16, 2 * i + lane / 16));
    // Columns beyond N are left out. Besides, a branch keeps ptxas from loading all columns at once, and spilling.
#pragma unroll
    for (int first = 0; first < 8; first += PAIRS)
      if (first < pairs) multiply_columns(first, a, codes, scales);
  }

  __device__ __forceinline__ void multiply_columns(int first, const u32 (&a)[ROW_TILES][2][4], const u8* codes,
                                                   const u8* scales) {
#pragma unroll
    for (int pair = first; pair < first + PAIRS; ++pair) {
      const uint4 b = *reinterpret_cast<const uint4*>(codes + 512 * pair);
      multiply_tile(2 * pair, a, b.x, b.y, scale_pair(scales + 16 * pair * SCALE_BYTES));
      multiply_tile(2 * pair + 1, a, b.z, b.w, scale_pair(scales + (16 * pair + 8) * SCALE_BYTES));
    }
  }

  __device__ __forceinline__ void multiply_tile(int j, const u32 (&a)[ROW_TILES][2][4], u32 low, u32 high, float2 w) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      float sums[4] = {};
      mma_e4m3_k32(sums, a[t][0], first_four(low), second_four(low));
      mma_e4m3_k32(sums, a[t][1], first_four(high), second_four(high));
      float(&c)[4] = acc[t][j];
      c[0] = fmaf(sums[0], w.x, c[0]), c[1] = fmaf(sums[1], w.y, c[1]);
      c[2] = fmaf(sums[2], w.x, c[2]), c[3] = fmaf(sums[3], w.y, c[3]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
svdq_linear(const u8* act, const float* ascales, const u8* weights, const float* outer, int k, EPILOGUE_PARAMETERS) {
  extern __shared__ __align__(128) u8 shared[];
  const Epilogue e = {EPILOGUE_ARGUMENTS};
  float acc[ROW_TILES][16][4] = {};
  E4M3Tile tile(acc, act, weights, k, m, n);
  sum_over_k(tile, shared, k / GROUP);
  const int row = blockIdx.x * BLOCK_ROWS + threadIdx.x / 32 * WARP_ROWS + lane_id() / 4;
#pragma unroll
  for (int t = 0; t < ROW_TILES; ++t) {
    const float above = ascales[min(row + 16 * t, m - 1)], below = ascales[min(row + 16 * t + 8, m - 1)];
#pragma unroll
    for (int j = 0; j < 16; ++j)
      acc[t][j][0] *= above, acc[t][j][1] *= above, acc[t][j][2] *= below, acc[t][j][3] *= below;
  }
  finish_block(acc, outer, e);
}
