// Matrix instructions of one warp. Lane = 4 * g + q; all fragments are of 16 rows of A and 8 columns of B.
//
//   C (16, 8)   c0 c1: row g, columns 2q, 2q + 1; c2 c3: row g + 8
//   h, k16      A: a0 row g, k 2q, 2q + 1; a1 row g + 8; a2, a3 at k + 8.   B: b0 column g, k 2q, 2q + 1; b1 at + 8
//   4 bit, k64  A: a0 row g, k 8q..8q + 7; a1 row g + 8; a2, a3 at k + 32.  B: b0 column g, k 8q..; b1 at + 32
// sm_75 has halves of these instructions; the fragments stay the same.
#pragma once

#include "common/half.cuh"

__device__ __forceinline__ void mma_h_k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
#if H_BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// c = bias + a b over 64 products of 4-bit integers; b is signed, a signed or (ACT_UNSIGNED) 0..15.
#if ACT_UNSIGNED
#define INT4_TYPES "u4.s4"
#else
#define INT4_TYPES "s4.s4"
#endif
__device__ __forceinline__ void mma_int4_k64(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int bias) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k64.row.col.s32." INT4_TYPES
      ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(bias));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m8n8k32.row.col.s32." INT4_TYPES ".s32 {%0,%1}, {%2}, {%3}, {%4,%4};"
        : "=r"(c[2 * half]), "=r"(c[2 * half + 1])
        : "r"(a[half]), "r"(b0), "r"(bias));
    asm("mma.sync.aligned.m8n8k32.row.col.s32." INT4_TYPES ".s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+r"(c[2 * half]), "+r"(c[2 * half + 1])
        : "r"(a[2 + half]), "r"(b1));
  }
#endif
}

// Four matrices of 8 rows of 16 bytes; lane l brings the address of row l % 8 of matrix l / 8, a multiple of 16.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<u32>(__cvta_generic_to_shared(shared)))
               : "memory");
}
