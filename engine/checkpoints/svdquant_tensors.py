"""Writing public SVDQuant files: from the weights of one linear to the tensors under its prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.checkpoints import svdquant_layout as layout
from engine.checkpoints.svdquant_file import AWQ_ROWS, SUFFIXES, Names
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import SVDQuantWeights


def svdquant_tensors(
    prefix: str, weights: SVDQuantWeights, *, names: Names = "v1", smooth_orig: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of one SVDQuant linear as files have them, padded and packed.

    smooth_orig (K,) is kept by files for other tools; without it smooth_factor is repeated. Padding is what the
    public packer writes: codes and low rank 0, everything else 1.
    """
    n, k = (layout.padded(size, layout.TILE) for size in weights.codes.shape)
    rank = layout.padded(weights.rank, layout.RANK_TILE)
    suffix = SUFFIXES[names]
    groups = k // weights.group_size
    wscales = _pad(weights.wscales, (n, groups), 1)
    smooth_orig = weights.smooth_factor if smooth_orig is None else smooth_orig
    tensors = {
        "qweight": layout.pack_qweight(_pad(weights.codes, (n, k), 0)),
        "wscales": layout.pack_wscales_int4(wscales)
        if weights.precision == "int4"
        else layout.pack_wscales_nvfp4(wscales),
        suffix["smooth"]: layout.pack_channels(_pad(weights.smooth_factor, (k,), 1)),
        suffix["smooth_orig"]: layout.pack_channels(_pad(smooth_orig, (k,), 1)),
    }
    if weights.bias is not None:
        tensors["bias"] = layout.pack_channels(_pad(weights.bias, (n,), 1))
    if rank:
        tensors[suffix["down"]] = layout.pack_proj_down(_pad(weights.proj_down, (k, rank), 0))
        tensors[suffix["up"]] = layout.pack_proj_up(_pad(weights.proj_up, (n, rank), 0))
    if weights.wtscale is not None:
        # Files hold it in the 16-bit type of their other vectors; kept wide where that would change it.
        half = weights.wtscale.to(weights.smooth_factor.dtype)
        exact = bool(half.float() == weights.wtscale)
        tensors["wtscale"] = (half if exact else weights.wtscale.float()).reshape(1)
    if weights.wcscales is not None:
        tensors["wcscales"] = layout.pack_channels(_pad(weights.wcscales, (n,), 1))
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def w4a16_tensors(prefix: str, weights: W4A16Weights, *, splits: int = 1) -> dict[str, Tensor]:
    """The tensors of one weight-only linear as files have them: group 64 as in FLUX files (rows of a modulation
    interleaved), group 128 as in the 4-bit T5 file. The bias of a modulation already holds its +1.
    """
    if weights.group_size not in AWQ_ROWS:
        raise ValueError(f"w4a16_tensors: files have groups of 64 and 128, got {weights.group_size}")
    t5 = weights.group_size == 128
    codes, scales, zeros, bias = weights.codes, weights.scales, weights.zeros, weights.bias
    if splits > 1:
        codes, scales, zeros = (layout.interleave_splits(t, splits) for t in (codes, scales, zeros))
        bias = None if bias is None else layout.interleave_splits(bias, splits)
    rows = layout.padded(scales.shape[1], AWQ_ROWS[weights.group_size])
    shape = (rows, weights.out_features)
    tensors = {
        "qweight": layout.pack_awq(codes, torch.int16 if t5 else torch.int32),
        "scales" if t5 else "wscales": _pad(scales.T, shape, 0),
        "scaled_zeros" if t5 else "wzeros": _pad(zeros.T, shape, 0),
    }
    if bias is not None:
        tensors["bias"] = bias
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def _pad(tensor: Tensor, shape: tuple[int, ...], value: float) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor.contiguous()
    result = torch.full(shape, value, dtype=torch.float32, device=tensor.device).to(tensor.dtype)
    result[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return result
