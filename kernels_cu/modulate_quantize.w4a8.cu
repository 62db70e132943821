// modulate_quantize.w4a8: y = h(LayerNorm(x) * scale + shift) -> e4m3, and y @ proj_down.
//
//   x             (M, K)    h      row-major activations
//   shift, scale  (K)       h      of the modulation; scale already contains its 1
//   codes         (M, K)    uint8  one fp32 scale per row
//   scales        (M)       fp32
//   low           (M, R)    fp32   y @ proj_down, y not smoothed
// The other parameters, layouts and the order of sums: common/quantize_rows.cuh
// Work:   a block owns 8 TILES rows, its warps share K; the rows' moments first, then as quantize_act.w4a8.
// Launch: grid (ceil(M / 8 TILES)), block 32 min(12, K/64), dynamic shared memory: engine/kernels/_quantize_rows.py.
// Limits: 168 registers, 66 KiB of shared memory
// Bound:  memory; x read and codes written once, x read again from L2.
// Truth:  engine/reference/modulate_quantize.py
#include "common/quantize_rows.cuh"

extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS, 1)
    modulate_quantize(const h_t* x, const h_t* shift, const h_t* scale, TARGET_PARAMETERS) {
  quantize_rows<FORMAT_E4M3, true>({x, shift, scale, TARGET_ARGUMENTS});
}
