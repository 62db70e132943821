"""modulate_quantize: LayerNorm, shift and scale in front of quantize_act, still in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from engine.jit import Variant
from engine.kernels import _quantize_rows
from engine.reference import modulate_quantize as reference
from engine.reference.quantize_act import ActTarget, QuantizedAct


def modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, target: ActTarget) -> QuantizedAct:
    """Quantize h(LayerNorm(x) * scale + shift) as `target` says, and multiply it by target.proj_down.

    x: (M, K) h; shift, scale: (K,) h, scale already contains its 1.
    Returns codes, scales and low as `QuantizedAct` lays them out; columns of low whose rank scale is 0 hold
    anything. On a card x is bf16 or fp16 and the target arranged. CPU tensors go to the reference.
    """
    if not x.is_cuda:
        return reference.modulate_quantize(x, shift, scale, target)
    return _quantize_rows.quantize_rows("modulate_quantize", x, (shift, scale), target)


def variants(arch: str) -> list[Variant]:
    return _quantize_rows.variants("modulate_quantize", arch)


def shared_bytes(variant: Variant) -> int:
    return _quantize_rows.shared_bytes(variant)
