"""svdq_linear.nvfp4 on cards that lack its instruction: the source as it is, but for that one instruction.

Everything around it runs: which bytes a lane loads, where they stand in shared memory, which fragments and scales
it multiplies, and what comes after. What the instruction does with its operands is written from the PTX ISA.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from engine.jit import sources

SOURCE = "svdq_linear.nvfp4.cu"
INSTRUCTION = re.compile(r"__device__ __forceinline__ void mma_nvfp4_k64\(.*?\n}\n", re.DOTALL)
EMULATION = """
__device__ __forceinline__ u32 from_lane(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// 0, 1, 2, 3, 4, 6, 8, 12 or less than 0: twice what an e2m1 code is
__device__ __forceinline__ int twice(u32 code) {
  const int m = code & 7, size = m < 2 ? m : (2 + (m & 1)) << ((m >> 1) - 1);
  return code & 8 ? -size : size;
}

__device__ __noinline__ float dot(u32 a, u32 b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 4) sum += twice(a >> i & 15) * twice(b >> i & 15);
  return 0.25f * sum;
}

__device__ __noinline__ float scale_of(u32 word, int group) {
  const int code = word >> 8 * group & 0x7f, m = code & 7;
  return code < 8 ? ldexpf(m, -9) : ldexpf(8 + m, code / 8 - 10);
}

__device__ __forceinline__ void mma_nvfp4_k64(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, u32 a_scales,
                                              u32 b_scales) {
  const int g = lane_id() / 4, q = lane_id() % 4;
  const u32 rows[2] = {from_lane(a_scales, 4 * g), from_lane(a_scales, 4 * g + 1)};
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    const int first = 4 * (2 * q + column);  // lane of B's column 2 q + column
    const u32 scales = from_lane(b_scales, first);
#pragma unroll 1
    for (int lane = 0; lane < 4; ++lane)  // of the quad: k 8 lane .. 8 lane + 7, and those 32 further
#pragma unroll
      for (int k32 = 0; k32 < 2; ++k32) {
        const u32 b = from_lane(k32 ? b1 : b0, first + lane);
        const int group = 2 * k32 + lane / 2;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          c[2 * half + column] += dot(from_lane(a[2 * k32 + half], 4 * g + lane), b) *
                                  (scale_of(rows[half], group) * scale_of(scales, group));
      }
  }
}
"""


def emulated_kernels(folder: Path) -> Path:
    """A copy of kernels_cu under `folder`, with the emulation in the place of the instruction."""
    copy = folder / "kernels_cu"
    shutil.copytree(sources.KERNELS, copy)
    text, found = INSTRUCTION.subn(lambda _: EMULATION, (copy / SOURCE).read_text("utf-8"))
    assert found == 1, f"{SOURCE} has no mma_nvfp4_k64"
    (copy / SOURCE).write_text(text, "utf-8")
    return copy
