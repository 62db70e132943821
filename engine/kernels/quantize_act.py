"""quantize_act: activations to few bits and through proj_down, in one pass over x."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from engine.jit import Variant
from engine.kernels import _quantize_rows
from engine.reference import quantize_act as reference
from engine.reference.quantize_act import RANK_SLICE, ActTarget, QuantizedAct


def arrange_target(target: ActTarget) -> ActTarget:
    """The same target with the copies that kernels read; once, when a model is loaded or its LoRAs change."""
    k, rank = target.proj_down.shape
    slices = rank // RANK_SLICE
    # 16 ranks, tile of 8, rank, 32 channels, lane of a quad, channel -> B fragments of mma, 16 bytes a lane
    columns = target.proj_down.T.reshape(slices, 2, 8, k // 32, 4, 8).permute(0, 3, 1, 2, 4, 5)
    # 16 ranks, half of 8, rank, 32 channels, lane of a quad, mma, k or k + 8, channel -> A fragments
    rows = target.proj_down.T.reshape(slices, 2, 8, k // 32, 4, 2, 2, 2).permute(0, 3, 5, 2, 4, 6, 1, 7)
    return replace(
        target,
        inverse_smooth=1 / target.smooth_factor,
        packed_down=columns.reshape(slices, k // 32, 2, 32, 8).contiguous(),
        factors=rows.reshape(slices, k // 32, 2, 32, 8).contiguous(),
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
