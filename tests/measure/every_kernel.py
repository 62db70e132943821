"""Launch every kernel that runs on this card once, on small ragged shapes, for NVIDIA's checkers:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck  python -m tests.measure.every_kernel
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m tests.measure.every_kernel

Without the caching every tensor ends where its memory ends, so that one byte too far is seen. Prints how many
variants ran, and which kernels this card cannot run. 37 rows, so that tiles are ragged; ranks 0, 32 and 48, some of
them at strength 0; both 16-bit types.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import get_args

import torch
from torch import Tensor

from engine import jit
from engine.kernels import (
    attention_fp16,
    linear_w4a16,
    modulate_quantize,
    modulation_w4a16,
    quantize_act,
    svdq_linear,
)
from engine.kernels.svdq_linear import ARCHITECTURES_OF
from engine.reference.quantize_act import ActFormat, ActTarget
from engine.reference.svdq_linear import Epilogue, GateResidual, Gelu, GeluQuantize, LinearPlan, Plain, QKNormRope
from tests.kernels.act_targets import GELU_SHIFT, activations, random_target
from tests.kernels.test_linear_w4a16 import random_weights as random_w4a16
from tests.kernels.test_svdq_linear import random_linear

M, N, K = 37, 384, 192
CARD = "cuda"
PLANS: tuple[tuple[str, LinearPlan, str, float], ...] = (
    ("svdq_linear.w4a4", "w4a4", "int4", 0.0),
    ("svdq_linear.w4a4", "w4a4", "int4", GELU_SHIFT),
    ("svdq_linear.w4a8", "w4a8", "int4", 0.0),
    ("svdq_linear.w4a8_sm90", "w4a8", "int4", 0.0),
    ("svdq_linear.w4a16", "w4a16", "int4", 0.0),
    ("svdq_linear.w4a16", "w4a16", "nvfp4", 0.0),
    ("svdq_linear.nvfp4", "w4a4", "nvfp4", 0.0),
)


def quantizing(dtype: torch.dtype) -> None:
    for format, rank in product(get_args(ActFormat), (0, 48)):
        target = random_target(format, K, rank, dtype, CARD, silent=(1,) if rank else ())
        x = activations(M, K, dtype, CARD, positive=format == "uint4")
        quantize_act.quantize_act(x, target)
        modulate_quantize.modulate_quantize(x, x[0].contiguous(), x[1].contiguous(), target)


def epilogues(dtype: torch.dtype, next_target: ActTarget) -> list[Epilogue]:
    norm, angle = torch.rand(128, device=CARD), torch.rand(M, 64, device=CARD)
    residual = torch.randn(M, N, device=CARD).to(dtype)
    gate = torch.randn(N, device=CARD).to(dtype)
    return [
        Plain(),
        Gelu(),
        QKNormRope(norm, norm, angle.cos(), angle.sin(), torch.empty_like(residual)),
        GateResidual(gate, residual, residual),
        GeluQuantize(next_target),
    ]


def linears(dtype: torch.dtype) -> None:
    arch = jit.current_arch()
    for source, plan, precision, shift in PLANS:
        if arch not in ARCHITECTURES_OF[source]:
            continue
        lowest = -7 if plan == "w4a8" else -8
        weights = random_linear(precision, N, K, 32, dtype=dtype, shift=shift, lowest=lowest)  # type: ignore[arg-type]
        linear = svdq_linear.arrange(weights, plan, dtype, arch, source)
        own = ActTarget(
            format=linear.format,
            smooth_factor=weights.smooth_factor.float(),
            proj_down=weights.proj_down.to(dtype),
            rank_scales=linear.rank_scales,
            shift=shift if linear.format == "uint4" else 0.0,
        )
        x = activations(M, K, dtype, CARD, positive=shift != 0)
        act = quantize_act.quantize_act(x, quantize_act.arrange_target(own))
        following = "uint4" if linear.format == "int4" else linear.format
        for epilogue in epilogues(dtype, random_target(following, N, 48, dtype, CARD, silent=(1,))):
            svdq_linear.svdq_linear(act, linear, epilogue)
    for group, k in ((64, K), (128, 256)):
        plain = linear_w4a16.arrange(random_w4a16(N, k, group, dtype, CARD), dtype, arch)
        linear_w4a16.linear_w4a16(activations(M, k, dtype, CARD), plain)
    x = activations(3, K, dtype, CARD)
    modulation = modulation_w4a16.arrange_modulation(random_w4a16(N, K, 64, dtype, CARD))
    modulation_w4a16.modulation_w4a16(x, modulation, 3)


def attention() -> None:
    joint = torch.randn(1, 77, 3 * 256, device=CARD, dtype=torch.float16)
    q, k, v = (part.view(1, 77, 2, 128).transpose(1, 2) for part in joint.chunk(3, dim=-1))
    attended: Tensor = attention_fp16.attention_fp16(q, k, v)
    assert bool(torch.isfinite(attended).all())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    torch.manual_seed(0)
    launched = set()
    for dtype in (torch.bfloat16, torch.float16):
        with jit.noted() as variants:  # a first walk only notes what the second one launches
            quantizing(dtype)
            linears(dtype)
        launched |= set(variants)
        quantizing(dtype)
        linears(dtype)
    attention()
    torch.cuda.synchronize()
    arch = jit.current_arch()
    print(f"{torch.cuda.get_device_name()}, sm_{arch}: {len(launched) + 1} variants ran")
    print("not on this card:", ", ".join(sorted({s for s, *_ in PLANS if arch not in ARCHITECTURES_OF[s]})) or "-")


if __name__ == "__main__":
    main()
