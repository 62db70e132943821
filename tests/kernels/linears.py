"""Random linears and inputs for them, made where they are used; how far a kernel's sums may be off."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from engine.reference.e2m1 import encode_e2m1
from engine.reference.quantize_act import ActTarget, QuantizedAct, quantize_act
from engine.reference.svdq_linear import LOW_FRACTION, LinearPlan, Precision, SVDQuantWeights, act_format
from tests.tolerances import RELATIVE, SUMS

GELU_SHIFT = 11 / 64


def random_linear(
    precision: Precision,
    n: int,
    k: int,
    rank: int = 32,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    shift: float = 0.0,
    outer: bool = True,
    lowest: int = -8,
) -> SVDQuantWeights:
    """Results of about 1, of which the low-rank branch is a third; some group scales are 0.

    outer: nvfp4 with wtscale and wcscales. lowest: of int4's codes; w4a8 has no place for -8.
    """
    g = torch.Generator(device).manual_seed(torch.initial_seed() + n * 31 + k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, device=device)

    wtscale: Tensor | None = None
    wcscales: Tensor | None = None
    if precision == "int4":
        codes = torch.randint(lowest, 8, (n, k), generator=g, device=device, dtype=torch.int8)
        wscales = ((0.5 + uniform(n, k // 64)) * 0.22 / k**0.5).to(dtype)
        wscales[uniform(n, k // 64) < 1 / 32] = 0
    else:
        codes = encode_e2m1(2.5 * normal(n, k))
        wscales = (448 * uniform(n, k // 16) ** 4).to(torch.float8_e4m3fn)  # subnormal ones and zeros among them
        if outer:
            wtscale = torch.tensor(1 / (220 * k**0.5), device=device)
            wcscales = (0.5 + uniform(n)).to(dtype)
    return SVDQuantWeights(
        precision=precision,
        codes=codes,
        wscales=wscales,
        smooth_factor=torch.exp2(2 * uniform(k) - 1).to(dtype),
        bias=normal(n).to(dtype),
        proj_down=(normal(k, rank) / k**0.5).to(dtype),
        proj_up=(0.3 * normal(n, rank) / max(rank, 1) ** 0.5).to(dtype),
        wtscale=wtscale,
        wcscales=wcscales,
        input_shift=shift,
    )


def target_of(weights: SVDQuantWeights, plan: LinearPlan, dtype: torch.dtype) -> ActTarget:
    return ActTarget(
        format=act_format(weights, plan),
        smooth_factor=weights.smooth_factor.float(),
        proj_down=weights.proj_down.to(dtype),
        rank_scales=torch.ones(weights.rank // 16, device=weights.codes.device),
        shift=weights.input_shift if plan == "w4a4" else 0.0,
    )


def random_input(
    weights: SVDQuantWeights, plan: LinearPlan, m: int, dtype: torch.dtype, *, fixed: bool = False
) -> QuantizedAct:
    """What the reference makes of normal numbers (behind a GELU where the linear has a shift).

    fixed: the low-rank activations as integers, as a GEMM's epilogue leaves them.
    """
    x = torch.randn(m, weights.in_features, device=weights.codes.device).to(dtype)
    if weights.input_shift:
        x = torch.nn.functional.gelu(x, approximate="tanh")
    act = quantize_act(x, target_of(weights, plan, dtype))
    if act.low is None or not fixed:
        return act
    return QuantizedAct(act.format, act.codes, act.scales, (act.low.double() * 2.0**LOW_FRACTION).round().long())


def excess(found: Tensor, expected: Tensor, sums: float = SUMS) -> float:
    """The largest difference, where 1 is what is allowed: one unit in the last place of h, and the sums' error."""
    found, expected, dtype = found.double(), expected.double(), found.dtype
    allowed = RELATIVE[dtype] * expected.abs() + sums * expected.abs().max()
    return float(((found - expected).abs() / allowed).nan_to_num(nan=1e9).max())


def differing(found: Tensor, expected: Tensor) -> float:
    """Which fraction was rounded to another number."""
    return float((found != expected).double().mean())


def hash_of(made: Tensor | QuantizedAct) -> str:
    digest = hashlib.sha256()
    tensors = (made,) if isinstance(made, Tensor) else (made.codes, made.scales, made.low)
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
