// What quantize_act and modulate_quantize do: [LayerNorm, scale, shift,] smooth, quantize, and x @ proj_down, from one read of x.
//
//   x               (M, K)                      h     row-major activations; K a multiple of 64
//   inverse_smooth  (K)                         fp32  1 / smooth_factor
//   factors         (R/16, K/32, 2, 32) x 16 B  h     proj_down as A fragments: arrange_target in engine/kernels/quantize_act.py
//   rank_scales     (R/16)                      fp32  16 ranks at 0 are skipped, their columns of `low` left as they are
//   codes, scales                                     as engine/reference/quantize_act.py's QuantizedAct lays them out
//   low             (M, R)                      fp32
//
// Work:   a block owns 8 TILES whole rows; warp w takes channels 64 (w + i warps), i = 0, 1, ... Lane 4 g + q holds, of row g of
//         each tile, channels 8q..8q+7 of each 32. Those are 16 bytes, and B fragments of mma if k is counted as lanes hold it; the
//         factors are A, so that a warp loads them once for all its rows.
// Memory: each lane copies its own x ahead of time to its own places in shared memory, and no lane ever reads another's: no
//         barriers. e4m3 needs the row's largest first and LayerNorm its moments: x is read again, then from L2.
// Order:  a warp adds its channels in order, then warps are added in order: a function of K alone, never of M, R or TILES.
// Ranks:  the first 32 ranks ride on the pass that quantizes, every further 32 cost one more pass over x.
// Ties:   x / smooth_factor is x * (1 / smooth_factor), and a code is rounded once from that times 1 / scale: where two codes are
//         equally near, the other one may be taken than in the reference.
#pragma once

#include "common/codes.cuh"
#include "common/cp_async.cuh"
#include "common/float_codes.cuh"
#include "common/mma.cuh"

// The host knows the first four, too, and TILES, a define of the variant: engine/kernels/_quantize_rows.py
constexpr int TILE = 8;                     // rows
constexpr int STEP = 64;                    // channels that a warp takes at a time
constexpr int MOST_WARPS = 12;
constexpr int DEPTH = TILES == 1 ? 4 : 1;   // steps that are copied ahead
constexpr int SLICES = 2;                   // of 16 ranks, in one pass
constexpr float LAYER_NORM_EPS = 1e-6f;

struct RowsToQuantize {
  const h_t* x;
  const h_t *shift, *scale;  // (K) of the modulation; null without one
  const float* inverse_smooth;
  const uint4* factors;
  const float* rank_scales;
  u8* codes;
  void* scales;
  float* low;
  int m, k, rank;
  float input_shift;  // of uint4
};

// What every kernel takes after x (and shift and scale), and how it hands them on.
#define TARGET_PARAMETERS                                                                                                 \
  const float *inverse_smooth, const uint4 *factors, const float *rank_scales, u8 *codes, void *scales, float *low, \
      int m, int k, int rank, float input_shift
#define TARGET_ARGUMENTS inverse_smooth, factors, rank_scales, codes, scales, low, m, k, rank, input_shift

struct Place {
  int warp, warps, lane, g, q;
  int first, stride;    // channels of this warp: first, first + stride, ...
  int row0, left;       // the block's first row; rows of x from row0 + g on: row 8 t + g is there if 8 t < left
  const h_t* x;         // this lane's first element in tile 0
  uint4* own;           // this lane's places in shared memory: [slot][tile][block] 32 apart
  float2* told;         // (warps, 8 TILES): two numbers that a warp tells the block of each row
  float2* of_row;       // (2, 8 TILES): LayerNorm's factor and offset of a row; 1 / its e4m3 scale
  float* exchange;      // the copied x's place, between passes
};

// Keeps a number in its register: the compiler would rather compute it again at every step.
template <class T>
__device__ __forceinline__ T kept(T pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

__device__ __forceinline__ u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// One lane's 16 channels of one row: piece[block] are channels 32 block + 8q .. + 7.
struct Step {
  uint4 piece[2];
};

// Calls body(channel, tile, x) for this warp's channels, in order, and of each the tiles in order; before(channel) ahead of them.
// A place in shared memory is filled again as soon as it has been read: loads are spread evenly over the work, because too many
// of them at once hold up everything else that goes through the same queue.
template <class Before, class Body>
__device__ __forceinline__ void walk(const RowsToQuantize& r, const Place& p, Before before, Body body) {
  const auto fetch = [&](uint4* to, int channel, int tile) {
    if (channel < r.k) {
      const h_t* const from = p.x + (TILE * tile * r.k + channel);
      cp_async16(to, from, TILE * tile < p.left);
      cp_async16(to + 32, from + 32, TILE * tile < p.left);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) fetch(p.own + 64 * (TILES * i + t), p.first + i * p.stride, t);
  }
  int slot = 0;
#pragma unroll 1
  for (int channel = p.first; channel < r.k; channel += p.stride) {
    before(channel);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      uint4* const at = p.own + 64 * (TILES * slot + t);
      cp_async_wait<DEPTH * TILES - 1>();
      Step x = {{at[0], at[32]}};
      fetch(at, channel + DEPTH * p.stride, t);
      body(channel, t, x);
    }
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
  }
}

// Brings `bytes` (a multiple of 512, or at most 512) from `from` on into the first cache.
__device__ __forceinline__ void bring(const Place& p, const void* from, int bytes) {
  for (int i = 0; i < bytes; i += 1024) {
    if (i + 32 * p.lane < bytes) asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const u8*>(from) + i + 32 * p.lane));
  }
}

// 1 / scale correctly rounded (Markstein), 0 for what is too small to divide by. __frcp_rn without its branches.
__device__ __forceinline__ float inverse_of(float scale) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scale));
  inverse = fmaf(fmaf(-scale, inverse, 1.0f), inverse, inverse);
  return scale < SMALLEST_NORMAL ? 0.0f : inverse;
}

// ------------------------------------------------------------------------------------------------ LayerNorm

// Mean and sum of squared distances from it, merged piece by piece (Chan et al. 1979): as good as two passes.
struct Moments {
  float mean, m2;

  // The other has share = n / (n + m) of all numbers, and weight = n m / (n + m).
  __device__ __forceinline__ void merge(float other_mean, float other_m2, float share, float weight) {
    const float delta = other_mean - mean;
    mean = fmaf(delta, share, mean);
    m2 += fmaf(delta * delta, weight, other_m2);
  }
};

// Leaves 1 / deviation and -mean / deviation in of_row.
__device__ __forceinline__ void layer_norm_of_rows(const RowsToQuantize& r, const Place& p) {
  Moments moments[TILES] = {};
  float count = 0.0f;
  float share = 1.0f;
  walk(
      r, p, [&](int) { share = __fdividef(16.0f, count + 16.0f), count += 16.0f; },
      [&](int, int t, const Step& x) {
        float2 v[8];
        float2 sum = make_float2(0.0f, 0.0f), m2 = sum;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          v[i] = unpack_h2(word_of(x.piece[i / 4], i % 4));
          sum.x += v[i].x, sum.y += v[i].y;
        }
        const float mean = (sum.x + sum.y) * (1.0f / 16.0f);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          m2.x = fmaf(v[i].x - mean, v[i].x - mean, m2.x);
          m2.y = fmaf(v[i].y - mean, v[i].y - mean, m2.y);
        }
        moments[t].merge(mean, m2.x + m2.y, share, (count - 16.0f) * share);
      });
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    float weight = 0.5f * count;
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      const float mean = __shfl_xor_sync(0xffffffffu, moments[t].mean, other);
      const float m2 = __shfl_xor_sync(0xffffffffu, moments[t].m2, other);
      moments[t].merge(mean, m2, 0.5f, weight);
      weight *= 2.0f;
    }
    if (p.q == 0) p.told[p.warp * TILE * TILES + TILE * t + p.g] = make_float2(moments[t].mean, moments[t].m2);
  }
  __syncthreads();
  for (int row = threadIdx.x; row < TILE * TILES; row += blockDim.x) {
    Moments all = {};
    float before = 0.0f;
    for (int warp = 0; warp < p.warps; ++warp) {
      const float2 part = p.told[warp * TILE * TILES + row];
      const float numbers = (float)((r.k - warp * STEP + p.stride - 1) / p.stride * STEP);
      const float share = __fdividef(numbers, before + numbers);
      all.merge(part.x, part.y, share, before * share);
      before += numbers;
    }
    const float factor = rsqrtf(all.m2 / (float)r.k + LAYER_NORM_EPS);
    p.of_row[row] = make_float2(factor, -all.mean * factor);
  }
  __syncthreads();
}

// 16 bytes that are loaded for each tile, from the first cache, rather than kept in registers for all of them.
__device__ __forceinline__ uint4 load_again(const h_t* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// Shift and scale of a lane's 16 channels.
struct Modulation {
  uint4 scale[2], shift[2];
};

__device__ __forceinline__ void load_modulation(const RowsToQuantize& r, const Place& p, int channel, Modulation& to) {
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int column = channel + 32 * block + 8 * p.q;
    to.scale[block] = load_again(r.scale + column);
    to.shift[block] = load_again(r.shift + column);
  }
}

// x becomes y = (x * factor + offset) * scale + shift, rounded once.
__device__ __forceinline__ void modulate(const RowsToQuantize& r, const Place& p, int channel, int tile, Step& x) {
  Modulation by;
  load_modulation(r, p, channel, by);
  const float2 norm = p.of_row[TILE * tile + p.g];
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    u32 y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = unpack_h2(word_of(x.piece[block], i));
      const float2 s = unpack_h2(word_of(by.scale[block], i)), b = unpack_h2(word_of(by.shift[block], i));
      y[i] = pack_h2(fmaf(fmaf(v.x, norm.x, norm.y), s.x, b.x), fmaf(fmaf(v.y, norm.x, norm.y), s.y, b.y));
    }
    x.piece[block] = make_uint4(y[0], y[1], y[2], y[3]);
  }
}

// ------------------------------------------------------------------------------------------ low-rank product

// Which of the SLICES from `first` on are there and not at 0, one bit each.
__device__ __forceinline__ u32 active_slices(const RowsToQuantize& r, int first) {
  u32 active = 0;
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) {
    if (first + slice < r.rank / 16 && __ldg(r.rank_scales + first + slice) != 0.0f) active |= 1u << slice;
  }
  return active;
}

struct LowSums {
  float tile[SLICES][TILES][4];  // C fragments of 16 ranks and 8 rows
};

// proj_down of 64 channels: A fragments of each 16 ranks.
struct Factors {
  uint4 a[SLICES][4];
};

__device__ __forceinline__ void load_factors(const RowsToQuantize& r, const Place& p, int first, u32 active, int channel, Factors& f) {
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) {
    if (active >> slice & 1) {
      const uint4* const down = r.factors + (size_t)(first + slice) * (r.k * 2) + channel * 2 + p.lane;
#pragma unroll
      for (int i = 0; i < 4; ++i) f.a[slice][i] = __ldg(down + 32 * i);
      if (channel + p.stride < r.k) bring(p, down - p.lane + p.stride * 2, 2048);
    }
  }
}

__device__ __forceinline__ void project_down(const Step& x, const Factors& f, u32 active, int tile, LowSums& sums) {
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) {
    if (active >> slice & 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 &words = f.a[slice][i], &piece = x.piece[i / 2];
        const u32 a[4] = {words.x, words.y, words.z, words.w};
        mma_h_k16(sums.tile[slice][tile], a, i % 2 ? piece.z : piece.x, i % 2 ? piece.w : piece.y);
      }
    }
  }
}

// Adds the warps' sums in order and stores them, 16 ranks at a time.
__device__ __forceinline__ void store_low(const RowsToQuantize& r, const Place& p, int first, u32 active, const LowSums& sums) {
  const int width = TILE * TILES + 2;  // of a rank's numbers; 2 more so that ranks do not share banks
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) {
    if (!(active >> slice & 1)) continue;
    __syncthreads();
    float* const mine = p.exchange + (p.warp * 16 + p.g) * width + 2 * p.q;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      {
        const float(&c)[4] = sums.tile[slice][t];
        *reinterpret_cast<float2*>(mine + TILE * t) = make_float2(c[0], c[1]);
        *reinterpret_cast<float2*>(mine + 8 * width + TILE * t) = make_float2(c[2], c[3]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * (TILE / 2) * TILES; i += blockDim.x) {
      const int rank = i % 16, row = i / 16 * 2;
      float2 sum = make_float2(0.0f, 0.0f);
      for (int warp = 0; warp < p.warps; ++warp) {
        const float2 from = *reinterpret_cast<const float2*>(p.exchange + (warp * 16 + rank) * width + row);
        sum.x += from.x, sum.y += from.y;
      }
      float* const to = r.low + (size_t)(p.row0 + row) * r.rank + (first + slice) * 16 + rank;
      if (p.row0 + row < r.m) to[0] = sum.x;
      if (p.row0 + row + 1 < r.m) to[r.rank] = sum.y;
    }
  }
}

// -------------------------------------------------------------------------------------------------- quantize

// Reciprocals of smooth_factor for a lane's 16 channels.
struct Smoothing {
  float inverse[2][8];
};

__device__ __forceinline__ void load_smoothing(const RowsToQuantize& r, const Place& p, int channel, Smoothing& s) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(r.inverse_smooth + channel + 8 * p.q + 32 * (i >> 1) + 4 * (i & 1)));
    float* const to = s.inverse[i >> 1] + 4 * (i & 1);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
}

// (x + shift) / smooth_factor of 8 channels, and the largest magnitude.
template <int FORMAT>
__device__ __forceinline__ float smoothed(const uint4& piece, const float (&inverse)[8], float input_shift, float (&v)[8]) {
  float largest[2];
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float2 x = unpack_h2(word_of(piece, i / 2));
    if constexpr (FORMAT == FORMAT_UINT4) x.x += input_shift, x.y += input_shift;
    v[i] = x.x * inverse[i];
    v[i + 1] = x.y * inverse[i + 1];
    largest[0] = i == 0 ? fabsf(v[0]) : fmaxf(largest[0], fabsf(v[i]));
    largest[1] = i == 0 ? fabsf(v[1]) : fmaxf(largest[1], fabsf(v[i + 1]));
  }
  return fmaxf(largest[0], largest[1]);
}

// Eight codes of 4 bits in a word. Adding 1.5 * 2^23 (2^23 for what is never negative) rounds to an integer, ties to even, and
// leaves it in the lowest bits; what the constant leaves above them is taken off the word at the end.
template <int FORMAT>
__device__ __forceinline__ u32 int4_word(const float (&v)[8], float inverse_scale) {
  constexpr bool SIGNED = FORMAT == FORMAT_INT4;
  const float magic = SIGNED ? 12582920.0f : 8388608.0f;  // signed: 8 more, so that no code borrows from the next
  const u32 above = (SIGNED ? 0x4b400000u : 0x4b000000u) * 0x11111111u;
  u32 word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const u32 code = __float_as_uint(fmaf(SIGNED ? v[i] : fmaxf(v[i], 0.0f), inverse_scale, magic));
    word = i == 7 ? code : word * 16 + code;
  }
  return SIGNED ? (word - above) ^ 0x88888888u : word - above;
}

// The two words of a row, each 8 codes of 32 channels: lanes trade so that a quad stores 32 neighbouring bytes.
__device__ __forceinline__ void store_nibbles(const Place& p, u8* to, bool there, u32 first, u32 second) {
  const bool odd = p.q & 1;
  const u32 other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  if (there) *reinterpret_cast<uint2*>(to + (odd ? 16 : 0) + (p.q >> 1) * 8) = odd ? make_uint2(other, second) : make_uint2(first, other);
}

// One row's 64 channels in all formats but e4m3, whose scale is of the whole row.
template <int FORMAT>
__device__ __forceinline__ void quantize_step(const RowsToQuantize& r, const Place& p, int channel, int tile, const Step& x,
                                              const Smoothing& s) {
  constexpr bool HALF = FORMAT == FORMAT_HALF;
  const int row = p.row0 + p.g + TILE * tile;
  const bool there = TILE * tile < p.left;
  u8* const codes = r.codes + (size_t)row * (HALF ? r.k * 2 : r.k / 2) + (HALF ? channel * 2 + 16 * p.q : channel / 2);
  float v[2][8];
  float largest[2];
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    largest[block] = smoothed<FORMAT>(x.piece[block], s.inverse[block], r.input_shift, v[block]);
  }
  if constexpr (FORMAT == FORMAT_INT4 || FORMAT == FORMAT_UINT4) {
    float scale = fmaxf(largest[0], largest[1]);
    scale = fmaxf(scale, __shfl_xor_sync(0xffffffffu, scale, 1));
    scale = fmaxf(scale, __shfl_xor_sync(0xffffffffu, scale, 2)) * (1.0f / (FORMAT == FORMAT_INT4 ? INT4_MAX : UINT4_MAX));
    const float inverse = inverse_of(scale);
    if (p.q == 0 && there) reinterpret_cast<float*>(r.scales)[(size_t)(channel / STEP) * r.m + row] = scale;
    store_nibbles(p, codes, there, int4_word<FORMAT>(v[0], inverse), int4_word<FORMAT>(v[1], inverse));
  } else if constexpr (FORMAT == FORMAT_NVFP4) {
    u32 words[2], bytes = 0;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float group = fmaxf(largest[block], __shfl_xor_sync(0xffffffffu, largest[block], 1));
      const float exact = fminf(group * (1.0f / E2M1_MAX), E4M3_MAX);
      const u32 stored = e4m3_pair(exact, 0.0f) & 255;
      const float inverse = inverse_of(e4m3_value(stored));
      bytes |= stored << (16 * block + 8 * (p.q >> 1));
      words[block] = 0;
#pragma unroll
      for (int i = 0; i < 8; i += 2) words[block] |= e2m1_pair(v[block][i] * inverse, v[block][i + 1] * inverse) << (4 * i);
    }
    bytes |= __shfl_xor_sync(0xffffffffu, bytes, 2);
    u8* const to = reinterpret_cast<u8*>(r.scales) + (size_t)row * (r.k / 16) + channel / 16;
    if (p.q == 0 && there) *reinterpret_cast<u32*>(to) = bytes;
    store_nibbles(p, codes, there, words[0], words[1]);
  } else if (there) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float(&w)[8] = v[block];
      *reinterpret_cast<uint4*>(codes + 64 * block) =
          make_uint4(pack_h2(w[0], w[1]), pack_h2(w[2], w[3]), pack_h2(w[4], w[5]), pack_h2(w[6], w[7]));
    }
  }
}

// What lanes have seen becomes scales; their reciprocals are left in of_row.
__device__ __forceinline__ void e4m3_scales(const RowsToQuantize& r, const Place& p, const float (&largest)[TILES]) {
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    float of_quad = fmaxf(largest[t], __shfl_xor_sync(0xffffffffu, largest[t], 1));
    of_quad = fmaxf(of_quad, __shfl_xor_sync(0xffffffffu, of_quad, 2));
    if (p.q == 0) p.told[p.warp * TILE * TILES + TILE * t + p.g].x = of_quad;
  }
  __syncthreads();
  for (int row = threadIdx.x; row < TILE * TILES; row += blockDim.x) {
    float of_row = 0.0f;
    for (int warp = 0; warp < p.warps; ++warp) of_row = fmaxf(of_row, p.told[warp * TILE * TILES + row].x);
    const float scale = of_row * (1.0f / E4M3_MAX);
    if (p.row0 + row < r.m) reinterpret_cast<float*>(r.scales)[p.row0 + row] = scale;
    p.of_row[TILE * TILES + row].x = inverse_of(scale);
  }
  __syncthreads();
}

__device__ __forceinline__ void e4m3_step(const RowsToQuantize& r, const Place& p, int channel, int tile, const Step& x,
                                          const Smoothing& s) {
  u8* const codes = r.codes + (size_t)(p.row0 + p.g + TILE * tile) * r.k + 8 * p.q + channel;
  const float inverse = p.of_row[TILE * (TILES + tile) + p.g].x;
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    float v[8];
    smoothed<FORMAT_E4M3>(x.piece[block], s.inverse[block], 0.0f, v);
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = e4m3_pair(v[2 * i] * inverse, v[2 * i + 1] * inverse);
    if (TILE * tile < p.left) {
      *reinterpret_cast<uint2*>(codes + 32 * block) = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- all

// Dynamic shared memory: warps x TILES x (DEPTH KiB + 64 bytes), and 128 bytes x TILES.
template <int FORMAT, bool MODULATE>
__device__ __forceinline__ void quantize_rows(const RowsToQuantize& r) {
  extern __shared__ uint4 shared[];
  Place p;
  p.warp = threadIdx.x / 32, p.warps = blockDim.x / 32, p.lane = threadIdx.x % 32, p.g = p.lane / 4, p.q = p.lane % 4;
  p.first = p.warp * STEP, p.stride = p.warps * STEP;
  p.row0 = blockIdx.x * TILE * TILES;
  p.left = r.m - p.row0 - p.g;
  p.x = kept(r.x + (size_t)(p.row0 + p.g) * r.k + 8 * p.q);
  p.own = shared + p.warp * DEPTH * TILES * 64 + p.lane;
  p.exchange = reinterpret_cast<float*>(shared);
  p.told = reinterpret_cast<float2*>(shared + p.warps * DEPTH * TILES * 64);
  p.of_row = p.told + p.warps * TILE * TILES;

  if constexpr (MODULATE) layer_norm_of_rows(r, p);
  u32 active = active_slices(r, 0);
  LowSums sums = {};
  Factors factors;
  Smoothing smoothing;
  float largest[TILES] = {};
  const auto of_channels = [&](int channel) {
    load_smoothing(r, p, channel, smoothing);
    if (channel + p.stride < r.k) {
      bring(p, r.inverse_smooth + channel + p.stride, 256);
      if constexpr (MODULATE) bring(p, r.scale + channel + p.stride, 128), bring(p, r.shift + channel + p.stride, 128);
    }
  };
  walk(
      r, p,
      [&](int channel) {
        of_channels(channel);
        load_factors(r, p, 0, active, channel, factors);
      },
      [&](int channel, int t, Step& x) {
        if constexpr (MODULATE) modulate(r, p, channel, t, x);
        project_down(x, factors, active, t, sums);
        if constexpr (FORMAT == FORMAT_E4M3) {
          float v[8];
          const float first = smoothed<FORMAT_E4M3>(x.piece[0], smoothing.inverse[0], 0.0f, v);
          largest[t] = fmaxf(largest[t], fmaxf(first, smoothed<FORMAT_E4M3>(x.piece[1], smoothing.inverse[1], 0.0f, v)));
        } else {
          quantize_step<FORMAT>(r, p, channel, t, x, smoothing);
        }
      });
  if constexpr (FORMAT == FORMAT_E4M3) {
    e4m3_scales(r, p, largest);
    walk(r, p, of_channels, [&](int channel, int t, Step& x) {
      if constexpr (MODULATE) modulate(r, p, channel, t, x);
      e4m3_step(r, p, channel, t, x, smoothing);
    });
  }
  store_low(r, p, 0, active, sums);

#pragma unroll 1
  for (int first = SLICES; first < r.rank / 16; first += SLICES) {
    active = active_slices(r, first);
    if (active == 0) continue;
    __syncthreads();  // the sums before these have been read where x comes now
    sums = {};
    walk(
        r, p,
        [&](int channel) {
          load_factors(r, p, first, active, channel, factors);
        },
        [&](int channel, int t, Step& x) {
          if constexpr (MODULATE) modulate(r, p, channel, t, x);
          project_down(x, factors, active, t, sums);
        });
    store_low(r, p, first, active, sums);
  }
}
