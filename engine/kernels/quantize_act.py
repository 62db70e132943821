"""quantize_act: activations to few bits and through proj_down, in one pass over x."""

from __future__ import annotations

from torch import Tensor

from engine.jit import Variant
from engine.kernels import _quantize_rows
from engine.kernels._quantize_rows import ArrangedTarget
from engine.reference import quantize_act as reference
from engine.reference.quantize_act import RANK_SLICE, ActTarget, QuantizedAct


def arrange_target(target: ActTarget) -> ArrangedTarget:
    """The same target for kernels to read; once, when a model is loaded or its LoRAs change."""
    k, rank = target.proj_down.shape
    # 16 ranks, half of 8, rank, 32 channels, lane of a quad, mma, k or k + 8, channel -> A fragments of mma
    rows = target.proj_down.T.reshape(rank // RANK_SLICE, 2, 8, k // 32, 4, 2, 2, 2).permute(0, 3, 5, 2, 4, 6, 1, 7)
    return ArrangedTarget(
        format=target.format,
        smooth_factor=target.smooth_factor,
        proj_down=target.proj_down,
        rank_scales=target.rank_scales,
        shift=target.shift,
        inverse_smooth=1 / target.smooth_factor,
        factors=rows.reshape(rank // RANK_SLICE, k // 32, 2, 32, 8).contiguous(),
    )


def quantize_act(x: Tensor, target: ActTarget) -> QuantizedAct:
    """Quantize x as `target` says, and multiply it by target.proj_down.

    x: (M, K) h. Returns codes, scales and low as `QuantizedAct` lays them out; columns of low whose rank scale is
    0 hold anything. On a card x is bf16 or fp16 and the target arranged.
    CPU tensors go to the reference, so every model also runs, slowly, without a GPU.
    """
    if not x.is_cuda:
        return reference.quantize_act(x, target)
    return _quantize_rows.quantize_rows("quantize_act", x, (), target)


def variants(arch: str) -> list[Variant]:
    return _quantize_rows.variants("quantize_act", arch)


def shared_bytes(variant: Variant) -> int:
    return _quantize_rows.shared_bytes(variant)
