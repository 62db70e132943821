// linear_w4a16: 16-bit activations x unsigned 4-bit weights with scales and zeros (AWQ), expanded in registers.
//
//   x        (M, K)            h     row-major
//   weights  (N/128, K/GROUP)  records of 64 GROUP + 512 bytes (pack_linear_w4a16 in engine/kernels/_arrange.py):
//                              codes, scales, zeros as common/w4a16.cuh says. GROUP is 64 or 128
//   bias     (N)               fp32  or null
//   out      (M, N)            h     rows out_stride apart
// Work:   common/w4a16.cuh. Launch: grid (ceil(M/128), ceil(N/128)), block 128.
// Bound:  as svdq_linear.w4a16.
// Limits: 255 registers, 42 KiB of shared memory; two blocks an SM.
// Truth:  engine/reference/linear_w4a16.py
#define WEIGHTS WEIGHTS_ZEROS
#define EPILOGUE PLAIN
#include "common/w4a16.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    linear_w4a16(const h_t* x, const u8* weights, int k, const float* bias, int m, int n, h_t* out,
                 int out_stride) {
  using Tile = HalfTile<GROUP / 32>;
  __shared__ __align__(128) u8 shared[STAGES * Tile::STAGE_BYTES];
  const Epilogue e = {bias, nullptr, nullptr, nullptr, 0, 0, m, n, out, out_stride};
  float acc[ROW_TILES][16][4] = {};
  Tile tile(acc, x, weights, k, m);
  sum_over_k(tile, shared, k / 32);
  finish_block(acc, nullptr, e);
}
