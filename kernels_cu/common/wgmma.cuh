// wgmma: the matrix instruction of a warpgroup (sm_90a), e4m3 x e4m3 and h x h into fp32; stmatrix.
//
// D (64, 128) = A (64, 32) B^T, B (128, 32). Warp w of the four has rows 16 w of A and D; lane = 4 * g + q:
//   D  d[j][0..1] row g, columns 8 j + 2 q, + 1;  d[j][2..3] row g + 8
//   A  a0 row g, k 4q..4q+3;  a1 row g + 8;  a2, a3 the same at k + 16
//   B  in shared memory, row by row, 128 bytes of k each, 16-byte chunk c of row r at place c ^ (r % 8); 1024-byte
//      aligned
// It runs on after the instruction: a, d and B must not be touched before wgmma_wait, and wgmma_fence stands between
// ordinary writes of a or d and the wgmma that reads them.
// Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
#pragma once

#include "common/mbarrier.cuh"

#define FRAGMENT(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define ALL_FRAGMENTS(d)                                                                                          \
  FRAGMENT(d, 0), FRAGMENT(d, 1), FRAGMENT(d, 2), FRAGMENT(d, 3), FRAGMENT(d, 4), FRAGMENT(d, 5), FRAGMENT(d, 6), \
      FRAGMENT(d, 7), FRAGMENT(d, 8), FRAGMENT(d, 9), FRAGMENT(d, 10), FRAGMENT(d, 11), FRAGMENT(d, 12),          \
      FRAGMENT(d, 13), FRAGMENT(d, 14), FRAGMENT(d, 15)

// Describes B at `rows`, k 0..31; plus 2 for every further 32 of k.
__device__ __forceinline__ u64 describe_rows_of_128_bytes(const void* rows) {
  const u64 address = (shared_address(rows) & 0x3ffff) >> 4;
  return address | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;  // 8 rows are 1024 bytes; 128-byte swizzle
}

// The same of rows of 64 bytes, chunk c of row r at place c ^ (r / 2 % 4), 512-byte aligned.
__device__ __forceinline__ u64 describe_rows_of_64_bytes(const void* rows) {
  const u64 address = (shared_address(rows) & 0x3ffff) >> 4;
  return address | u64(1) << 16 | u64(512 >> 4) << 32 | u64(2) << 62;  // 8 rows are 512 bytes; 64-byte swizzle
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// d = (ADD ? d : 0) + A B^T
template <bool ADD>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[16][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1;\n}"
      : ALL_FRAGMENTS(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD ? 1 : 0));
}

// d (+)= A B^T, 16 numbers of h along k: a0 row g, k 2q..2q+1; a1 row g + 8; a2, a3 the same at k + 8
template <bool ADD>
__device__ __forceinline__ void wgmma_h(float (&d)[16][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
#if H_BF16
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
#else
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
#endif
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
      : ALL_FRAGMENTS(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD ? 1 : 0));
}

// Four matrices of 8 x 8 as C fragments have them, two numbers of h a word: lane 8 i + r says where column r of the
// i-th goes, 16 bytes.
__device__ __forceinline__ void store_matrices_turned(void* shared, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Waits until at most PENDING committed groups are running; d is of one that is not.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait(float (&d)[16][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : ALL_FRAGMENTS(d) : "n"(PENDING) : "memory");
}
