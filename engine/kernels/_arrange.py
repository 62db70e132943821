"""Weights in the order in which kernels read them: made once, when a model is loaded, on whatever device they are.

Letters: N out channels (filled up with zeros to a multiple of 128), K in channels, R rank, h the network's 16-bit
type. A tile is 8 out channels; a lane is 4 * g + q, g = 0..7 a tile's channel, q = 0..3. The .cu files say what
stands where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import SVDQuantWeights

TILE_COLUMNS = 128
# Bits of nvfp4's 8-bit scales as w4a16 reads them: 5 exponent bits and 3 of mantissa, so that e4m3's subnormals are
# normal numbers: code + 24, and the seven subnormals m * 2^-9 one by one.
_WIDE_SCALES = torch.tensor([0, 8, 16, 20, 24, 26, 28, 30, *range(32, 153), *[0] * 127], dtype=torch.uint8)
# An e2m1 code's bits are its value * 2^-126 as bf16 or * 2^-14 as fp16; the scales come * 2^118 or 2^7.
# The first two codes of four need one shift, or none, to bring sign and bits to their place in h; the others two.
NVFP4_PLACES = {
    torch.bfloat16: ((15, 6), (12, 3), (14, 9), (13, 0)),
    torch.float16: ((15, 9), (7, 1), (8, 12), (0, 4)),
}
_NVFP4_FACTOR = {torch.bfloat16: 2.0**8, torch.float16: 2.0**7}


def pad_rows(matrix: Tensor) -> Tensor:
    """(N, ...) -> (N to a multiple of 128, ...), zeros below."""
    missing = -matrix.shape[0] % TILE_COLUMNS
    if not missing:
        return matrix
    return torch.cat([matrix, matrix.new_zeros(missing, *matrix.shape[1:])])


def pack_proj_up(proj_up: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, R) -> (N/128, R/16, 8, 32, 8) h: the B fragments of two tiles, 16 bytes a lane."""
    rank = proj_up.shape[1]
    up = pad_rows(proj_up.to(dtype)).view(
        -1, 8, 2, 8, rank // 16, 2, 4, 2
    )  # N/128, pair, tile, g, R/16, half, q, 2
    return up.permute(0, 4, 1, 3, 6, 2, 5, 7).reshape(up.shape[0], rank // 16, 8, 32, 8).contiguous()


def pack_w4a4(weights: SVDQuantWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """int4 weights for svdq_linear.w4a4: records (N/128, K/64, 4352) uint8, and outer scales or None."""
    words = _pack_pairs(pad_rows(weights.codes)).view(torch.int32)  # (N, K/8): 8 codes each
    words = words.view(-1, 8, 2, 8, weights.in_features // 64, 2, 4)  # N/128, pair, tile, g, K/64, half, q
    codes = words.permute(0, 4, 1, 3, 6, 2, 5).contiguous().view(torch.uint8).flatten(2)
    scales, factor = _half_scales(weights.wscales, dtype)
    scales = pad_rows(scales).view(-1, 4, 4, 4, 2, codes.shape[1])  # N/128, four tiles, tile, q, 2, K/64
    scales = scales.permute(0, 5, 1, 3, 2, 4).contiguous().view(torch.uint8).flatten(2)
    return torch.cat([codes.flatten(2), scales.flatten(2)], dim=2), outer_scales(weights, factor)


def pack_w4a16(weights: SVDQuantWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights for svdq_linear.w4a16: records (N/128, K/64, 4352 for int4, 4608 for nvfp4), and outer scales."""
    if weights.precision == "int4":
        codes = _fragments_k32(weights.codes + 8)  # 0..15
        scales, factor = _half_scales(weights.wscales, dtype)
        scales = _scales_by_channel(scales)
    else:
        bits = weights.wscales.view(torch.uint8).int()
        silent = (bits == 0).repeat_interleave(16, dim=1)  # a scale of 0 has no code of its own: its codes are 0
        codes = _fragments_k32(weights.codes.masked_fill(silent, 0), NVFP4_PLACES[dtype])
        wide = pad_rows(_WIDE_SCALES.to(bits.device)[bits])
        wide = wide.view(-1, 2, 8, 8, weights.in_features // 32, 2)  # N/128, eight tiles, tile, g, K/32, k16
        scales = wide.permute(0, 4, 1, 3, 2, 5).reshape(wide.shape[0], -1, 512)
        factor = _NVFP4_FACTOR[dtype]
    codes = codes.view(codes.shape[0], -1, 4096)
    return torch.cat([codes, scales], dim=2), outer_scales(weights, factor)


def pack_linear_w4a16(weights: W4A16Weights, dtype: torch.dtype) -> Tensor:
    """Weights for linear_w4a16: records (N/128, K/G, 64 G + 512) uint8: codes, scales, zeros."""
    codes = _fragments_k32(weights.codes)
    codes = codes.view(codes.shape[0], -1, weights.group_size * 64)
    parts = (_scales_by_channel(part.to(dtype)) for part in (weights.scales, weights.zeros))
    return torch.cat([codes, *parts], dim=2)


def outer_scales(weights: SVDQuantWeights, factor: float = 1.0) -> Tensor | None:
    """(N to 128,) fp32: factor * wtscale * wcscales, or None where that is 1 everywhere."""
    if weights.wtscale is None and weights.wcscales is None and factor == 1.0:
        return None
    outer = torch.full((weights.out_features,), factor, device=weights.codes.device)
    if weights.wtscale is not None:
        outer = outer * weights.wtscale.float()
    if weights.wcscales is not None:
        outer = outer * weights.wcscales.float()
    return pad_rows(outer)


def _pack_pairs(codes: Tensor) -> Tensor:
    """(..., K) 4-bit codes -> (..., K/2) uint8, even code in the low nibble."""
    codes = codes.view(torch.uint8)
    return (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)


def _half_scales(wscales: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Group scales as h, and the power of two they were divided by: small bf16 scales leave fp16's normal range."""
    if dtype != torch.float16 or wscales.dtype == torch.float16:
        return wscales.to(dtype), 1.0
    largest = float(wscales.abs().max())
    factor = 2.0 ** (torch.tensor(largest).frexp().exponent.item() if largest > 0 else 0)
    return (wscales.float() / factor).to(dtype), factor


def _fragments_k32(codes: Tensor, places: tuple[tuple[int, int], ...] | None = None) -> Tensor:
    """(N, K) codes 0..15 -> (N/128, K/32, 2048) uint8: 16 bytes a lane are four tiles' B fragments for k32.

    Code i = 2 s + r of a word's lower half is channel 16 s + 8 r + 2 q; the upper half has the ones behind them.
    places: the sign's bit and the lowest bit of the magnitude of each of the four; None: nibbles in order.
    """
    codes = pad_rows(codes.view(torch.uint8))
    codes = codes.view(codes.shape[0], -1, 2, 2, 4, 2).permute(0, 1, 4, 5, 2, 3)  # N, K/32, q, 2, k16, k8
    if places is None:
        words = _pack_pairs(codes.reshape(codes.shape[0], -1, 8)).view(torch.int32).squeeze(2)
    else:
        halves = torch.zeros(codes.shape[:4], dtype=torch.int32, device=codes.device)
        for code, (sign, magnitude) in zip(codes.flatten(4).unbind(4), places, strict=True):
            code = code.int()
            halves |= (code >> 3 << sign) | ((code & 7) << magnitude)
        words = halves.to(torch.int16).view(torch.int32).flatten(1)
    words = words.view(-1, 4, 4, 8, words.shape[1] // 4, 4)  # N/128, four tiles, tile, g, K/32, q
    return words.permute(0, 4, 1, 3, 5, 2).contiguous().view(torch.uint8).flatten(2)


def _scales_by_channel(scales: Tensor) -> Tensor:
    """(N, K/G) h -> (N/128, K/G, 256) uint8: 16 bytes are channel g of eight tiles."""
    scales = pad_rows(scales)
    scales = scales.view(-1, 2, 8, 8, scales.shape[1])  # N/128, eight tiles, tile, g, K/G
    return scales.permute(0, 4, 1, 3, 2).contiguous().view(torch.uint8).flatten(2)
