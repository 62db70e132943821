"""Linears that keep 16-bit activations: 4-bit weights with a scale and a zero per group (modulations, T5)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantizer.round_weights import HALF, reciprocal, round_gptq, round_nearest, uint4
from engine.reference.linear_w4a16 import W4A16Weights

MODULATION_GROUP, T5_GROUP = 64, 128
MIDDLE = 7  # the code that stands for 0 in modulations, as public files have it: (code - 7) * scale
CLIPS = tuple(step / 50 for step in range(35, 51))


def quantize_weight_only(
    weight: Tensor,
    bias: Tensor | None,
    group_size: int,
    *,
    symmetric: bool,
    hessian: Tensor | None = None,
    search: bool = True,
) -> W4A16Weights:
    """weight (O, K) fp32, bias (O,) fp32 -> weight ~ codes * scales + zeros, scales and zeros in HALF.

    symmetric: zeros = -7 * scales, as in FLUX files; else each group gets its own. search: clip every group where
    that makes its error smaller, else scales just hold the largest weight. With a Hessian (K, K) of the inputs
    codes are rounded by GPTQ, else to nearest.
    """
    rows, k = weight.shape
    groups = weight.view(rows, k // group_size, group_size)
    grid = uint4(group_size)
    importance = torch.ones(k, device=weight.device) if hessian is None else hessian.diagonal()
    weight_of = importance.view(1, -1, group_size)
    high, low = groups.amax(dim=-1).clamp_min(0), groups.amin(dim=-1).clamp_max(0)

    def stored(clip: float | Tensor) -> tuple[Tensor, Tensor]:
        if symmetric:
            scales = (torch.maximum(high / (15 - MIDDLE), -low / MIDDLE) * clip).to(HALF)
            return scales, -MIDDLE * scales
        return ((high - low) * clip / 15).to(HALF), (low * clip).to(HALF)

    best_clip = torch.ones_like(high)
    smallest = torch.full_like(high, torch.inf)
    for clip in CLIPS if search else (1.0,):
        scales, zeros = (part.float().unsqueeze(-1) for part in stored(clip))
        codes = grid.encode((groups - zeros) * reciprocal(scales))
        error = ((grid.decode(codes) * scales + zeros - groups).square() * weight_of).sum(dim=-1)
        best_clip = torch.where(error < smallest, clip, best_clip)
        smallest = torch.minimum(error, smallest)
    scales, zeros = stored(best_clip)
    if hessian is None:
        codes = round_nearest(weight, scales.float(), grid, zeros.float())
    else:
        codes = round_gptq(weight, scales.float(), grid, hessian, zeros.float())
    return W4A16Weights(codes, scales, zeros, None if bias is None else bias.to(HALF), group_size)
