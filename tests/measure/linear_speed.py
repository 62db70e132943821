"""svdq_linear beside torch's linears: python -m tests.measure.linear_speed [--plan P] [--source NAME] [--tokens M]

Prints markdown tables for this card: median microseconds of a launch inside a CUDA graph, by CUDA events, random
bf16 data; every launch has buffers of its own, at least 256 MB of weights in turn.

    rank 0, rank 32   svdq_linear, its input already quantized
    unfused           svdq_linear of rank 0, then torch: y + low @ proj_up.T
    + quantize        the same from 16-bit input: quantize_act first; unfused: torch's x @ proj_down, too
    bf16              torch's F.linear; no 4-bit weights, no low-rank branch
    fp8               torch's _scaled_mm, one scale a row and one a column; its input already quantized
    of the matrix unit   rank 0's rate over that of the card's e4m3 instruction on registers, in a loop
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.jit import Variant, current_arch, launch, load, sources
from engine.kernels.quantize_act import arrange_target, quantize_act
from engine.kernels.svdq_linear import arrange, svdq_linear
from engine.reference.quantize_act import ActTarget, QuantizedAct
from engine.reference.svdq_linear import LinearPlan, Plain, SVDQuantWeights
from tests.measure.quantize_speed import ROTATED_BYTES, median_us

FLUX = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288))  # N, K
MINI = ((1536, 512), (512, 512), (2048, 512), (512, 2048))
TOKENS = {"FLUX.1, 1024 x 1024": (4608, FLUX), "Tonfa Mini": (288, MINI)}
RANK = 32
DTYPE = torch.bfloat16
RATE = """
extern "C" __global__ void __launch_bounds__(%(threads)d) rate(float* y, int rounds) {
  float d[2][16][4] = {};
  u32 a[4] = {threadIdx.x, threadIdx.x * 3, threadIdx.x * 5, threadIdx.x * 7};
  %(before)s
  for (int i = 0; i < rounds; ++i) { %(loop)s }
  %(after)s
  float sum = 0;
  for (int i = 0; i < 128; ++i) sum += d[i / 64][i / 4 %% 16][i %% 4];
  if (sum == 1.5f) y[0] = sum;
}
"""
WGMMA = (
    """#include "common/wgmma.cuh"
"""
    + RATE
    % {
        "threads": 256,
        "before": "extern __shared__ __align__(1024) u8 rows[];"
        "for (int i = threadIdx.x; i < 16384; i += 256) rows[i] = i * 37 & 0x3f;"
        "fence_async_proxy(); __syncthreads();",
        "loop": "wgmma_fence();"
        "for (int j = 0; j < 8; ++j) wgmma_e4m3<true>(d[0], a, describe_rows_of_128_bytes(rows));"
        "wgmma_commit(); wgmma_wait<0>(d[0]);",
        "after": "",
    }
)
MMA = """#define SCALE_TYPE 1
#include "common/e4m3.cuh"
""" + RATE % {
    "threads": 256,
    "before": "",
    "loop": "for (int j = 0; j < 8; ++j) mma_e4m3_k32(d[0][j], a, a[0], a[1]);",
    "after": "",
}  # fmt: skip


def matrix_rate() -> float:
    """TFLOP/s of the e4m3 instruction with its operands at hand."""
    hopper, rounds = current_arch() == "90a", 512
    blocks = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    y = torch.zeros(1, device="cuda")
    kernels = sources.KERNELS
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(kernels / "common", Path(folder) / "common")
        (Path(folder) / "rate.cu").write_text(WGMMA if hopper else MMA)
        sources.KERNELS = Path(folder)
        variant = Variant("rate", (("H_BF16", 1),))
        load([variant])
        sources.KERNELS = kernels
    products = 8 * 64 * 128 * 32 / 4 if hopper else 8 * 16 * 8 * 32  # of one warp and round

    def run(_: int) -> None:
        launch(variant, (blocks,), (256,), y, rounds, shared_bytes=16384)

    return 2 * products * 8 * blocks * rounds / median_us(run, 4) / 1e6


def random_weights(n: int, k: int, rank: int) -> SVDQuantWeights:
    return SVDQuantWeights(
        precision="int4",
        codes=torch.randint(-7, 8, (n, k), dtype=torch.int8, device="cuda"),
        wscales=((0.5 + torch.rand(n, k // 64, device="cuda")) / (4 * k**0.5)).to(DTYPE),
        smooth_factor=(0.5 + torch.rand(k, device="cuda")).to(DTYPE),
        bias=torch.randn(n, device="cuda").to(DTYPE),
        proj_down=(torch.randn(k, rank, device="cuda") / k**0.5).to(DTYPE),
        proj_up=torch.randn(n, rank, device="cuda").to(DTYPE),
    )


class Linear:
    """Copies of one linear of a rank, and as many inputs: each call in turn reads other memory."""

    def __init__(self, xs: list[Tensor], n: int, rank: int, plan: LinearPlan, source: str | None) -> None:
        weights = random_weights(n, xs[0].shape[1], rank)
        linear = arrange(weights, plan, DTYPE, current_arch(), source)
        assert linear.qweight is not None
        self.xs = xs
        self.linears = [replace(linear, qweight=linear.qweight.clone()) for _ in xs]
        smooth_factor, down = weights.smooth_factor.float(), weights.proj_down
        self.target = arrange_target(ActTarget(linear.format, smooth_factor, down, linear.rank_scales))
        self.acts = [quantize_act(x, self.target) for x in xs]

    def alone(self, i: int) -> Tensor:
        return self._multiply(self.acts[i], i)

    def with_quantize(self, i: int) -> Tensor:
        return self._multiply(quantize_act(self.xs[i], self.target), i)

    def _multiply(self, act: QuantizedAct, i: int) -> Tensor:
        found = svdq_linear(act, self.linears[i], Plain())
        assert isinstance(found, Tensor)
        return found


def times_of(m: int, n: int, k: int, plan: LinearPlan, source: str | None) -> dict[str, float]:
    count = max(4, ROTATED_BYTES // (n * k // 2))
    xs = [torch.randn(m, k, device="cuda").to(DTYPE) for _ in range(count)]
    plain, fused = (Linear(xs, n, rank, plan, source) for rank in (0, RANK))
    down, up = (torch.randn(size, RANK, device="cuda").to(DTYPE) for size in (k, n))
    lows = [x @ down for x in xs]
    times = {
        "rank 0": median_us(plain.alone, count),
        "rank 32": median_us(fused.alone, count),
        "unfused": median_us(lambda i: plain.alone(i).addmm_(lows[i], up.T), count),
        "rank 0 + quantize": median_us(plain.with_quantize, count),
        "rank 32 + quantize": median_us(fused.with_quantize, count),
        "unfused + quantize": median_us(lambda i: plain.with_quantize(i).addmm_(xs[i] @ down, up.T), count),
    }
    dense = [torch.randn(n, k, device="cuda").to(DTYPE) for _ in range(max(4, ROTATED_BYTES // (n * k * 2)))]
    count = min(len(dense), count)
    times["bf16"] = median_us(lambda i: F.linear(xs[i], dense[i]), count)
    with contextlib.suppress(RuntimeError, ValueError):  # where torch has no such product
        narrow_xs, narrow = ([one.to(torch.float8_e4m3fn) for one in many[:count]] for many in (xs, dense))
        rows, columns = torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")
        times["fp8"] = median_us(
            lambda i: torch._scaled_mm(
                narrow_xs[i], narrow[i].t(), rows, columns, out_dtype=DTYPE, use_fast_accum=True
            ),
            count,
        )
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", default="w4a8", choices=("w4a4", "w4a8", "w4a16"))
    parser.add_argument("--source", help="another source of the same plan, as svdq_linear.w4a8")
    parser.add_argument("--tokens", type=int, help="in the place of each model's own")
    asked = parser.parse_args()
    rate = matrix_rate()
    print(
        f"{torch.cuda.get_device_name()}, sm_{current_arch()}, torch {torch.__version__}; e4m3 on registers "
        f"{rate:.0f} TFLOP/s; plan {asked.plan}; microseconds (TFLOP/s)\n"
    )
    timed = ("rank 0", "rank 32", "unfused", "rank 0 + quantize", "rank 32 + quantize", "unfused + quantize")
    timed += ("bf16", "fp8")
    for model, (tokens, shapes) in TOKENS.items():
        print("| " + " | ".join((model, *timed, "bf16 / rank 0", "branch / bf16", "of the matrix unit")) + " |")
        print("|---" * 12 + "|")
        for n, k in shapes:
            m = asked.tokens or tokens
            times, work = times_of(m, n, k, asked.plan, asked.source), 2 * m * n * k / 1e6
            cells = [f"{times[name]:.1f} ({work / times[name]:.0f})" if name in times else "-" for name in timed]
            cells.append(f"{times['bf16'] / times['rank 0']:.2f}")
            cells.append(f"{(times['rank 32'] - times['rank 0']) / times['bf16']:.1%}")
            cells.append(f"{work / times['rank 0'] / rate:.0%}")
            print(f"| {m} x {k} -> {n} | " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
