// modulation_w4a16: x W^T + bias for up to eight rows of x, with 4-bit weights that are read once.
//
//   x       (B, K)               h       row-major, 16-byte aligned
//   codes   (T, K/64, 2, 32, 4)  u32     tiles of 2 x 16 outputs; a lane 4 g + q has 16 bytes of each half: outputs g and
//                                        g + 8, channels 16 q .. 16 q + 15 of the group. Nibble 4 e + 2 s + r of word i:
//                                        output g + 8 r, channel 16 q + 4 i + 2 s + e
//   scales  (T, K/64, 2, 8, 4)   16 bit  of g: scale and zero (times its scale) of output g, then of g + 8
//   bias    (O)                  fp32    or null
//   out     (B, O)               h
// Work:   a block makes 32 outputs for eight rows of x; its warps take every eighth group of K and add up in fixed order.
//         Codes are A of an mma, x is B; ones in the place of A make the sum of x. In fp32, over all groups:
//         scale * (codes x) + zero * (sum of x).
//         One instruction makes h of two codes. fp16: nothing but a mask, code * 2^-24 is a subnormal. bf16: 128 + code, and
//         zero - 128 scale in the place of zero; that costs 3 of the 24 bits of an fp32 sum.
// Launch: grid (T, ceil(B / 8)), block 256.
// Bound:  memory: half a byte a weight and 4 bytes a group of 64. A warp has the loads of two groups on their way at once.
// Limits: 96 registers, 9 KiB shared memory.
// Truth:  engine/reference/modulation_w4a16.py
#include "common/mma.cuh"

constexpr int GROUP = 64, TILE_ROWS = 32, TILE_BATCH = 8, NUM_WARPS = 8;
constexpr int AT_ONCE = 2;  // groups that a warp loads at once
constexpr int THREADS = 32 * NUM_WARPS;
constexpr int MIN_BLOCKS = __CUDA_ARCH__ < 1000 ? 3 : 2;  // a multiprocessor; newer architectures would spill
#if H_BF16
constexpr u32 CODE_BASE = 0x43004300u, ONES = 0x3f803f80u;
constexpr float CODE_SCALE = 1.0f, CODE_OFFSET = 128.0f;
#else
constexpr u32 CODE_BASE = 0, ONES = 0x3c003c00u;
constexpr float CODE_SCALE = 16777216.0f, CODE_OFFSET = 0.0f;
#endif

// Scales keep the type of the file, which need not be h.
__device__ __forceinline__ float2 scale_and_zero(u32 pair) {
#if SCALES_BF16
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
#endif
}

// w & mask | base, of which the compiler would make two instructions.
__device__ __forceinline__ u32 two_codes(u32 w) {
  u32 pair;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(pair) : "r"(w), "r"(0x000f000fu), "r"(CODE_BASE));
  return pair;
}

struct Words {  // of one row of x, 16 channels
  uint4 half[2];
};

// c += (scale * codes + zero) x, of one group, for two times 16 outputs.
__device__ __forceinline__ void add_group(float (&c)[2][4], const uint4 (&codes)[2], const uint2 (&scales)[2], Words x) {
  const uint4 x0 = x.half[0], x1 = x.half[1];
  const u32 b[8] = {x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w}, ones[4] = {ONES, ONES, ONES, ONES};
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) mma_h_k16(sums, ones, b[2 * i], b[2 * i + 1]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 words[4] = {codes[half].x, codes[half].y, codes[half].z, codes[half].w};
    float products[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 w = words[i], a[4] = {two_codes(w), two_codes(w >> 4), two_codes(w >> 8), two_codes(w >> 12)};
      mma_h_k16(products, a, b[2 * i], b[2 * i + 1]);
    }
    const float2 upper = scale_and_zero(scales[half].x), lower = scale_and_zero(scales[half].y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 one = i < 2 ? upper : lower;
      c[half][i] = fmaf(one.x * CODE_SCALE, products[i], c[half][i]);
      c[half][i] = fmaf(fmaf(one.x, -CODE_OFFSET, one.y), sums[i], c[half][i]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
modulation_w4a16(const h_t* __restrict__ x, const uint4* __restrict__ codes, const uint2* __restrict__ scales,
                 const float* __restrict__ bias, h_t* __restrict__ out, int batch, int num_groups, int num_rows) {
  __shared__ float parts[NUM_WARPS][TILE_BATCH][TILE_ROWS + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, q = lane & 3;
  const int batch0 = blockIdx.y * TILE_BATCH;
  const size_t group0 = static_cast<size_t>(blockIdx.x) * num_groups + warp;
  codes += group0 * 64 + lane;
  scales += group0 * 16 + g;
  const bool has_x = batch0 + g < batch;
  const h_t* row = x + static_cast<size_t>(has_x ? batch0 + g : 0) * num_groups * GROUP;
  const Words* from = reinterpret_cast<const Words*>(row) + warp * (GROUP / 16) + q;

  float c[2][4] = {};  // outputs g, g + 8 of each half; rows of x 2 q, 2 q + 1
#pragma unroll 1
  for (int left = num_groups - warp; left > 0; left -= AT_ONCE * NUM_WARPS) {
    uint4 held[AT_ONCE][2];
    uint2 held_scales[AT_ONCE][2];
    Words words[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (i * NUM_WARPS >= left) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        held[i][half] = __ldcs(codes + (i * NUM_WARPS * 2 + half) * 32);
        held_scales[i][half] = __ldcs(scales + (i * NUM_WARPS * 2 + half) * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      words[i] = Words{};
      if (has_x && i * NUM_WARPS < left) words[i] = from[i * NUM_WARPS * (GROUP / 16)];
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (i * NUM_WARPS >= left) break;
      add_group(c, held[i], held_scales[i], words[i]);
    }
    codes += AT_ONCE * NUM_WARPS * 64;
    scales += AT_ONCE * NUM_WARPS * 16;
    from += AT_ONCE * NUM_WARPS * (GROUP / 16);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[warp][2 * q + (i & 1)][16 * half + g + 8 * (i / 2)] = c[half][i];
  __syncthreads();
  static_assert(TILE_ROWS * TILE_BATCH == THREADS, "a thread has one result");
  const int column = threadIdx.x / TILE_ROWS, output = blockIdx.x * TILE_ROWS + threadIdx.x % TILE_ROWS;
  if (output >= num_rows || batch0 + column >= batch) return;
  float sum = bias == nullptr ? 0.0f : bias[output];
#pragma unroll
  for (int i = 0; i < NUM_WARPS; ++i) sum += parts[i][column][threadIdx.x % TILE_ROWS];
  out[static_cast<size_t>(batch0 + column) * num_rows + output] = to_h(sum);
}
