// Copies from global to shared memory that need no registers and are waited for in groups. sm_75 has none: there
// they are ordinary copies, done when the call returns, and the waits are empty.
#pragma once

#include "common/half.cuh"

__device__ __forceinline__ u32 shared_address(const void* shared) {
  return static_cast<u32>(__cvta_generic_to_shared(shared));
}

// 16 bytes, both addresses multiples of 16; zeros where not valid, and then nothing is read.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

// 4 bytes, both addresses multiples of 4.
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
#else
  *static_cast<u32*>(shared) = valid ? __ldg(static_cast<const u32*>(global)) : 0;
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most PENDING of this thread's groups are still on their way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
