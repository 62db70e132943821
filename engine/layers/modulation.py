"""What adaptive layer norm (adaLN, Peebles & Xie 2022) does around linears: shift and scale before, a gate after.

Blocks read the same on every processor. Linears that run through kernels get quantized activations and add their
gated result to the residual stream themselves; the others are fed and summed by torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.modulate_quantize import modulate_quantize
from engine.layers.fused_linear import FusedLinear
from engine.layers.linear import Act, BranchedLinear
from engine.layers.norms import layer_norm
from engine.reference.quantize_act import ActTarget

FP16_MAX = 65504.0


def modulated(x: Tensor, shift: Tensor, scale: Tensor, *readers: BranchedLinear) -> list[Act]:
    """layer_norm(x) * scale + shift as each of `readers` reads it; made once for those that read the same.

    x: (B, L, C); shift, scale: (B, 1, C), scale contains its 1.
    """
    made: dict[ActTarget | None, Act] = {}
    acts = []
    for reader in readers:
        target = reader.target if isinstance(reader, FusedLinear) else None
        if target not in made:
            if target is None:
                made[target] = layer_norm(x) * scale + shift
            else:
                made[target] = modulate_quantize(x[0], shift[0, 0], scale[0, 0], target)
        acts.append(made[target])
    return acts


def add_gated(residual: Tensor, gate: Tensor, *products: tuple[BranchedLinear, Act]) -> Tensor:
    """residual + gate * (sum of linear(x)). residual: (B, L, C), never written; gate: (B, 1, C)."""
    plain = [linear(x) for linear, x in products if not isinstance(linear, FusedLinear)]
    stream = residual
    if plain:
        stream = stay_in_range(stream + gate * (plain[0] if len(plain) == 1 else sum(plain[1:], plain[0])))
    for linear, x in products:
        if isinstance(linear, FusedLinear):
            stream = linear.add_gated(stream, gate, x, in_place=stream is not residual)
    return stream


def stay_in_range(x: Tensor) -> Tensor:
    """The residual stream of FLUX leaves fp16's range now and then; elsewhere this does nothing."""
    return x.clamp(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else x
