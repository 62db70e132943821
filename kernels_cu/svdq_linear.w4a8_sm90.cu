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
//         while one's sums run in wgmma the other scales its own into the accumulators. Behind a tile's in-channels the
//         ring brings what its end reads, so that no one waits for it: scales, bias, the low-rank branch, which is one
//         more wgmma, and what the next linear wants. Last the tile is turned through shared memory: 16 tokens x 128
//         channels a warp, as h already where the end takes numbers one by one.
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
constexpr int SLICE_BYTES = TILE * 16 * 2;  // proj_up or proj_down of a tile and a slice of 16 ranks

// A stage behind the in-channels: this in the place of activations, proj_up of the slices in that of weights.
struct Tail {
  static constexpr int SLICES = 2;
  u8 low[TILE * SLICES * 32];  // h(low * scale), a token's 32 ranks a row; zeros for a slice that is not there
  float ascales[TILE], bias[TILE], outer[TILE];
  int slices;  // that are there; where there are more of them another stage follows
  bool more;
};
static_assert(sizeof(Tail) <= TILE * STEP && Tail::SLICES * SLICE_BYTES <= RECORD_BYTES, "a stage holds it");

#if EPILOGUE == GELU_QUANTIZE
// A stage behind those, for the next linear: this in the place of weights, its factors in that of activations.
struct Next {
  static constexpr int SLICES = 4;
  float smooth[TILE], inverse[TILE];
  int slice[SLICES], slices;
  bool more;
};
static_assert(sizeof(Next) <= RECORD_BYTES && Next::SLICES * SLICE_BYTES <= TILE * STEP, "a stage holds it");
#endif

struct Shared {
  u8 activations[STAGES][TILE * STEP];
  union {
    float turned[TILE][TILE];  // [token][channel], places exchanged by turned_column
    struct {
      u8 rounded[TILE][2 * TILE];   // [token][channel] h, places exchanged by turned_chunk
      long long kept[16][WORKERS];  // KeptLow's
    };
  };
  u8 weights[STAGES][RECORD_BYTES];
  u64 full[STAGES], empty[STAGES];
};

// A token's channels lie in eights and fours that are exchanged by token: neither the writes along channels nor the
// reads along tokens meet in a bank.
__device__ __forceinline__ int turned_column(int token, int column) {
  return column ^ (((token & 3) ^ (token >> 2 & 1)) << 3 | (token & 1) << 2);
}

// The same for h: the place of 16 bytes.
__device__ __forceinline__ int turned_chunk(int token, int chunk) {
  return chunk ^ ((token & 1) << 2 | (token >> 1 & 3));
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

// The first slice of 16 ranks from s on that is not silent.
__device__ __forceinline__ int next_slice(const float* rank_scales, int rank, int s) {
  while (s < rank / 16 && rank_scales[s] == 0.0f) ++s;
  return s;
}

__device__ __forceinline__ void load_tail(Shared& shared, Ring& ring, const float* ascales, const float* outer,
                                          int2 corner, const Epilogue& e) {
  const int thread = threadIdx.x - WORKERS, row = min(corner.x + thread, e.m - 1), column = corner.y + thread;
  const int slices = e.rank / 16;
  int slice = next_slice(e.rank_scales, e.rank, 0);
  u32 low[8];  // of a token and the slice
  const auto load_low = [&] {
    const float scale = slice < slices ? e.rank_scales[slice] : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i] = slice < slices ? scaled_low(e, row, 16 * slice + 2 * i, scale) : 0;
  };
  load_low();  // ahead of the wait
  const float ascale = ascales[row], outer_scale = outer[column];
  const float bias = e.bias != nullptr && column < e.n ? e.bias[column] : 0.0f;
  do {
    u64* full = &shared.full[ring.stage];
    barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    Tail& tail = *reinterpret_cast<Tail*>(shared.activations[ring.stage]);
    tail.ascales[thread] = ascale, tail.bias[thread] = bias, tail.outer[thread] = outer_scale;
    int filled = 0;
#pragma unroll
    for (int s = 0; s < Tail::SLICES; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = (2 * s + half) ^ (thread / 2 & 3);
        *reinterpret_cast<uint4*>(tail.low + 64 * thread + 16 * chunk) =
            make_uint4(low[4 * half], low[4 * half + 1], low[4 * half + 2], low[4 * half + 3]);
      }
      if (slice == slices) continue;
      if (thread == 0)
        bulk_copy(shared.weights[ring.stage] + s * SLICE_BYTES,
                  e.proj_up + (size_t(corner.y / TILE) * slices + slice) * (SLICE_BYTES / 16), SLICE_BYTES, full);
      ++filled;
      slice = next_slice(e.rank_scales, e.rank, slice + 1);
      load_low();
    }
    if (thread == 0) {
      tail.slices = filled, tail.more = slice < slices;
      barrier_expect(full, filled * SLICE_BYTES);
    }
    barrier_arrive(full);
    ring.next();
  } while (slice < slices);
}

#if EPILOGUE == GELU_QUANTIZE
__device__ __forceinline__ void load_next(Shared& shared, Ring& ring, int col0, const Epilogue& e) {
  const int slices = e.next_rank / 16, columns = min(TILE, e.n - col0);
  int slice = next_slice(e.next_rank_scales, e.next_rank, 0);
  do {
    u64* full = &shared.full[ring.stage];
    barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    Next& next = *reinterpret_cast<Next*>(shared.weights[ring.stage]);
    const bool first = threadIdx.x == WORKERS;
    int filled = 0;
    for (; filled < Next::SLICES && slice < slices; ++filled) {
      if (first) {
        next.slice[filled] = slice;
        bulk_copy(shared.activations[ring.stage] + filled * SLICE_BYTES,
                  e.next_down + (size_t(slice) * e.n + col0) * 2, columns * 32, full);
      }
      slice = next_slice(e.next_rank_scales, e.next_rank, slice + 1);
    }
    if (first) {
      bulk_copy(next.smooth, e.smooth + col0, columns * 4, full);
      bulk_copy(next.inverse, e.inverse + col0, columns * 4, full);
      next.slices = filled, next.more = slice < slices;
      barrier_expect(full, columns * (32 * filled + 8));
    }
    barrier_arrive(full);
    ring.next();
  } while (slice < slices);
}
#endif

__device__ __forceinline__ void load_tiles(Shared& shared, const u8* act, const u8* weights, const float* ascales,
                                           const float* outer, int k, const Epilogue& e) {
  const int m = e.m, n = e.n;
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
      const u8* at = from + step * STEP;
#pragma unroll
      for (int i = 0; i < 8; ++i, at += 16 * k) {
        const bool valid = inside && row0 + 16 * i < m;
        cp_async16(&shared.activations[ring.stage][place + 16 * i * STEP], valid ? at : act, valid);
      }
      barrier_arrive_after_copies(&shared.full[ring.stage]);
    }
    load_tail(shared, ring, ascales, outer, corner, e);
#if EPILOGUE == GELU_QUANTIZE
    load_next(shared, ring, corner.y, e);
#endif
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
    __syncwarp();  // the compiler then unpacks ahead of the barrier, too, not in this warpgroup's turn
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

// acc = acc * scales of token and channel + bias + h(low * scale) @ proj_up^T
__device__ __forceinline__ void add_tail(float (&acc)[16][4], Shared& shared, Ring& ring) {
  const int channel = threadIdx.x / 32 * 16 + lane_id() / 4, token = 2 * (lane_id() & 3);
  bool first = true, more;
  do {
    barrier_wait(&shared.full[ring.stage], ring.parity);
    fence_async_proxy();
    const Tail& tail = *reinterpret_cast<const Tail*>(shared.activations[ring.stage]);
    float sums[16][4];
    u32 up[Tail::SLICES][4] = {};
#pragma unroll
    for (int s = 0; s < Tail::SLICES; ++s) {
      if (s == tail.slices) break;
      const u8* pair = shared.weights[ring.stage] + s * SLICE_BYTES + threadIdx.x * 16;  // B of two tiles is A of both
      const uint4 words = *reinterpret_cast<const uint4*>(pair);
      up[s][0] = words.x, up[s][1] = words.z, up[s][2] = words.y, up[s][3] = words.w;
    }
    const u64 low = describe_rows_of_64_bytes(tail.low);
    wgmma_fence();
    wgmma_h<false>(sums, up[0], low);
    wgmma_h<true>(sums, up[1], low + 2);
    wgmma_commit();
    if (first) {
      const float outer = tail.outer[channel], outer8 = tail.outer[channel + 8];
      const float bias = tail.bias[channel], bias8 = tail.bias[channel + 8];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(&tail.ascales[8 * j + token]);
        acc[j][0] = fmaf(acc[j][0] * outer, scale.x, bias);
        acc[j][1] = fmaf(acc[j][1] * outer, scale.y, bias);
        acc[j][2] = fmaf(acc[j][2] * outer8, scale.x, bias8);
        acc[j][3] = fmaf(acc[j][3] * outer8, scale.y, bias8);
      }
      first = false;
    }
    wgmma_wait<0>(sums);
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][i] += sums[j][i];
    more = tail.more;
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(&shared.empty[ring.stage]);
    ring.next();
  } while (more);
}

// acc: [channel][token] as wgmma leaves it -> [token][channel], as gather_sums leaves it.
__device__ __forceinline__ void turn(float (&v)[4][2][8], const float (&acc)[16][4], Shared& shared) {
  const int warp = threadIdx.x / 32, g = lane_id() / 4, q = lane_id() & 3;
  const int channel = 16 * warp + g;
  named_barrier(1, WORKERS);  // the tile before has been read
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * j + 2 * q + i;
      shared.turned[token][turned_column(token, channel)] = acc[j][i];
      shared.turned[token][turned_column(token, channel + 8)] = acc[j][i + 2];
    }
  named_barrier(1, WORKERS);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const int token = 16 * warp + g + 8 * half;
        const float4 four =
            *reinterpret_cast<const float4*>(&shared.turned[token][turned_column(token, 32 * t + 8 * q + i)]);
        v[t][half][i] = four.x, v[t][half][i + 1] = four.y, v[t][half][i + 2] = four.z, v[t][half][i + 3] = four.w;
      }
}

// acc: [channel][token] -> h, as gather_columns leaves it.
__device__ __forceinline__ void turn_rounded(u32 (&w)[4][2][4], const float (&acc)[16][4], Shared& shared) {
  const int warp = threadIdx.x / 32, lane = lane_id();
  named_barrier(1, WORKERS);  // the tile before has been read
#pragma unroll
  for (int j = 0; j < 16; j += 2) {  // 16 channels x 16 tokens
    const int token = 8 * j + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
    store_matrices_turned(&shared.rounded[token][16 * turned_chunk(token, chunk)], pack_h2(acc[j][0], acc[j][1]),
                          pack_h2(acc[j][2], acc[j][3]), pack_h2(acc[j + 1][0], acc[j + 1][1]),
                          pack_h2(acc[j + 1][2], acc[j + 1][3]));
  }
  named_barrier(1, WORKERS);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int token = 16 * warp + lane / 4 + 8 * half, chunk = 4 * t + lane % 4;
      const uint4 eight = *reinterpret_cast<const uint4*>(&shared.rounded[token][16 * turned_chunk(token, chunk)]);
      w[t][half][0] = eight.x, w[t][half][1] = eight.y, w[t][half][2] = eight.z, w[t][half][3] = eight.w;
    }
}

#if EPILOGUE == GELU_QUANTIZE
// The next linear's low-rank activations, summed from tile to tile as long as a block stays at its rows: integers, so
// that the order is free. A thread has places of its own.
struct KeptLow {
  static constexpr int SLICES = 2;
  Shared& shared;
  int row0 = -1;

  __device__ __forceinline__ void flush(const Epilogue& e) {
    if (row0 < 0) return;
#pragma unroll 1
    for (int eight = 0; eight < 2 * SLICES && 8 * eight < e.next_rank; ++eight) {
      long long sums[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = shared.kept[4 * eight + i][threadIdx.x];
      add_low(sums, row0, 8 * eight, e);
    }
  }

  __device__ __forceinline__ void begin(int row, const Epilogue& e) {
    if (row == row0) return;
    flush(e);
    row0 = row;
#pragma unroll
    for (int i = 0; i < 8 * SLICES; ++i) shared.kept[i][threadIdx.x] = 0;
  }

  __device__ __forceinline__ void add(int slice, const float (&sums)[2][4], const Epilogue& e) {
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      long long fixed[4];
      fix_low(fixed, sums[eight]);
      if (slice < SLICES) {
#pragma unroll
        for (int i = 0; i < 4; ++i) shared.kept[8 * slice + 4 * eight + i][threadIdx.x] += fixed[i];
      } else {
        add_low(fixed, row0, 16 * slice + 8 * eight, e);
      }
    }
  }
};

__device__ __forceinline__ void feed_next(const u32 (&w)[4][2][4], Shared& shared, Ring& ring, KeptLow& low,
                                          const Ahead& ahead, int row0, int col0, const Epilogue& e) {
  low.begin(row0, e);
  bool more;
  do {
    barrier_wait(&shared.full[ring.stage], ring.parity);
    const Next& next = *reinterpret_cast<const Next*>(shared.weights[ring.stage]);
    const u8* factors = shared.activations[ring.stage];
#pragma unroll 1
    for (int i = 0; i < next.slices; ++i) {
      float sums[2][4] = {};
      project_slice(sums, w, reinterpret_cast<const uint4*>(factors + i * SLICE_BYTES), col0, e.n);
      low.add(next.slice[i], sums, e);
    }
    more = __any_sync(0xffffffffu, next.more);  // the same in all lanes, and the compiler knows it
    if (!more) quantize_rows(w, ahead, row0, col0, next.smooth, next.inverse, e);
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(&shared.empty[ring.stage]);
    ring.next();
  } while (more);
}
#endif

__device__ __forceinline__ void compute_tiles(Shared& shared, int k, const Epilogue& e) {
  const Tiles tiles(e.m, e.n);
  Ring ring;
#if EPILOGUE == GELU_QUANTIZE
  KeptLow low = {shared};
#endif
  if (threadIdx.x >= 128) named_barrier_arrive(FIRST_TURN, WORKERS);  // the first warpgroup begins
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const int2 corner = tiles.corner(tile);
    const int row0 = corner.x + threadIdx.x / 32 * 16, col0 = corner.y;
    float acc[16][4] = {};
    multiply(acc, shared, ring, padded_steps(k));
    const Ahead ahead(row0, col0, e);
    add_tail(acc, shared, ring);
    u32 w[4][2][4];
#if EPILOGUE == QK_NORM_ROPE || EPILOGUE == GATE_RESIDUAL
    float v[4][2][8];
    turn(v, acc, shared);
    end_sums(v, ahead, row0, col0, e);
    pack_columns(w, v);
#else
#if EPILOGUE != PLAIN
    gelu(acc);
#endif
    turn_rounded(w, acc, shared);
#endif
#if EPILOGUE == GELU_QUANTIZE
    feed_next(w, shared, ring, low, ahead, row0, col0, e);
#else
    store_rows(w, row0, col0, e);
#endif
  }
#if EPILOGUE == GELU_QUANTIZE
  low.flush(e);
#endif
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
  const Epilogue e = {EPILOGUE_ARGUMENTS};
  if (threadIdx.x >= WORKERS) {
    give_registers<40>();
    load_tiles(shared, act, weights, ascales, outer, k, e);
  } else {
    take_registers<232>();
    compute_tiles(shared, k, e);
  }
}
