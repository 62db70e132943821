// What quantize_act and modulate_quantize do: [LayerNorm, scale, shift,] smooth, quantize, and x @ proj_down, from one read of x.
//
//   x            (M, K)                      h     row-major activations; K a multiple of 64
//   smooth       (K), inverse_smooth (K)     fp32  smooth_factor and 1 / smooth_factor
//   packed_down  (R/16, K/32, 2, 32) x 16 B  h     proj_down: a lane's 16 bytes are 8 neighbouring channels of one rank
//   rank_scales  (R/16)                      fp32  16 ranks at 0 are skipped, their columns of `low` left as they are
//   codes, scales                                  as engine/reference/quantize_act.py's QuantizedAct lays them out
//   low          (M, R)                      fp32
//
// Work:   a block owns 16 whole rows; warp w takes channels 64 (w + i warps), i = 0, 1, ... A lane (4 g + q) holds, of rows g and
//         g + 8, channels 8q..8q+7 of each 32: 16-byte loads, and A fragments of mma if k is counted in the order lanes hold it.
// Memory: each lane copies its own x ahead of time into its own places in shared memory, DEPTH steps of 64 channels. Where a
//         format needs the row first (e4m3's maximum, LayerNorm's moments) the host may let all of x stay there (`keep`), else
//         it is read again, mostly from L2. No lane ever reads another lane's x, so no barrier is needed.
// Order:  a warp adds its channels in order, then warps are added in order: a function of K alone, never of M or R.
// Ranks:  the first RANKS ranks ride on the pass that quantizes, every further RANKS cost one more pass over x.
#pragma once

#include "common/codes.cuh"
#include "common/cp_async.cuh"
#include "common/float_codes.cuh"
#include "common/mma.cuh"

#ifndef SLICES
#define SLICES 2  // of 16 ranks, in one pass
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif
constexpr int ROWS = 16;  // of a block
constexpr int STEP = 64;  // channels that a warp takes at a time
#ifndef MOST_WARPS
#define MOST_WARPS 8
#endif
constexpr int PIECES = 4;  // of 16 bytes, of a lane, in one step: 2 x 32 channels of 2 rows
constexpr float LAYER_NORM_EPS = 1e-6f;
#ifndef DEPTH
#if __CUDA_ARCH__ >= 800
#define DEPTH 2  // steps on their way, a power of 2
#else
#define DEPTH 1
#endif
#endif

struct RowsToQuantize {
  const h_t* x;
  const h_t *shift, *scale;  // (K) of the modulation; null without one
  const float *smooth, *inverse_smooth;
  const uint4* packed_down;
  const float* rank_scales;
  u8* codes;
  void* scales;
  float* low;
  int m, k, rank, keep;
  float input_shift;  // of uint4
};

// What every kernel takes after x (and shift and scale), and how it hands them on.
#define TARGET_PARAMETERS                                                                                            \
  const float *smooth, const float *inverse_smooth, const uint4 *packed_down, const float *rank_scales, u8 *codes,   \
      void *scales, float *low, int m, int k, int rank, int keep, float input_shift
#define TARGET_ARGUMENTS smooth, inverse_smooth, packed_down, rank_scales, codes, scales, low, m, k, rank, keep, input_shift

// One lane's channels in one step: piece[block][half] are channels 32 block + 8q .. + 7 of row g + 8 half.
struct Step {
  uint4 piece[2][2];
};

__device__ __forceinline__ u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

struct Place {
  int warp, warps, g, q, lane, row0, steps;
  const h_t* x;     // this lane's first element
  uint4* own;       // this lane's first place in shared memory
  float* exchange;  // for numbers that warps tell each other: warps x 16 rows x 32 fp32

  __device__ __forceinline__ int channel(int step) const { return (step * warps + warp) * STEP; }
};

// Calls body(channel, step) for this warp's channels, in order. `fresh`: x comes from memory; else it is where it was kept.
template <class Body>
__device__ __forceinline__ void walk(const RowsToQuantize& r, const Place& p, bool fresh, Body body) {
  const auto slot = [&](int i) { return p.own + (r.keep ? i : i & (DEPTH - 1)) * (PIECES * 32); };
  const auto fetch = [&](int i) {
    if (i < p.steps) {
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        const int half = piece & 1, block = piece >> 1;
        cp_async16(slot(i) + piece * 32, p.x + (size_t)(8 * half) * r.k + p.channel(i) + 32 * block,
                   p.row0 + p.g + 8 * half < r.m);
      }
    }
    cp_async_commit();
  };
  if (fresh) {
    for (int i = 0; i < DEPTH; ++i) fetch(i);
  }
  for (int i = 0; i < p.steps; ++i) {
    if (fresh) cp_async_wait<DEPTH - 1>();
    uint4* const at = slot(i);
    Step step;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) step.piece[piece >> 1][piece & 1] = at[piece * 32];
    if (fresh) fetch(i + DEPTH);
    body(p.channel(i), step, at);
  }
}

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// ------------------------------------------------------------------------------------------------ LayerNorm

// Mean and sum of squared distances from it, merged pairwise (Chan et al. 1979): as good as two passes.
struct Moments {
  float count, mean, m2;

  __device__ __forceinline__ void merge(float other_count, float other_mean, float other_m2) {
    const float total = count + other_count, share = other_count / total, delta = other_mean - mean;
    mean = fmaf(delta, share, mean);
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
};

struct Norm {
  float mean[2], inverse_deviation[2];  // of rows g and g + 8
};

__device__ __forceinline__ Norm layer_norm_of_rows(const RowsToQuantize& r, const Place& p) {
  Moments moments[2] = {};
  walk(r, p, true, [&](int, const Step& step, uint4*) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 x[8];
      float sum = 0.0f, m2 = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i] = unpack_h2(word_of(step.piece[i / 4][half], i % 4));
        sum += x[i].x + x[i].y;
      }
      const float mean = sum * (1.0f / 16.0f);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        m2 = fmaf(x[i].x - mean, x[i].x - mean, m2);
        m2 = fmaf(x[i].y - mean, x[i].y - mean, m2);
      }
      moments[half].merge(16.0f, mean, m2);
    }
  });
  float2* const told = reinterpret_cast<float2*>(p.exchange);  // (warps, 16)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (p.steps == 0) break;
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {  // commutative, so that all lanes of a quad agree to the bit
      const float mean = __shfl_xor_sync(0xffffffffu, moments[half].mean, other);
      const float delta = mean - moments[half].mean;
      moments[half].m2 += __shfl_xor_sync(0xffffffffu, moments[half].m2, other);
      moments[half].m2 = fmaf(delta * delta, moments[half].count * 0.5f, moments[half].m2);
      moments[half].mean = 0.5f * (moments[half].mean + mean);
      moments[half].count *= 2.0f;
    }
    if (p.q == 0) told[p.warp * ROWS + p.g + 8 * half] = make_float2(moments[half].mean, moments[half].m2);
  }
  __syncthreads();
  Norm norm;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Moments all = {};
    for (int warp = 0; warp < p.warps; ++warp) {
      const int steps = (r.k / STEP - warp + p.warps - 1) / p.warps;
      const float2 part = told[warp * ROWS + p.g + 8 * half];
      all.merge((float)(steps * STEP), part.x, part.y);
    }
    norm.mean[half] = all.mean;
    norm.inverse_deviation[half] = rsqrtf(all.m2 / (float)r.k + LAYER_NORM_EPS);
  }
  __syncthreads();
  return norm;
}

__device__ __forceinline__ void modulate(const RowsToQuantize& r, const Place& p, const Norm& norm, int channel, Step& step) {
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int column = channel + 32 * block + 8 * p.q;
    const uint4 scale = __ldg(reinterpret_cast<const uint4*>(r.scale + column));
    const uint4 shift = __ldg(reinterpret_cast<const uint4*>(r.shift + column));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack_h2(word_of(step.piece[block][half], i));
        const float2 s = unpack_h2(word_of(scale, i)), b = unpack_h2(word_of(shift, i));
        y[i] = pack_h2(fmaf((v.x - norm.mean[half]) * norm.inverse_deviation[half], s.x, b.x),
                       fmaf((v.y - norm.mean[half]) * norm.inverse_deviation[half], s.y, b.y));
      }
      step.piece[block][half] = make_uint4(y[0], y[1], y[2], y[3]);
    }
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
  float tile[SLICES][2][4];  // C fragments of 8 ranks each
};

__device__ __forceinline__ void project_down(const RowsToQuantize& r, const Place& p, int first, u32 active, int channel,
                                             const Step& step, LowSums& sums) {
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) {
    if (!(active >> slice & 1)) continue;
    const uint4* const down = r.packed_down + ((size_t)(first + slice) * (r.k / 32) + channel / 32) * 64 + p.lane;
    uint4 b[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i >> 1][i & 1] = __ldg(down + 32 * i);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint4 &top = step.piece[block][0], &bottom = step.piece[block][1];
      const u32 first_16[4] = {top.x, bottom.x, top.y, bottom.y}, second_16[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        mma_h_k16(sums.tile[slice][tile], first_16, b[block][tile].x, b[block][tile].y);
        mma_h_k16(sums.tile[slice][tile], second_16, b[block][tile].z, b[block][tile].w);
      }
    }
  }
}

// Adds the warps' sums in order and stores them, 32 ranks at a time.
__device__ __forceinline__ void store_low(const RowsToQuantize& r, const Place& p, int first, u32 active, const LowSums& sums) {
#pragma unroll
  for (int pair = 0; pair < (SLICES + 1) / 2; ++pair) {
    if (!(active >> (2 * pair) & 3)) continue;
    __syncthreads();
#pragma unroll
    for (int column = 0; column < 32; column += 8) {
      const int slice = 2 * pair + column / 16;
      if (slice >= SLICES) continue;
      const float(&c)[4] = sums.tile[slice][column / 8 % 2];
      const int place = (column ^ 8 * (p.g & 3)) + 2 * p.q;  // rows would share banks otherwise
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const row = p.exchange + (p.warp * ROWS + p.g + 8 * half) * 32;
        *reinterpret_cast<float2*>(row + place) = make_float2(c[2 * half], c[2 * half + 1]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * 16; i += blockDim.x) {
      const int row = i / 16, column = i % 16 * 2, slice = 2 * pair + column / 16;
      if (p.row0 + row >= r.m || !(active >> slice & 1)) continue;
      float2 sum = make_float2(0.0f, 0.0f);
      for (int warp = 0; warp < p.warps; ++warp) {
        const float* const from = p.exchange + (warp * ROWS + row) * 32 + (column ^ 8 * (row & 3));
        sum.x += from[0];
        sum.y += from[1];
      }
      float* const to = r.low + (size_t)(p.row0 + row) * r.rank + (first + 2 * pair) * 16 + column;
      *reinterpret_cast<float2*>(to) = sum;
    }
  }
}

// -------------------------------------------------------------------------------------------------- quantize

// (x + shift) / c of 8 channels, and the largest magnitude.
template <int FORMAT>
__device__ __forceinline__ float smoothed(const RowsToQuantize& r, int column, const uint4& piece, float (&v)[8]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 c = __ldg(reinterpret_cast<const float4*>(r.smooth + column + i));
    const float4 inverse = __ldg(reinterpret_cast<const float4*>(r.inverse_smooth + column + i));
    float2 low = unpack_h2(word_of(piece, i / 2)), high = unpack_h2(word_of(piece, i / 2 + 1));
    if constexpr (FORMAT == FORMAT_UINT4) {
      low.x += r.input_shift, low.y += r.input_shift, high.x += r.input_shift, high.y += r.input_shift;
    }
    v[i] = divide(low.x, c.x, inverse.x);
    v[i + 1] = divide(low.y, c.y, inverse.y);
    v[i + 2] = divide(high.x, c.z, inverse.z);
    v[i + 3] = divide(high.y, c.w, inverse.w);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[i]));
  return largest;
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
    const float t = v[i] * inverse_scale;
    word = word * 16 + __float_as_uint((SIGNED ? t : fmaxf(t, 0.0f)) + magic);
  }
  return SIGNED ? (word - above) ^ 0x88888888u : word - above;
}

// The two words of a row, each 8 codes of 32 channels: lanes trade so that a quad stores 32 neighbouring bytes.
__device__ __forceinline__ void store_nibbles(const RowsToQuantize& r, const Place& p, int channel, int row, u32 first, u32 second) {
  const bool odd = p.q & 1;
  const u32 other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  if (row >= r.m) return;
  u8* const to = r.codes + (size_t)row * (r.k / 2) + channel / 2 + (odd ? 16 : 0) + (p.q >> 1) * 8;
  *reinterpret_cast<uint2*>(to) = odd ? make_uint2(other, second) : make_uint2(first, other);
}

// All of a step but for e4m3, whose scale is of the whole row.
template <int FORMAT>
__device__ __forceinline__ void quantize_step(const RowsToQuantize& r, const Place& p, int channel, const Step& step) {
  const int column = channel + 8 * p.q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = p.row0 + p.g + 8 * half;
    float v[2][8];
    const float first = smoothed<FORMAT>(r, column, step.piece[0][half], v[0]);
    const float second = smoothed<FORMAT>(r, column + 32, step.piece[1][half], v[1]);
    if constexpr (FORMAT == FORMAT_INT4 || FORMAT == FORMAT_UINT4) {
      const float scale = quad_max(fmaxf(first, second)) * (1.0f / (FORMAT == FORMAT_INT4 ? INT4_MAX : UINT4_MAX));
      const float inverse = reciprocal_of_scale(scale);
      if (p.q == 0 && row < r.m) reinterpret_cast<float*>(r.scales)[(size_t)(channel / STEP) * r.m + row] = scale;
      store_nibbles(r, p, channel, row, int4_word<FORMAT>(v[0], inverse), int4_word<FORMAT>(v[1], inverse));
    } else if constexpr (FORMAT == FORMAT_NVFP4) {
      const float largest[2] = {first, second};
      u32 words[2], bytes = 0;
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const float group = fmaxf(largest[block], __shfl_xor_sync(0xffffffffu, largest[block], 1));
        const float exact = fminf(group * (1.0f / E2M1_MAX), E4M3_MAX);
        const u32 stored = e4m3_pair(exact, 0.0f) & 255;
        const float inverse = reciprocal_of_scale(e4m3_value(stored));
        bytes |= stored << (16 * block + 8 * (p.q >> 1));
        words[block] = 0;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          words[block] |= e2m1_pair(v[block][i] * inverse, v[block][i + 1] * inverse) << (4 * i);
        }
      }
      bytes |= __shfl_xor_sync(0xffffffffu, bytes, 2);
      if (p.q == 0 && row < r.m) {
        *reinterpret_cast<u32*>(reinterpret_cast<u8*>(r.scales) + (size_t)row * (r.k / 16) + channel / 16) = bytes;
      }
      store_nibbles(r, p, channel, row, words[0], words[1]);
    } else {
      if (row >= r.m) continue;
      uint4* const to = reinterpret_cast<uint4*>(reinterpret_cast<h_t*>(r.codes) + (size_t)row * r.k + column);
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const float(&w)[8] = v[block];
        to[4 * block] = make_uint4(pack_h2(w[0], w[1]), pack_h2(w[2], w[3]), pack_h2(w[4], w[5]), pack_h2(w[6], w[7]));
      }
    }
  }
}

__device__ __forceinline__ void e4m3_step(const RowsToQuantize& r, const Place& p, int channel, const Step& step,
                                          const float (&inverse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = p.row0 + p.g + 8 * half;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int column = channel + 32 * block + 8 * p.q;
      float v[8];
      smoothed<FORMAT_E4M3>(r, column, step.piece[block][half], v);
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = e4m3_pair(v[2 * i] * inverse[half], v[2 * i + 1] * inverse[half]);
      if (row < r.m) {
        *reinterpret_cast<uint2*>(r.codes + (size_t)row * r.k + column) =
            make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
      }
    }
  }
}

// The largest magnitudes of rows g and g + 8, of which this lane saw `largest`, become scales; returns their reciprocals.
__device__ __forceinline__ void e4m3_scales(const RowsToQuantize& r, const Place& p, const float (&largest)[2], float (&inverse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float of_warp = quad_max(largest[half]);
    if (p.q == 0) p.exchange[p.warp * ROWS + p.g + 8 * half] = of_warp;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float of_row = 0.0f;
    for (int warp = 0; warp < p.warps; ++warp) of_row = fmaxf(of_row, p.exchange[warp * ROWS + p.g + 8 * half]);
    const float scale = of_row * (1.0f / E4M3_MAX);
    const int row = p.row0 + p.g + 8 * half;
    if (p.warp == 0 && p.q == 0 && row < r.m) reinterpret_cast<float*>(r.scales)[row] = scale;
    inverse[half] = reciprocal_of_scale(scale);
  }
}

// ------------------------------------------------------------------------------------------------------- all

template <int FORMAT, bool MODULATE>
__device__ __forceinline__ void quantize_rows(const RowsToQuantize& r) {
  extern __shared__ uint4 shared[];
  Place p;
  p.warp = threadIdx.x / 32, p.warps = blockDim.x / 32, p.lane = threadIdx.x % 32, p.g = p.lane / 4, p.q = p.lane % 4;
  p.row0 = blockIdx.x * ROWS;
  p.steps = (r.k / STEP - p.warp + p.warps - 1) / p.warps;
  const int slots = r.keep ? (r.k / STEP + p.warps - 1) / p.warps : DEPTH;
  p.x = r.x + (size_t)(p.row0 + p.g) * r.k + 8 * p.q;
  p.own = shared + p.warp * slots * (PIECES * 32) + p.lane;
  p.exchange = reinterpret_cast<float*>(shared + p.warps * slots * (PIECES * 32));

  Norm norm;
  bool fresh = true;  // x, not y, has to come from memory
  if constexpr (MODULATE) {
    norm = layer_norm_of_rows(r, p);
    fresh = !r.keep;
  }

  u32 active = active_slices(r, 0);
  LowSums sums = {};
  float largest[2] = {};
  walk(r, p, fresh, [&](int channel, Step& step, uint4* at) {
    if constexpr (MODULATE) {
      modulate(r, p, norm, channel, step);
      if (r.keep) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) at[piece * 32] = step.piece[piece >> 1][piece & 1];
      }
    }
    project_down(r, p, 0, active, channel, step, sums);
    if constexpr (FORMAT == FORMAT_E4M3) {
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        float v[8];
        const int column = channel + 32 * (piece >> 1) + 8 * p.q;
        largest[piece & 1] =
            fmaxf(largest[piece & 1], smoothed<FORMAT>(r, column, step.piece[piece >> 1][piece & 1], v));
      }
    } else {
      quantize_step<FORMAT>(r, p, channel, step);
    }
  });
  fresh = !r.keep;
  if constexpr (FORMAT == FORMAT_E4M3) {
    float inverse[2];
    e4m3_scales(r, p, largest, inverse);
    walk(r, p, fresh, [&](int channel, Step& step, uint4*) {
      if constexpr (MODULATE) {
        if (fresh) modulate(r, p, norm, channel, step);
      }
      e4m3_step(r, p, channel, step, inverse);
    });
  }
  store_low(r, p, 0, active, sums);

  for (int first = SLICES; first < r.rank / 16; first += SLICES) {
    active = active_slices(r, first);
    if (active == 0) continue;
    sums = {};
    walk(r, p, fresh, [&](int channel, Step& step, uint4*) {
      if constexpr (MODULATE) {
        if (fresh) modulate(r, p, norm, channel, step);
      }
      project_down(r, p, first, active, channel, step, sums);
    });
    store_low(r, p, first, active, sums);
  }
}
