// svdq_linear.w4a16: 16-bit activations x 4-bit weights expanded in registers, the low-rank branch, an epilogue.
//
//   act      (M, K)        h      activations, smoothed
//   ascales                null   there are none
//   weights  (N/128, K/64) records (pack_w4a16 in engine/kernels/_arrange.py, laid out as common/w4a16.cuh says):
//              WEIGHTS_INT4 4352 bytes, WEIGHTS_NVFP4 4608 bytes
//   outer    (N to 128)    fp32   a scale per out channel, or null; takes back what nvfp4's exponents were moved by
// Work:   common/w4a16.cuh. Launch: grid (ceil(M/128), ceil(N/128)), block 128.
// Bound:  issue slots: 3 to 4 operations expand a register of B, which serves 2 mma; tensor units on GeForce, where
//         fp32 sums run at half rate.
// Limits: 255 registers, 42 KiB of shared memory; two blocks an SM.
// Truth:  engine/reference/svdq_linear.py
#include "common/w4a16.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    svdq_linear(const h_t* act, const void* ascales, const u8* weights, const float* outer, int k,
                EPILOGUE_PARAMETERS) {
  using Tile = HalfTile<2>;
  __shared__ __align__(128) u8 shared[STAGES * Tile::STAGE_BYTES];
  const Epilogue e = {EPILOGUE_ARGUMENTS};
  float acc[ROW_TILES][16][4] = {};
  Tile tile(acc, act, weights, k, m);
  sum_over_k(tile, shared, k / 32);
  finish_block(acc, outer, e);
}
