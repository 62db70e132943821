// svdq_linear.w4a8_sm90: e4m3 activations x 4-bit integer weights by wgmma, then everything that epilogue.cuh says.
//
//   act      (M, K)          uint8  e4m3, K a multiple of 64
//   ascales  (M)             fp32   one scale per row
//   weights  (N/128, K/128)  records (pack_w4a8_sm90 in engine/kernels/_arrange_w4a8.py), N filled up to 128, K to 256:
//              codes   (2, 8, 32, 4) words: group of 64 k, warp, lane, {rows g and g + 8 at k 0..31, then at k 32..63}
//              scales  (2, 64, 2): group, row, the row and the one 8 below
//   outer    (N to 128)      fp32   wtscale x wcscales and what e4m3.cuh asks for, per out channel
// Work:   a block makes tiles of 128 tokens x 128 channels, one after the other. Four warps bring activations (cp.async, zeros
//         below the last token) and weights (bulk copies) through a ring of stages of 128 in-channels. Two warpgroups have 64
//         channels each, as rows of A in registers: a group scale is then one number for a row of sums, and unpacked codes
//         never touch shared memory, whose bandwidth would be spent twice. A group's sums run in wgmma while those of the
//         group before are scaled. In the end the tile is turned through shared memory: 16 tokens x 128 channels a warp.
// Launch: grid up to one block per SM, block 384, shared memory sizeof(Shared).
// Limits: 168 registers (232 and 40 once the warps have shared them), 219232 bytes of shared memory
// Bound:  wgmma e4m3; the scaling is 64 FMAs a warp for two wgmmas.
// Truth:  engine/reference/svdq_linear.py
#include "common/cp_async.cuh"
#include "common/e4m3.cuh"
#include "common/epilogue.cuh"
#include "common/wgmma.cuh"

constexpr int TILE = 128;      // tokens, and channels
constexpr int STEP = 128;      // in-channels of a stage: two groups
constexpr int STAGES = 6;
constexpr int LAG = 3;         // stages that are on their way before the first is handed over; at most STAGES - 2
constexpr int CODE_BYTES = TILE * GROUP / 2;
constexpr int RECORD_BYTES = 2 * CODE_BYTES + 2 * TILE * SCALE_BYTES;
constexpr int LOADERS = 128;   // threads that load, behind those that compute
constexpr int WORKERS = 256;

struct Shared {
  u8 activations[STAGES][TILE * STEP];
  float turned[TILE][TILE];  // [token][channel], places exchanged by turned_column
  u8 weights[STAGES][RECORD_BYTES];
  u64 full[STAGES], empty[STAGES];
};

// A token's channels lie in eights that are exchanged by token: neither the writes along channels nor the reads along tokens
// meet in a bank.
__device__ __forceinline__ int turned_column(int token, int column) {
  return column ^ (((token & 3) ^ ((token >> 2) & 1)) << 3);
}

// Stages that a tile takes: two for every 256 in-channels begun.
__device__ __forceinline__ int padded_steps(int k) { return (k + 2 * STEP - 1) / (2 * STEP) * 2; }

struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void load_tiles(Shared& shared, const u8* act, const u8* weights, int m, int n, int k) {
  const int thread = threadIdx.x - WORKERS, warp_leader = (thread & 31) == 0;
  const int chunk = thread & 7, row = thread >> 3;  // 16 bytes of k; rows 16 apart
  const int steps = padded_steps(k), columns = (n + TILE - 1) / TILE, tiles = columns * ((m + TILE - 1) / TILE);
  const int place = row * STEP + ((chunk ^ (row & 7)) << 4);
  Ring ring, loaded;
  int waiting = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int row0 = tile / columns * TILE + row;
    const u8* from = act + size_t(row0) * k + 16 * chunk;
    const u8* record = weights + size_t(tile % columns) * steps * RECORD_BYTES;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      if (thread == 0) {
        barrier_expect(&shared.full[ring.stage], RECORD_BYTES);
        bulk_copy(shared.weights[ring.stage], record + size_t(step) * RECORD_BYTES, RECORD_BYTES,
                  &shared.full[ring.stage]);
      }
      const bool inside = step * STEP + 16 * chunk < k;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool valid = inside && row0 + 16 * i < m;
        cp_async16(&shared.activations[ring.stage][place + 16 * i * STEP],
                   valid ? from + size_t(16 * i) * k + step * STEP : act, valid);
      }
      cp_async_commit();
      ring.next();
      if (waiting < LAG) {
        ++waiting;
        continue;
      }
      cp_async_wait<LAG>();
      fence_async_proxy();
      __syncwarp();
      if (warp_leader) barrier_arrive(&shared.full[loaded.stage]);
      loaded.next();
    }
  }
  cp_async_wait<0>();
  fence_async_proxy();
  __syncwarp();
  for (; waiting > 0; --waiting, loaded.next())
    if (warp_leader) barrier_arrive(&shared.full[loaded.stage]);
}

// A stage as the warpgroups see it; i: which of its two groups.
struct Stage {
  const u8* record;
  u64 activations;
  u64 *full, *empty;
  u32 parity;

  __device__ __forceinline__ Stage(Shared& shared, Ring& ring)
      : record(shared.weights[ring.stage]),
        activations(describe_rows_of_128_bytes(shared.activations[ring.stage])),
        full(&shared.full[ring.stage]),
        empty(&shared.empty[ring.stage]),
        parity(ring.parity) {
    ring.next();
  }

  // sums = codes of 64 channels x 128 tokens, running on.
  __device__ __forceinline__ void start(float (&sums)[16][4], int i) const {
    const uint4 words = *reinterpret_cast<const uint4*>(record + i * CODE_BYTES + threadIdx.x * 16);
    const u32 first[4] = {first_four(words.x), first_four(words.y), second_four(words.x), second_four(words.y)};
    const u32 second[4] = {first_four(words.z), first_four(words.w), second_four(words.z), second_four(words.w)};
    wgmma_fence();
    wgmma_e4m3<false>(sums, first, activations + 4 * i);
    wgmma_e4m3<true>(sums, second, activations + 4 * i + 2);
    wgmma_commit();
  }

  // Of rows g and g + 8.
  __device__ __forceinline__ float2 scales(int i) const {
    return scale_pair(record + 2 * CODE_BYTES + (i * TILE + threadIdx.x / 4 * 2) * SCALE_BYTES);
  }

  __device__ __forceinline__ void give_back() const {
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty);
  }
};

__device__ __forceinline__ void add_scaled(float (&acc)[16][4], const float (&sums)[16][4], float2 scale) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    acc[j][0] = fmaf(sums[j][0], scale.x, acc[j][0]);
    acc[j][1] = fmaf(sums[j][1], scale.x, acc[j][1]);
    acc[j][2] = fmaf(sums[j][2], scale.y, acc[j][2]);
    acc[j][3] = fmaf(sums[j][3], scale.y, acc[j][3]);
  }
}

// One group's sums run in wgmma while those of the group before are scaled. Nothing runs on from one round of the loop into the
// next: ptxas would then wait after every wgmma.
__device__ __forceinline__ void multiply(float (&acc)[16][4], Shared& shared, Ring& ring, int steps) {
  float even[16][4] = {}, odd[16][4] = {};
  for (int step = 0; step < steps; step += 2) {
    const Stage first(shared, ring), second(shared, ring);
    barrier_wait(first.full, first.parity);
    first.start(even, 0);
    first.start(odd, 1);
    wgmma_wait<1>(even);
    add_scaled(acc, even, first.scales(0));
    barrier_wait(second.full, second.parity);
    second.start(even, 0);
    const float2 first_odd = first.scales(1), second_odd = second.scales(1);
    wgmma_wait<1>(odd);
    first.give_back();
    add_scaled(acc, odd, first_odd);
    second.start(odd, 1);
    wgmma_wait<1>(even);
    add_scaled(acc, even, second.scales(0));
    wgmma_wait<0>(odd);
    second.give_back();
    add_scaled(acc, odd, second_odd);
  }
}

// acc: [channel][token] as wgmma leaves it -> [token][channel] as finish_rows wants it, each channel times its outer scale.
__device__ __forceinline__ void turn(float (&acc)[16][4], Shared& shared, const float* outer) {
  const int warp = threadIdx.x / 32, g = lane_id() / 4, q = lane_id() & 3;
  const int channel = 16 * warp + g;
  const float outer_g = outer[channel], outer_g8 = outer[channel + 8];
  named_barrier<1>(WORKERS);  // the tile before has been read
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * j + 2 * q + i;
      shared.turned[token][turned_column(token, channel)] = acc[j][i] * outer_g;
      shared.turned[token][turned_column(token, channel + 8)] = acc[j][i + 2] * outer_g8;
    }
  named_barrier<1>(WORKERS);
  const float(*tokens)[TILE] = &shared.turned[16 * warp + g];
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int column = turned_column(g, 8 * j + 2 * q);
    const float2 above = *reinterpret_cast<const float2*>(&tokens[0][column]);
    const float2 below = *reinterpret_cast<const float2*>(&tokens[8][column]);
    acc[j][0] = above.x, acc[j][1] = above.y, acc[j][2] = below.x, acc[j][3] = below.y;
  }
}

__device__ __forceinline__ void compute_tiles(Shared& shared, const float* ascales, const float* outer, int k,
                                              const Epilogue& e) {
  const int steps = padded_steps(k), columns = (e.n + TILE - 1) / TILE, tiles = columns * ((e.m + TILE - 1) / TILE);
  Ring ring;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int row0 = tile / columns * TILE + threadIdx.x / 32 * 16, col0 = tile % columns * TILE;
    float acc[16][4] = {};
    multiply(acc, shared, ring, steps);
    turn(acc, shared, outer + col0);
    const int row = row0 + lane_id() / 4;
    const float above = ascales[min(row, e.m - 1)], below = ascales[min(row + 8, e.m - 1)];
#pragma unroll
    for (int j = 0; j < 16; ++j) acc[j][0] *= above, acc[j][1] *= above, acc[j][2] *= below, acc[j][3] *= below;
    finish_rows(acc, row0, col0, e);
  }
}

extern "C" __global__ __launch_bounds__(WORKERS + LOADERS, 1) void svdq_linear(
    const u8* act, const float* ascales, const u8* weights, const float* outer, int k, EPILOGUE_PARAMETERS) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&shared.full[i], LOADERS / 32 + 1);
      barrier_init(&shared.empty[i], WORKERS / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= WORKERS) {
    give_registers<40>();
    load_tiles(shared, act, weights, m, n, k);
  } else {
    take_registers<232>();
    const Epilogue e = {EPILOGUE_ARGUMENTS};
    compute_tiles(shared, ascales, outer, k, e);
  }
}
