// 4-bit integers as e4m3, without a conversion: e4m3's smallest values are linear, byte m = 0..7 is m * 2^-9 exactly and
// bit 7 its sign. Codes are kept as sign and magnitude, eight in a word: four sit where a mask finds them, four after a
// turn by 4 bits. 2^-9 is taken back by `outer`, the scale of the out channel. -8 has no place here.
// Packer: engine/kernels/_arrange_w4a8.py
//
//   SCALE_TYPE  what a group scale is stored as: 0 fp32, 1 bf16, 2 fp16 (what holds the file's exactly)
#pragma once

#include "common/half.cuh"

constexpr u32 SIGNS_AND_MAGNITUDES = 0x87878787u;
constexpr int GROUP = 64;  // in-channels that share a scale
constexpr int SCALE_BYTES = SCALE_TYPE == 0 ? 4 : 2;

__device__ __forceinline__ u32 first_four(u32 codes) { return codes & SIGNS_AND_MAGNITUDES; }
__device__ __forceinline__ u32 second_four(u32 codes) { return first_four(__funnelshift_l(codes, codes, 4)); }

// Two neighbouring group scales.
__device__ __forceinline__ float2 scale_pair(const u8* at) {
#if SCALE_TYPE == 0
  return *reinterpret_cast<const float2*>(at);
#elif SCALE_TYPE == 1
  const u32 pair = *reinterpret_cast<const u32*>(at);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
  return __half22float2(*reinterpret_cast<const __half2*>(at));
#endif
}

// C (16, 8) += A (16, 32) B (32, 8). Lane = 4 * g + q: A a0 row g, k 4q..4q+3; a1 row g + 8; a2, a3 the same at k + 16.
// B b0 column g, k 4q..4q+3; b1 at k + 16. C as in mma.cuh. Native on sm_89 and sm_120; sm_90 expands it to 16-bit mma.
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ void mma_e4m3_k32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
