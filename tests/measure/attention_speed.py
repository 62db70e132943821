"""Attention and modulations on this card, beside torch's: python -m tests.measure.attention_speed

Prints two Markdown tables. Times are medians of CUDA events around CUDA graphs of several calls. The modulations
of a graph have weights of their own, 256 MB at least, so that no cache holds them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.kernels.attention_fp16 import attention_fp16
from engine.kernels.modulation_w4a16 import ArrangedModulation, arrange_modulation, modulation_w4a16
from engine.reference.linear_w4a16 import W4A16Weights

REPEATS = 30
ROTATED_BYTES = 256 * 2**20
ATTENTIONS = {"FLUX": (1, 24, 4608), "Mini": (1, 4, 320)}  # batch, heads, tokens
MODULATIONS = {"FLUX": (3072, (6, 3, 2)), "Mini": (512, (6, 3, 2))}  # channels, numbers of splits
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def median_us(work: Callable[[], object], calls: int = 1) -> float:
    """Microseconds of one call, `work` being `calls` of them."""
    times = []
    for _ in range(REPEATS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[3:])


def graph_us(works: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one of `works`, all of them being one CUDA graph."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return median_us(graph.replay, len(works))


def heads(batch: int, num_heads: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    joint = torch.randn(batch, length, 3, num_heads, 128, device="cuda", dtype=dtype)
    return list(joint.permute(2, 0, 3, 1, 4).unbind(0))


def torchs(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_table() -> None:
    print("| attention | dtype | by | us | TFLOP/s | relative error |\n|---|---|---|---|---|---|")
    for name, shape in ATTENTIONS.items():
        batch, num_heads, length = shape
        flop = 4 * batch * num_heads * length**2 * 128
        for dtype in (torch.float16, torch.bfloat16):
            q, k, v = heads(*shape, dtype)
            wanted = torchs(SDPBackend.EFFICIENT_ATTENTION, q.float(), k.float(), v.float())
            ways = {label: partial(torchs, backend, q, k, v) for label, backend in BACKENDS.items()}
            if dtype == torch.float16:
                ways["attention_fp16"] = partial(attention_fp16, q, k, v)
            for label, way in ways.items():
                row = f"| {name} {num_heads} x {length} | {str(dtype).removeprefix('torch.')} | {label} |"
                try:
                    error = float((way().float() - wanted).norm() / wanted.norm())
                except RuntimeError as refused:
                    print(f"{row} {str(refused)[:40]} | | |")
                    continue
                us = graph_us([way] * (8 if length > 1000 else 64))
                print(f"{row} {us:.1f} | {flop / us / 1e6:.0f} | {error:.1e} |")


def copy_rate() -> float:
    """Bytes read and written a second by copying."""
    sources = [torch.empty(ROTATED_BYTES, dtype=torch.uint8, device="cuda") for _ in range(4)]
    target = torch.empty_like(sources[0])
    us = graph_us([partial(target.copy_, source) for source in sources])
    return 2 * ROTATED_BYTES / us * 1e6


def modulation_layer(rows: int, channels: int) -> ArrangedModulation:
    codes = torch.randint(0, 16, (rows, channels), dtype=torch.uint8, device="cuda")
    scales = torch.rand(rows, channels // 64, device="cuda").bfloat16()
    bias = torch.randn(rows, device="cuda").bfloat16()
    return arrange_modulation(W4A16Weights(codes, scales, -7 * scales, bias, 64))


def modulation_table() -> None:
    copied = copy_rate()
    print(f"\nCopying 256 MiB: {copied / 1e12:.2f} TB/s read and written.\n")
    print("| modulation | rows of x | modulation_w4a16, us | TB/s | of copying | torch bf16 linear, us | TB/s |")
    print("|---|---|---|---|---|---|---|")
    for name, (channels, numbers) in MODULATIONS.items():
        for splits in numbers:
            rows = splits * channels
            four_bit = rows * channels // 2 + 4 * rows * channels // 64  # bytes
            layers = max(4, min(512, -(-ROTATED_BYTES // four_bit)))
            weights = [modulation_layer(rows, channels) for _ in range(layers)]
            dense = [torch.randn(rows, channels, device="cuda").bfloat16() for _ in range(max(4, layers // 4))]
            for batch in (1, 2, 8):
                x = torch.randn(batch, channels, device="cuda").bfloat16()
                ours = graph_us([partial(modulation_w4a16, x, layer, splits) for layer in weights])
                theirs = graph_us([partial(F.linear, x, layer) for layer in dense])
                rate = four_bit / ours * 1e6
                print(
                    f"| {name} {channels} -> {rows} | {batch} | {ours:.1f} | {rate / 1e12:.2f} "
                    f"| {rate / copied:.0%} | {theirs:.1f} | {2 * rows * channels / theirs / 1e6:.2f} |"
                )


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    attention_table()
    modulation_table()
