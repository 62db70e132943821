// quantize_act.w4a16: 16-bit activations -> h(x / smooth_factor), and x @ proj_down from the same read of x.
//
//   x       (M, K)    h      row-major activations
//   codes   (M, K)    h      no scales
//   scales  null
//   low     (M, R)    fp32   x @ proj_down, x neither shifted nor smoothed
// The other parameters, layouts and the order of sums: common/quantize_rows.cuh
// Work:   a block owns 8 TILES rows, its warps share K; one pass.
// Launch: grid (ceil(M / 8 TILES)), block 32 min(12, K/64), dynamic shared memory: engine/kernels/_quantize_rows.py.
// Limits: 168 registers, 66 KiB of shared memory
// Bound:  memory; x read and codes written once.
// Truth:  engine/reference/quantize_act.py
#include "common/quantize_rows.cuh"

extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS, 1) quantize_act(const h_t* x, TARGET_PARAMETERS) {
  quantize_rows<FORMAT_HALF, false>({x, nullptr, nullptr, TARGET_ARGUMENTS});
}
