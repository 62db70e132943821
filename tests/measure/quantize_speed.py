"""quantize_act and modulate_quantize beside a copy: python -m tests.measure.quantize_speed [PLAN ...]

Prints a markdown table for this card: median microseconds of a launch inside a CUDA graph, by CUDA events; every
launch has buffers of its own, 256 MB of them in turn, or 200 where they are small. "copy" moves as many bytes as
the kernel reads and writes, measured in the same run. "unfused" is the kernel at rank 0 and torch's matmul for the
low-rank product. Rank 64 is FLUX's single block, where two linears share one input. PLAN: w4a4, w4a8, nvfp4, w4a16;
without one, all that the card's architecture has.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from engine.jit import current_arch, load
from engine.kernels._quantize_rows import ARCHITECTURES_OF, PLANS, variants
from engine.kernels.modulate_quantize import modulate_quantize
from engine.kernels.quantize_act import arrange_target, quantize_act
from engine.reference.quantize_act import ActFormat, ActTarget, QuantizedAct

ROTATED_BYTES = 256 * 2**20
MOST_LAUNCHES = 200  # of one graph
REPEATS = 15
SHAPES = ((4608, 3072), (4608, 12288), (256, 3072), (1, 3072), (256, 512), (256, 2048))
RANK = 32
SHARED = (4608, 3072, 64)  # modulate_quantize in front of two linears


def median_us(work: Callable[[int], object], launches: int) -> float:
    """work(i) for i in 0 .. launches - 1 is captured once, what it returns kept, and replayed."""
    for i in range(2):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [work(i) for i in range(launches)]
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    del kept
    return statistics.median(times[2:])


def bytes_of(x: Tensor, act: QuantizedAct) -> int:
    return sum(tensor.nbytes for tensor in (x, act.codes, act.scales, act.low) if tensor is not None)


def launches_for(total: int) -> int:
    return min(MOST_LAUNCHES, ROTATED_BYTES // total + 2)


def copy_us(total: int) -> float:
    launches = launches_for(total)
    buffers = [torch.zeros(2, total // 2, dtype=torch.uint8, device="cuda") for _ in range(launches)]
    return median_us(lambda i: buffers[i][1].copy_(buffers[i][0]), launches)


def random_target(format: ActFormat, k: int, rank: int) -> ActTarget:
    return arrange_target(
        ActTarget(
            format=format,
            smooth_factor=torch.rand(k, device="cuda") + 0.5,
            proj_down=torch.randn(k, rank, device="cuda").bfloat16(),
            rank_scales=torch.ones(rank // 16, device="cuda"),
            shift=11 / 64 if format == "uint4" else 0.0,
        )
    )


def row(operation: str, format: ActFormat, m: int, k: int, rank: int) -> str:
    plain, ranked = random_target(format, k, 0), random_target(format, k, rank)
    shift, scale = torch.randn(2, k, device="cuda").bfloat16().unbind()

    def one(x: Tensor, target: ActTarget) -> QuantizedAct:
        return (
            quantize_act(x, target) if operation == "quantize_act" else modulate_quantize(x, shift, scale, target)
        )

    x = torch.randn(m, k, device="cuda").bfloat16()
    total = bytes_of(x, one(x, ranked))
    launches = launches_for(total)
    inputs = [x.clone() for _ in range(launches)]
    copied = copy_us(total)
    at_rank_0 = median_us(lambda i: one(inputs[i], plain), launches)
    fused = median_us(lambda i: one(inputs[i], ranked), launches)
    unfused = median_us(lambda i: (one(inputs[i], plain), inputs[i] @ ranked.proj_down), launches)
    return (
        f"| {operation} {format} | {m} x {k} | {rank} | {total / 1e6:.1f} | {copied:.1f} | {at_rank_0:.1f} "
        f"| {fused:.1f} | {unfused:.1f} | {fused / copied:.2f} |"
    )


def main() -> None:
    plans = sys.argv[1:] or [plan for plan, archs in ARCHITECTURES_OF.items() if current_arch() in archs]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, bf16, microseconds")
    print("\n| kernel | M x K | rank | MB | copy | at rank 0 | fused | unfused | fused / copy |")
    print("|---|---|---|---|---|---|---|---|---|")
    for operation in ("quantize_act", "modulate_quantize"):
        load(variants(operation, current_arch()))
        for format, plan in PLANS.items():
            if plan in plans and not (operation == "modulate_quantize" and format == "uint4"):
                shapes = [(m, k, RANK) for m, k in SHAPES] + [SHARED] * (operation == "modulate_quantize")
                for m, k, rank in shapes:
                    print(row(operation, format, m, k, rank), flush=True)


if __name__ == "__main__":
    main()
