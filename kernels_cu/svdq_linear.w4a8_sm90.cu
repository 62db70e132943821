// svdq_linear.w4a8_sm90: e4m3 activations x 4-bit integer weights by wgmma, then everything that epilogue.cuh says.
//
//   act      (M, K)          uint8  e4m3, K a multiple of 64
//   ascales  (M)             fp32   one scale per row
//   weights  (N/128, K/128)  records (pack_w4a8_sm90 in engine/kernels/_arrange_w4a8.py), N filled up to 128, K to 256:
//              codes   (2, 8, 32, 4) words: group of 64 k, warp, lane, {rows g and g + 8 at k 0..31, then at k 32..63}
//              scales  (2, 64, 2): group, row, the row and the one 8 below
//   outer    (N to 128)      fp32   wtscale x wcscales and what e4m3.cuh asks for, per out channel
// Work:   a block makes tiles of 128 tokens x 128 channels, one after the other. Four warps bring activations (cp.async,
//         zeros below the last token) and weights (bulk copies) through a ring of stages of 128 in-channels. Two
//         warpgroups have 64 channels each, as rows of A in registers: a group scale is then one number for a row of
//         sums, and unpacked codes never touch shared memory, whose bandwidth would be spent twice. The two take turns:
//         while one's sums run in wgmma the other scales its own into the accumulators. In the end the tile is turned
//         through shared memory: 16 tokens x 128 channels a warp.
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

// A token's channels lie in eights that are exchanged by token: neither the writes along channels nor the reads along
// tokens meet in a bank.
__device__ __forceinline__ int turned_column(int token, int column) {
  return column ^ (((token & 3) ^ ((token >> 2) & 1)) << 3);
}

// Stages that a tile takes: two for every 256 in-channels begun.
__device__ __forceinline__ int padded_steps(int k) { return (k + 2 * STEP - 1) / (2 * STEP) * 2; }

// Twelve rows of tiles at a time, column after column: the blocks that run together share few tokens and few channels.
struct Tiles {
  static constexpr int TOGETHER = 12;
  int rows, columns;

  __device__ __forceinline__ Tiles(int m, int n) : rows((m + TILE - 1) / TILE), columns((n + TILE - 1) / TILE) {}
  __device__ __forceinline__ int count() const { return rows * columns; }
  __device__ __forceinline__ int2 corner(int tile) const {  // first token, first channel
    const int band = tile / (TOGETHER * columns), inside = tile % (TOGETHER * columns);
    const int high = min(TOGETHER, rows - band * TOGETHER);
    return make_int2((band * TOGETHER + inside % high) * TILE, inside / high * TILE);
  }
};

struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void load_tiles(Shared& shared, const u8* act, const u8* weights, int m, int n, int k) {
  const int thread = threadIdx.x - WORKERS;
  const int chunk = thread & 7, row = thread >> 3;  // 16 bytes of k; rows 16 apart
  const int place = row * STEP + ((chunk ^ (row & 7)) << 4);
  const Tiles tiles(m, n);
  const int steps = padded_steps(k);
  Ring ring;
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const int2 corner = tiles.corner(tile);
    const int row0 = corner.x + row;
    const u8* from = act + size_t(row0) * k + 16 * chunk;
    const u8* record = weights + size_t(corner.y / TILE) * steps * RECORD_BYTES;
    for (int step = 0; step < steps; ++step, ring.next()) {
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
      barrier_arrive_after_copies(&shared.full[ring.stage]);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

// What a lane multiplies in one group of 64 in-channels: A of two wgmmas, the scales of rows g and g + 8.
struct Fragments {
  u32 a[2][4];
  float2 scale;

  __device__ __forceinline__ Fragments(const u8* record, int group) {
    const uint4 w = *reinterpret_cast<const uint4*>(record + group * CODE_BYTES + threadIdx.x * 16);
    a[0][0] = first_four(w.x), a[0][1] = first_four(w.y), a[0][2] = second_four(w.x), a[0][3] = second_four(w.y);
    a[1][0] = first_four(w.z), a[1][1] = first_four(w.w), a[1][2] = second_four(w.z), a[1][3] = second_four(w.w);
    scale = scale_pair(record + 2 * CODE_BYTES + (group * TILE + threadIdx.x / 4 * 2) * SCALE_BYTES);
  }

  // sums = codes of 64 channels x 128 tokens, running on.
  __device__ __forceinline__ void start(float (&sums)[16][4], u64 activations) const {
    wgmma_e4m3<false>(sums, a[0], activations);
    wgmma_e4m3<true>(sums, a[1], activations + 2);
    wgmma_commit();
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

// The warpgroups' turns in wgmma: named barriers FIRST_TURN and, of the second warpgroup, the one behind it.
constexpr int FIRST_TURN = 2;

__device__ __forceinline__ void multiply(float (&acc)[16][4], Shared& shared, Ring& ring, int steps) {
  const int turn = FIRST_TURN + threadIdx.x / 128, next_turn = 2 * FIRST_TURN + 1 - turn;
  float even[16][4] = {}, odd[16][4] = {};
  for (int step = 0; step < steps; ++step, ring.next()) {
    barrier_wait(&shared.full[ring.stage], ring.parity);
    fence_async_proxy();  // wgmma reads what cp.async wrote
    const Fragments first(shared.weights[ring.stage], 0), second(shared.weights[ring.stage], 1);
    const u64 activations = describe_rows_of_128_bytes(shared.activations[ring.stage]);
    named_barrier(turn, WORKERS);
    wgmma_fence();
    first.start(even, activations);
    second.start(odd, activations + 4);
    named_barrier_arrive(next_turn, WORKERS);
    wgmma_wait<1>(even);
    add_scaled(acc, even, first.scale);
    wgmma_wait<0>(odd);
    if (lane_id() == 0) barrier_arrive(&shared.empty[ring.stage]);
    add_scaled(acc, odd, second.scale);
  }
}

// acc: [channel][token] as wgmma leaves it -> [token][channel] as finish_rows wants it, times the channels' outer scales.
__device__ __forceinline__ void turn(float (&acc)[16][4], Shared& shared, const float* outer) {
  const int warp = threadIdx.x / 32, g = lane_id() / 4, q = lane_id() & 3;
  const int channel = 16 * warp + g;
  const float outer_g = outer[channel], outer_g8 = outer[channel + 8];
  named_barrier(1, WORKERS);  // the tile before has been read
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * j + 2 * q + i;
      shared.turned[token][turned_column(token, channel)] = acc[j][i] * outer_g;
      shared.turned[token][turned_column(token, channel + 8)] = acc[j][i + 2] * outer_g8;
    }
  named_barrier(1, WORKERS);
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
  const Tiles tiles(e.m, e.n);
  Ring ring;
  if (threadIdx.x >= 128) named_barrier_arrive(FIRST_TURN, WORKERS);  // the first warpgroup begins
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const int2 corner = tiles.corner(tile);
    const int row0 = corner.x + threadIdx.x / 32 * 16, col0 = corner.y;
    float acc[16][4] = {};
    multiply(acc, shared, ring, padded_steps(k));
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
      barrier_init(&shared.full[i], LOADERS + 1);
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
