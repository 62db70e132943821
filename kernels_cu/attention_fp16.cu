// attention_fp16: softmax(q k^T / sqrt(D)) v of each head, both products accumulated in fp16. D = 128.
//
//   q, k, v (B, H, L, D)  fp16   views: rows contiguous, strides of batch, head and row free (multiples of 8 elements)
//   out     (B, L, H*D)   fp16   contiguous
// Work:   a block takes 128 rows of one head, a warp 32 of them; all warps walk the keys 32 at a time (online softmax).
//         Scores s = (q/16) k^T are summed in fp16 over D. Probabilities are p = 2^(c s - max - 4), in fp16; p v is
//         summed in fp16 over the 32 keys only, then added to fp32 sums that stay in registers. Statistics are fp32.
// Range:  |q k| up to 2^20 (scores are fp16), |v| up to 2^15 (32 keys of 2^-4 each); more becomes inf or NaN.
//         A probability below 2^-21 of the largest seen so far counts as nothing.
// Launch: grid (ceil(L / 128), H, B), block 128.
// Bound:  matrix units. They take fp16 sums at twice the rate of fp32 sums on GeForce cards, at the same on others.
// Limits: 255 registers (two blocks a multiprocessor), 48 KiB shared memory. sm_75 copies through registers.
// Truth:  engine/reference/attention_fp16.py
#include "common/half.cuh"

constexpr int HEAD_DIM = 128;
constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes in a row
constexpr int NUM_WARPS = 4, WARP_ROWS = 32, BLOCK_ROWS = NUM_WARPS * WARP_ROWS, BLOCK_KEYS = 32;
constexpr int THREADS = 32 * NUM_WARPS;
constexpr int ROWS_A_PASS = THREADS / CHUNKS;           // rows that all threads copy at once, 16 bytes each
constexpr int KEY_PASSES = BLOCK_KEYS / ROWS_A_PASS;
constexpr int STEPS_AT_ONCE = 2;                        // of the scores' loop; from 4 on some architectures spill
constexpr float Q_SCALE = 1.0f / 16;                    // a power of two: exact
constexpr float TO_LOG2 = 2.0402789f;                   // 16 / sqrt(128) * log2(e)
constexpr float P_SHIFT = 4.0f;                         // p is at most 2^-4, so that sums of p v stay in range

// Shared tiles are rows of 16 chunks; a chunk stands at its number xor row % 8: no bank conflicts for ldmatrix.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * CHUNKS + (chunk ^ (row & 7)); }

// Byte offset from a row of a tile to its chunks 2 step and 2 step + 1; `first` is the lane's offset for step 0. Only the
// low 3 bits of a chunk's number are exchanged, so that half of the steps are a constant further.
__device__ __forceinline__ u32 at_step(u32 first, int step) { return (first ^ 32 * (step & 3)) + 128 * (step / 4); }

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// common/mma.cuh's h k16 fragments, but C in fp16: c0 is row g, columns 2q, 2q + 1; c1 the same of row g + 8.
__device__ __forceinline__ void mma_into_half(u32 (&c)[2], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
      : "+r"(c[0]), "+r"(c[1]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};"
      : "+r"(c[0]), "+r"(c[1]) : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};"
      : "+r"(c[0]), "+r"(c[1]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float2 to_float2(u32 pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

__device__ __forceinline__ u32 to_halves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const u32*>(&pair);
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Copies 32 rows of k or v into a shared tile while the warps compute: begin, then finish before reading.
// Nobody may still read the tile when it is written: from begin on, sm_75 from finish on.
struct TileCopy {
  const __half* from;  // this thread's chunk of row 0
  int row_stride, length;
  uint4* to;  // this thread's chunk of the tile's first row
#if __CUDA_ARCH__ < 800
  uint4 held[KEY_PASSES];
#endif

  __device__ __forceinline__ void begin(int first) {
#pragma unroll
    for (int pass = 0; pass < KEY_PASSES; ++pass) {
      const int row = first + threadIdx.x / CHUNKS + pass * ROWS_A_PASS;
      const __half* source = from + static_cast<long long>(min(row, length - 1)) * row_stride;
#if __CUDA_ARCH__ >= 800
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::
                   "r"(shared_address(to + pass * ROWS_A_PASS * CHUNKS)), "l"(source), "r"(row < length ? 16 : 0)
                   : "memory");
#else
      held[pass] = row < length ? *reinterpret_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
#endif
    }
  }

  __device__ __forceinline__ void finish() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
#pragma unroll
    for (int pass = 0; pass < KEY_PASSES; ++pass) to[pass * ROWS_A_PASS * CHUNKS] = held[pass];
#endif
    __syncthreads();
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_fp16(const __half* __restrict__ q, const __half* __restrict__ k, const __half* __restrict__ v,
               __half* __restrict__ out, int length, int q_batch, int q_head, int q_row, int k_batch, int k_head,
               int k_row, int v_batch, int v_head, int v_row) {
  __shared__ uint4 q_tile[BLOCK_ROWS * CHUNKS];
  __shared__ uint4 k_tile[BLOCK_KEYS * CHUNKS];
  __shared__ uint4 v_tile[BLOCK_KEYS * CHUNKS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int row0 = blockIdx.x * BLOCK_ROWS, head = blockIdx.y;
  const long long batch = blockIdx.z;
  const int my_row = threadIdx.x / CHUNKS, my_chunk = threadIdx.x % CHUNKS;

  const int my_place = swizzled(my_row, my_chunk);  // rows 8 apart have the same chunk order
  TileCopy keys{k + batch * k_batch + static_cast<long long>(head) * k_head + 8 * my_chunk, k_row, length, k_tile + my_place};
  TileCopy values{v + batch * v_batch + static_cast<long long>(head) * v_head + 8 * my_chunk, v_row, length, v_tile + my_place};
  keys.begin(0);
  q += batch * q_batch + static_cast<long long>(head) * q_head + 8 * my_chunk;
#pragma unroll 4
  for (int pass = 0; pass < BLOCK_ROWS / ROWS_A_PASS; ++pass) {
    const int row = row0 + my_row + pass * ROWS_A_PASS;
    uint4 chunk = make_uint4(0, 0, 0, 0);
    if (row < length) chunk = *reinterpret_cast<const uint4*>(q + static_cast<long long>(row) * q_row);
    __half2* pairs = reinterpret_cast<__half2*>(&chunk);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __hmul2(pairs[i], __float2half2_rn(Q_SCALE));
    q_tile[my_place + pass * ROWS_A_PASS * CHUNKS] = chunk;
  }
  keys.finish();

  // What this lane tells ldmatrix: a row of 8 of one of four 8 x 8 matrices. For q and v the second matrix is 8 rows
  // below the first and the third 8 columns to the right; for k the other way round.
  const int row_of_8 = lane & 7, low_bit = lane / 8 & 1, high_bit = lane / 16;
  const u32 q_from = shared_address(q_tile + (warp * WARP_ROWS + 8 * low_bit + row_of_8) * CHUNKS);
  const u32 v_from = shared_address(v_tile + (8 * low_bit + row_of_8) * CHUNKS);
  const u32 k_from = shared_address(k_tile + (8 * high_bit + row_of_8) * CHUNKS);
  const u32 qv_chunk = 16 * (high_bit ^ row_of_8), k_chunk = 16 * (low_bit ^ row_of_8);  // bytes

  float o[2][16][4] = {};  // two times 16 rows, 16 times 8 columns
  const float none = __int_as_float(0xff800000);  // -infinity
  float largest[2][2] = {{none, none}, {none, none}}, total[2][2] = {};  // of rows g, g + 8

  for (int first = 0; first < length; first += BLOCK_KEYS) {
    values.begin(first);

    u32 s[2][4][2] = {};
#pragma unroll STEPS_AT_ONCE
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      u32 a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(a[i], q_from + i * 16 * CHUNKS * 16 + at_step(qv_chunk, step));
        ldmatrix_x4(b[i], k_from + i * 16 * CHUNKS * 16 + at_step(k_chunk, step));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_into_half(s[i][n], a[i], b[n / 2][2 * (n & 1)], b[n / 2][2 * (n & 1) + 1]);
    }
    if (first + BLOCK_KEYS > length) {  // keys that are not there
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int column = first + 8 * n + 2 * (lane & 3);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u32& pair = s[i / 2][n][i & 1];
          if (column >= length) pair = pair & 0xffff0000u | 0xfc00u;
          if (column + 1 >= length) pair = pair & 0xffffu | 0xfc000000u;
        }
      }
    }

    float fade[2][2];  // what all sums so far are multiplied by
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = largest[i][r];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float2 pair = to_float2(s[i][n][r]);
          top = fmaxf(top, fmaxf(pair.x, pair.y));
        }
        top = quad_max(top);
        fade[i][r] = exp2_fast((largest[i][r] - top) * TO_LOG2);
        largest[i][r] = top;
        const float base = fmaf(top, TO_LOG2, P_SHIFT);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float2 pair = to_float2(s[i][n][r]);
          const float low = exp2_fast(fmaf(pair.x, TO_LOG2, -base)), high = exp2_fast(fmaf(pair.y, TO_LOG2, -base));
          sum += low + high;
          s[i][n][r] = to_halves(low, high);
        }
        total[i][r] = fmaf(total[i][r], fade[i][r], sum);
      }

    values.finish();
    if (first + BLOCK_KEYS < length) keys.begin(first + BLOCK_KEYS);

#pragma unroll
    for (int part = 0; part < 4; ++part) {  // 32 columns of v
      u32 sums[2][4][2] = {};
#pragma unroll
      for (int step = 0; step < BLOCK_KEYS / 16; ++step) {
        u32 b[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          ldmatrix_x4_transposed(b[i], v_from + step * 16 * CHUNKS * 16 + at_step(qv_chunk, 2 * part + i));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const u32 p[4] = {s[i][2 * step][0], s[i][2 * step][1], s[i][2 * step + 1][0], s[i][2 * step + 1][1]};
#pragma unroll
          for (int n = 0; n < 4; ++n) mma_into_half(sums[i][n], p, b[n / 2][2 * (n & 1)], b[n / 2][2 * (n & 1) + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float* to = &o[i][4 * part + n][2 * r];
            const float2 pair = to_float2(sums[i][n][r]);
            to[0] = fmaf(to[0], fade[i][r], pair.x);
            to[1] = fmaf(to[1], fade[i][r], pair.y);
          }
    }
    if (first + BLOCK_KEYS < length) keys.finish();
  }

  const int width = gridDim.y * HEAD_DIM;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + warp * WARP_ROWS + 16 * i + 8 * r + lane / 4;
      const float inverse = __fdividef(1.0f, quad_sum(total[i][r]));
      if (row >= length) continue;
      __half* to = out + (batch * length + row) * width + head * HEAD_DIM + 2 * (lane & 3);
#pragma unroll
      for (int n = 0; n < 16; ++n)
        *reinterpret_cast<u32*>(to + 8 * n) = to_halves(o[i][n][2 * r] * inverse, o[i][n][2 * r + 1] * inverse);
    }
}
