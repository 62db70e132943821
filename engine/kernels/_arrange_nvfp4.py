"""nvfp4 weights in the order that svdq_linear.nvfp4.cu reads: records of e2m1 codes and e4m3 group scales.

A record holds 128 out channels x 64 in channels; N is padded to 128 by zeros. Names in the comments are the parts
of an index: lane = 4 g + q. Source: PTX ISA, the fragments of m16n8k64 and "Block Scaling for mma.sync".
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.reference.svdq_linear import SVDQuantWeights

TILE = 128
STEP = 64
STAGES = 4  # of kernels_cu/common/pipeline.cuh


def pack_nvfp4(weights: SVDQuantWeights) -> dict[str, Tensor]:
    """qweight (N/128, K/64, 4608) uint8; outer (N to 128) fp32, wtscale x wcscales.

    Raises ValueError for int4 weights and where K is no multiple of 64.
    """
    n, k = weights.codes.shape
    if weights.precision != "nvfp4" or k % STEP:
        raise ValueError(f"nvfp4 takes nvfp4 weights, K a multiple of {STEP}; got {weights.precision} {n, k}")
    pad = torch.nn.functional.pad
    nibbles = weights.codes[:, 0::2] | weights.codes[:, 1::2] << 4
    codes = pad(nibbles, (0, 0, 0, -n % TILE))
    scales = pad(weights.wscales.view(torch.uint8), (0, 0, 0, -n % TILE))
    tiles, steps = codes.shape[0] // TILE, k // STEP
    fragments = codes.view(tiles, 8, 2, 8, steps, 2, 4, 4)  # tile pair column8 g step k32 q byte
    fragments = fragments.permute(0, 4, 1, 3, 6, 2, 5, 7)  # tile step pair g q column8 k32 byte
    words = scales.view(tiles, 4, 4, 8, steps, 4)  # tile four column8 g step k16
    words = words.permute(0, 4, 1, 3, 2, 5)  # tile step four g column8 k16
    records = [part.contiguous().flatten(2) for part in (fragments, words)]
    outer = torch.ones(n, dtype=torch.float32, device=codes.device)
    if weights.wtscale is not None:
        outer *= weights.wtscale.float()
    if weights.wcscales is not None:
        outer *= weights.wcscales.float()
    return {"qweight": torch.cat(records, dim=-1), "outer": pad(outer, (0, -n % TILE))}


def nvfp4_shared_bytes() -> int:
    """STAGES * sizeof(Stage) of svdq_linear.nvfp4.cu."""
    return STAGES * (TILE * STEP // 2 + TILE * STEP // 2 + TILE * STEP // 16 + TILE * 4)
