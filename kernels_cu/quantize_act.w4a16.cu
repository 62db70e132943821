// quantize_act.w4a16: 16-bit activations -> h(x / smooth_factor), and x @ proj_down from the same read of x.
//
//   x       (M, K)    h      row-major activations
//   codes   (M, K)    h      no scales
//   scales  null           
//   low     (M, R)    fp32   x @ proj_down, x neither shifted nor smoothed
// The other parameters, layouts and the order of sums: common/quantize_rows.cuh
// Work:   16 rows a block, warps share K; one pass.
// Launch: grid (ceil(M/16)), block 32 min(8, K/64), dynamic shared memory from engine/kernels/_quantize_rows.py.
// Limits: 168 registers, 113 KiB of shared memory
// Bound:  memory; x read and codes written once.
// Truth:  engine/reference/quantize_act.py
#define BLOCKS 1  // two would spill 8 bytes in fp16
#include "common/quantize_rows.cuh"

extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS, BLOCKS) quantize_act(const h_t* x, TARGET_PARAMETERS) {
  quantize_rows<FORMAT_HALF, false>({x, nullptr, nullptr, TARGET_ARGUMENTS});
}
