// svdq_linear.nvfp4: e2m1 activations x e2m1 weights by block-scaled mma, then the low-rank branch and an epilogue.
//
//   act      (M, K/2)      uint8  e2m1, even column in the low nibble
//   ascales  (M, K/16)     uint8  e4m3, one scale per row and group of 16
//   weights  (N/128, K/64) records of 4608 bytes (pack_nvfp4 in engine/kernels/_arrange_nvfp4.py), N filled up by zeros:
//              codes   (8, 32, 4) words: tiles 2 p and 2 p + 1, lane, {b0 b1 of the even tile, b0 b1 of the odd one}
//              scales  (4, 8, 4) words: g, tiles 4 i .. 4 i + 3; a word is the e4m3 scales of a column's four groups
//   outer    (N to 128)    fp32   wtscale x wcscales per out channel, or null
// Work:   128 x 128 a block, 4 warps of 32 x 128. Group scales are the matrix unit's own, so sums stay in its fp32
//         accumulators over all of K.
// Launch: grid (ceil(M/128), ceil(N/128)), block 128, shared memory STAGES * STAGE_BYTES.
// Limits: 255 registers, 36864 bytes of shared memory
// Bound:  tensor units. sm_120a and sm_121a only: no other architecture has this instruction.
// Truth:  engine/reference/svdq_linear.py; tests/engine/kernels/test_arrange_nvfp4.py does lane by lane what stands here.
// Source: PTX ISA, "Block Scaling for mma.sync" and the fragments of m16n8k64.
#include "common/pipeline.cuh"

constexpr int ACT_BYTES = BLOCK_ROWS * 32, CODE_BYTES = 4096, RECORD_BYTES = CODE_BYTES + 512;

// C (16, 8) += A (16, 64) B (64, 8), each 16 of k times a scale of A's row and one of B's column; fragments: mma.cuh.
// Selectors 0: the scales of row g come from the lane with q = 0, of row g + 8 from q = 1, of column g from q = 0.
__device__ __forceinline__ void mma_nvfp4_k64(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, u32 a_scales,
                                              u32 b_scales) {
  asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {0, 0}, {%11}, {0, 0};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(a_scales), "r"(b_scales));
}

struct E2M1Tile {
  static constexpr int STAGE_BYTES = ACT_BYTES + RECORD_BYTES + BLOCK_ROWS * 4;

  float (&acc)[ROW_TILES][16][4];
  const u8 *act[2], *record, *ascales;

  __device__ __forceinline__ E2M1Tile(float (&acc)[ROW_TILES][16][4], const u8* codes, const u8* scales,
                                      const u8* weights, int k, int m)
      : acc(acc) {
    const int row0 = blockIdx.x * BLOCK_ROWS;
    record = weights + size_t(blockIdx.y) * (k / 64) * RECORD_BYTES + threadIdx.x * 16;
    for (int i = 0; i < 2; ++i) {  // rows beyond M repeat the last one; they are not stored
      const int row = min(row0 + int(threadIdx.x) / 2 + 64 * i, m - 1);
      act[i] = codes + size_t(row) * (k / 2) + threadIdx.x % 2 * 16;
    }
    ascales = scales + size_t(min(row0 + int(threadIdx.x), m - 1)) * (k / 16);
  }

  // Rows of 32 bytes; the halves change places every 4 rows, so that 8 rows of ldmatrix meet all 32 banks.
  static __device__ __forceinline__ int act_place(int row, int half) { return row * 32 + (half ^ (row >> 2 & 1)) * 16; }

  __device__ __forceinline__ void load(u8* stage) {
    const int thread = threadIdx.x;
    cp_async16(stage + act_place(thread / 2, thread % 2), act[0]);
    cp_async16(stage + act_place(thread / 2 + 64, thread % 2), act[1]);
    u8* to = stage + ACT_BYTES + thread * 16;
    cp_async16(to, record);
    cp_async16(to + 2048, record + 2048);
    if (thread < 32) cp_async16(to + CODE_BYTES, record + CODE_BYTES);
    cp_async4(stage + ACT_BYTES + RECORD_BYTES + thread * 4, ascales);
    act[0] += 32, act[1] += 32, record += RECORD_BYTES, ascales += 4;
  }

  __device__ __forceinline__ void multiply(const u8* stage) {
    const int lane = lane_id(), g = lane / 4, row = threadIdx.x / 32 * WARP_ROWS;
    const uint4* codes = reinterpret_cast<const uint4*>(stage + ACT_BYTES) + lane;
    const uint4* wscales = reinterpret_cast<const uint4*>(stage + ACT_BYTES + CODE_BYTES) + g;
    const u32* scales = reinterpret_cast<const u32*>(stage + ACT_BYTES + RECORD_BYTES) + row + g + 8 * (lane & 1);
    u32 a[ROW_TILES][4], ascale[ROW_TILES];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      ldmatrix_x4(a[t], stage + act_place(row + 16 * t + lane % 16, lane / 16));
      ascale[t] = scales[16 * t];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 w = wscales[8 * i], even = codes[64 * i], odd = codes[64 * i + 32];
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) {
        mma_nvfp4_k64(acc[t][4 * i], a[t], even.x, even.y, ascale[t], w.x);
        mma_nvfp4_k64(acc[t][4 * i + 1], a[t], even.z, even.w, ascale[t], w.y);
        mma_nvfp4_k64(acc[t][4 * i + 2], a[t], odd.x, odd.y, ascale[t], w.z);
        mma_nvfp4_k64(acc[t][4 * i + 3], a[t], odd.z, odd.w, ascale[t], w.w);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
svdq_linear(const u8* act, const u8* ascales, const u8* weights, const float* outer, int k, EPILOGUE_PARAMETERS) {
  extern __shared__ __align__(128) u8 shared[];
  const Epilogue e = {EPILOGUE_ARGUMENTS};
  float acc[ROW_TILES][16][4] = {};
  E2M1Tile tile(acc, act, ascales, weights, k, m);
  sum_over_k(tile, shared, k / 64);
  finish_block(acc, outer, e);
}
