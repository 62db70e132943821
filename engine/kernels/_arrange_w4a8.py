"""4-bit integer weights in the order that svdq_linear's two w4a8 kernels read: records of codes and group scales.

A record holds 128 out channels x one step over the in channels; N is padded to 128, K to whole steps, by zeros.
Codes become sign and magnitude, which are e4m3 numbers times 2^9 (kernels_cu/common/e4m3.cuh). Names in the
comments are the parts of an index: lane = 4 g + q, e the byte of a word, h which half of a word's eight codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.reference.svdq_linear import SVDQuantWeights

TILE = 128
GROUP = 64
E4M3_UNIT = 2.0**-9  # what the code 1 is as e4m3
SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the define SCALE_TYPE
STAGES = 4  # of kernels_cu/common/pipeline.cuh
SM90_STAGES, SM90_STEP = 6, 128


def scale_type(weights: SVDQuantWeights) -> int:
    """The define SCALE_TYPE of both sources: group scales are kept as the file has them."""
    return SCALE_TYPES[weights.wscales.dtype]


def pack_w4a8_sm90(weights: SVDQuantWeights) -> dict[str, Tensor]:
    """qweight (N/128, K/128, record bytes) uint8, K padded to 256, as A fragments of wgmma; outer (N to 128) fp32.

    Raises ValueError for nvfp4 weights and for a code of -8.
    """
    codes, scales = _padded(weights, 2 * SM90_STEP)
    tiles, steps = codes.shape[0] // TILE, codes.shape[1] // SM90_STEP
    fragments = codes.view(tiles, 8, 2, 8, steps, 2, 2, 2, 4, 4)  # tile warp row8 g step group k32 h q e
    fragments = fragments.permute(0, 4, 5, 1, 3, 8, 6, 2, 7, 9)  # tile step group warp g q k32 row8 h e
    rows = scales.view(tiles, 8, 2, 8, steps, 2).permute(0, 4, 5, 1, 3, 2)  # tile step group warp g row8
    return {"qweight": _records(_words(fragments), rows), "outer": _outer(weights)}


def pack_w4a8(weights: SVDQuantWeights) -> dict[str, Tensor]:
    """qweight (N/128, K/64, record bytes) uint8, as B fragments of mma; outer (N to 128) fp32.

    Raises ValueError for nvfp4 weights and for a code of -8.
    """
    codes, scales = _padded(weights, GROUP)
    tiles, steps = codes.shape[0] // TILE, codes.shape[1] // GROUP
    fragments = codes.view(tiles, 8, 2, 8, steps, 2, 2, 4, 4)  # tile pair column8 g step k32 h q e
    fragments = fragments.permute(0, 4, 1, 3, 7, 2, 5, 6, 8)  # tile step pair g q column8 k32 h e
    return {"qweight": _records(_words(fragments), scales.view(tiles, TILE, steps).mT), "outer": _outer(weights)}


def sm90_shared_bytes(scale_type: int) -> int:
    """sizeof(Shared) of svdq_linear.w4a8_sm90.cu."""
    record = SM90_STEP * TILE // 2 + 2 * TILE * _scale_bytes(scale_type)
    return SM90_STAGES * (TILE * SM90_STEP + record + 16) + TILE * TILE * 4


def w4a8_shared_bytes(scale_type: int) -> int:
    """STAGES * sizeof(Stage) of svdq_linear.w4a8.cu."""
    return STAGES * (TILE * GROUP + TILE * GROUP // 2 + TILE * _scale_bytes(scale_type))


def _scale_bytes(scale_type: int) -> int:
    return 2 if scale_type else 4


def _padded(weights: SVDQuantWeights, step: int) -> tuple[Tensor, Tensor]:
    """Codes (N to 128, K to step) uint8 as e4m3, scales (N to 128, K/64)."""
    if weights.precision != "int4":
        raise ValueError(f"w4a8 takes int4 weights, got {weights.precision}")
    codes = weights.codes
    if bool((codes == -8).any()):
        raise ValueError(f"w4a8 takes codes -7..7, got -8 in weights {tuple(codes.shape)}")
    n, k = -codes.shape[0] % TILE, -codes.shape[1] % step
    signed = codes.abs().to(torch.uint8) | (codes < 0).to(torch.uint8) << 7
    pad = torch.nn.functional.pad
    return pad(signed, (0, k, 0, n)), pad(weights.wscales, (0, k // GROUP, 0, n))


def _words(codes: Tensor) -> Tensor:
    """(..., 2, 4) bytes, four found by a mask and four after a turn by 4 bits -> (...) int32."""
    first, second = codes.contiguous().view(torch.int32).squeeze(-1).unbind(-1)
    return first | (second >> 4 & 0x0FFFFFFF) | second << 28


def _records(words: Tensor, scales: Tensor) -> Tensor:
    """(tiles, steps, ...) int32 and (tiles, steps, ...) of any type -> (tiles, steps, bytes) uint8."""
    parts = [part.contiguous().flatten(2).view(torch.uint8) for part in (words, scales)]
    return torch.cat(parts, dim=-1)


def _outer(weights: SVDQuantWeights) -> Tensor:
    """(N to 128) fp32: wtscale x wcscales / E4M3_UNIT."""
    n = weights.out_features
    outer = torch.full((n,), 1 / E4M3_UNIT, dtype=torch.float32, device=weights.codes.device)
    if weights.wtscale is not None:
        outer *= weights.wtscale.float()
    if weights.wcscales is not None:
        outer *= weights.wcscales.float()
    return torch.nn.functional.pad(outer, (0, -n % TILE))
