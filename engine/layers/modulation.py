"""What adaptive layer norm (adaLN, Peebles & Xie 2022) does around linears: shift and scale before, a gate after.

Blocks read the same on every processor. Linears that run through kernels get quantized activations and add their
gated result to the residual stream themselves; the others are fed and summed by torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.linear import Act, BranchedLinear
from engine.layers.norms import layer_norm

FP16_MAX = 65504.0


def modulated(x: Tensor, shift: Tensor, scale: Tensor, *readers: BranchedLinear) -> list[Act]:
    """layer_norm(x) * scale + shift as each of `readers` reads it; made once for those that read the same.

    x: (B, L, C); shift, scale: (B, 1, C), scale contains its 1.
    """
    y = layer_norm(x) * scale + shift
    return [y for _ in readers]


def add_gated(residual: Tensor, gate: Tensor, *products: tuple[BranchedLinear, Act]) -> Tensor:
    """residual + gate * (sum of linear(x)). residual: (B, L, C), never written; gate: (B, 1, C)."""
    (linear, x), *others = products
    y = linear(x)
    for linear, x in others:
        y = y + linear(x)
    return stay_in_range(residual + gate * y)


def stay_in_range(x: Tensor) -> Tensor:
    """The residual stream of FLUX leaves fp16's range now and then; elsewhere this does nothing."""
    return x.clamp(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else x
