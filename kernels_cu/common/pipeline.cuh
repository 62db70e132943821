// The main loop that plans share: 128 rows x 128 columns a block, 4 warps of 32 rows, K in stages of shared memory.
//
// A Tile says what a stage is and what is done with it:
//   STAGE_BYTES       multiple of 128
//   load(stage, s)    this thread's share of the copies of stage s, in order s = 0, 1, ...
//   multiply(stage)   adds the stage into acc[2][16][4], row tiles of 16, each as epilogue.cuh has it
#pragma once

#include "common/cp_async.cuh"
#include "common/epilogue.cuh"

constexpr int THREADS = 128, BLOCK_ROWS = 128, BLOCK_COLUMNS = 128, WARP_ROWS = 32, ROW_TILES = 2;
#if __CUDA_ARCH__ >= 800
constexpr int STAGES = 4;
#else
constexpr int STAGES = 2;  // copies are not asynchronous there, and two blocks share 64 KiB
#endif

template <class Tile>
__device__ __forceinline__ void sum_over_k(Tile& tile, u8* shared, int stages) {
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < stages) tile.load(shared + s * Tile::STAGE_BYTES);
    cp_async_commit();
  }
  int filled = STAGES - 1, used = 0;  // the stage to load next, the one to multiply next
#pragma unroll 1
  for (int s = 0; s < stages; ++s) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // everybody's copies are there, and everybody is done with the stage that is loaded next
    if (s + STAGES - 1 < stages) tile.load(shared + filled * Tile::STAGE_BYTES);
    cp_async_commit();
    filled = filled + 1 == STAGES ? 0 : filled + 1;
    tile.multiply(shared + used * Tile::STAGE_BYTES);
    used = used + 1 == STAGES ? 0 : used + 1;
  }
}

// outer: (N to 128) fp32, one scale per out channel, or null.
__device__ __forceinline__ void finish_block(float (&acc)[ROW_TILES][16][4], const float* outer,
                                             const Epilogue& e) {
  const int row0 = blockIdx.x * BLOCK_ROWS + threadIdx.x / 32 * WARP_ROWS, col0 = blockIdx.y * BLOCK_COLUMNS;
  if (outer != nullptr) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 scale = *reinterpret_cast<const float2*>(outer + col0 + 8 * j + 2 * (lane_id() & 3));
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t)
        acc[t][j][0] *= scale.x, acc[t][j][1] *= scale.y, acc[t][j][2] *= scale.x, acc[t][j][3] *= scale.y;
    }
  }
#pragma unroll 1
  for (int t = 0; t < ROW_TILES; ++t) {  // not unrolled, the ends are long: the second tile takes the first's place
    finish_rows(acc[0], row0 + 16 * t, col0, e);
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[0][j][i] = acc[1][j][i];
  }
}
