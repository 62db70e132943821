"""The packed layouts of public SVDQuant files, as torch reshape and permute on any device.

Each layout is what one lane of a warp wants to load at once, so an index is split into a tile, a lane, a register
and a position in it, and these are exchanged. The names in the comments are those parts, in the order of the axes.
Every `pack_` has an `unpack_` that undoes it exactly. N out and K in channels are multiples of 128 here, the
rank R of 16; padding is the caller's. Raises ValueError for other sizes. Source: the public file format.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128  # rows of a weight tile, and what N and K are padded to
RANK_TILE = 16
MICRO = 64  # in channels of one matrix instruction
CACHE_BYTES = 4 << 20


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _check(name: str, tensor: Tensor, *multiples: int) -> None:
    if tensor.ndim != len(multiples) or any(size % of for size, of in zip(tensor.shape, multiples, strict=True)):
        raise ValueError(f"{name}: sizes must be multiples of {multiples}, got {tuple(tensor.shape)}")


def _blocks(result: Tensor) -> list[slice]:
    """Rows of `result` to work on at a time: as many as stay in a CPU's cache (2.3 times as fast), else all."""
    rows = len(result)
    block = max(1, CACHE_BYTES * rows // max(1, result.nbytes)) if result.device.type == "cpu" else max(1, rows)
    return [slice(start, start + block) for start in range(0, rows, block)]


def pack_qweight(codes: Tensor) -> Tensor:
    """codes: (N, K) int8 or uint8, of which the low four bits count. Returns (N, K/2) int8."""
    _check("pack_qweight", codes, TILE, TILE)
    n, k = codes.shape
    pairs = codes.view(torch.uint8).view(n, k // 2, 2)
    packed = (pairs[..., 0] & 15) | (pairs[..., 1] << 4)  # even channel in the low nibble
    words = packed.view(torch.int32).view(n // TILE, 8, 2, 8, k // MICRO, 2, 4)  # nt np nk nl kt kp kl
    words = words.permute(0, 4, 1, 3, 6, 2, 5).contiguous()  # nt kt np nl kl nk kp
    return words.view(torch.int8).view(n, k // 2)


def unpack_qweight(qweight: Tensor, *, signed: bool) -> Tensor:
    """qweight: (N, K/2) int8. Returns (N, K): int8 -8..7 if signed, else uint8 0..15."""
    _check("unpack_qweight", qweight, TILE, TILE // 2)
    n, k = qweight.shape[0], qweight.shape[1] * 2
    words = (
        qweight.contiguous().view(torch.int32).view(n // TILE, k // MICRO, 8, 8, 4, 2, 2)
    )  # nt kt np nl kl nk kp
    words = words.permute(0, 2, 5, 3, 1, 6, 4)  # nt np nk nl kt kp kl
    codes = torch.empty(n // TILE, TILE * k // 2, dtype=torch.int16, device=qweight.device)
    for tiles in _blocks(codes):
        pairs = codes[tiles]
        pairs.copy_(words[tiles].contiguous().view(torch.uint8).view(pairs.shape))
        pairs |= pairs << 4  # the two codes of a byte become two bytes of a 16-bit word
        pairs &= 0x0F0F
        if signed:
            pairs |= (pairs & 0x0808) * 30  # bit 3 is the sign: 8 * 30 fills the upper four bits of its byte
    return codes.view(torch.int8 if signed else torch.uint8).view(n, k)


def pack_channels(values: Tensor) -> Tensor:
    """A vector over N or K, any dtype: bias, smooth_factor, wcscales. Same shape."""
    _check("pack_channels", values, TILE)
    return values.view(-1, 8, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(values.shape)


def unpack_channels(packed: Tensor) -> Tensor:
    _check("unpack_channels", packed, TILE)
    return packed.view(-1, 8, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(packed.shape)


def pack_wscales_int4(wscales: Tensor) -> Tensor:
    """wscales: (N, K/64) h. Returns (K/64, N), a shape in name only: memory runs over tiles of N first."""
    _check("pack_wscales_int4", wscales, TILE, 1)
    n, groups = wscales.shape
    lanes = wscales.view(n // TILE, 8, 2, 4, 2, groups)
    return lanes.permute(0, 5, 1, 3, 2, 4).reshape(groups, n)


def unpack_wscales_int4(packed: Tensor) -> Tensor:
    """packed: (K/64, N). Returns (N, K/64)."""
    _check("unpack_wscales_int4", packed, 1, TILE)
    groups, n = packed.shape
    lanes = packed.contiguous().view(n // TILE, groups, 8, 4, 2, 2)
    return lanes.permute(0, 2, 4, 3, 5, 1).reshape(n, groups)


def pack_wscales_nvfp4(wscales: Tensor) -> Tensor:
    """wscales: (N, K/16), one byte each. Returns (K/16, N), again a shape in name only."""
    _check("pack_wscales_nvfp4", wscales, TILE, MICRO // 16)
    n, groups = wscales.shape
    lanes = wscales.view(n // TILE, 4, 4, 8, groups // 4, 4)  # nt s q r kt kk
    return lanes.permute(0, 4, 3, 2, 1, 5).reshape(groups, n)  # nt kt r q s kk


def unpack_wscales_nvfp4(packed: Tensor) -> Tensor:
    """packed: (K/16, N). Returns (N, K/16)."""
    _check("unpack_wscales_nvfp4", packed, MICRO // 16, TILE)
    groups, n = packed.shape
    lanes = packed.contiguous().view(n // TILE, groups // 4, 8, 4, 4, 4)  # nt kt r q s kk
    return lanes.permute(0, 4, 3, 2, 1, 5).reshape(n, groups)  # nt s q r kt kk


def pack_proj_down(proj_down: Tensor) -> Tensor:
    """proj_down: (K, R). Returns (K, R)."""
    _check("pack_proj_down", proj_down, RANK_TILE, RANK_TILE)
    k, rank = proj_down.shape
    tiles = proj_down.reshape(k // 16, 2, 4, 2, rank // 16, 2, 8)  # kt kb kl k0 rt ra rl
    return tiles.permute(0, 4, 6, 2, 5, 1, 3).reshape(k, rank)  # kt rt rl kl ra kb k0


def unpack_proj_down(packed: Tensor) -> Tensor:
    _check("unpack_proj_down", packed, RANK_TILE, RANK_TILE)
    k, rank = packed.shape
    tiles = packed.reshape(k // 16, rank // 16, 8, 4, 2, 2, 2)  # kt rt rl kl ra kb k0
    return tiles.permute(0, 5, 3, 6, 1, 4, 2).reshape(k, rank)  # kt kb kl k0 rt ra rl


def pack_proj_up(proj_up: Tensor) -> Tensor:
    """proj_up: (N, R). Returns (N, R)."""
    _check("pack_proj_up", proj_up, RANK_TILE, RANK_TILE)
    n, rank = proj_up.shape
    tiles = proj_up.reshape(n // 16, 2, 8, rank // 16, 2, 4, 2)  # nt na nl rt rb rl r0
    return tiles.permute(0, 3, 2, 5, 1, 4, 6).reshape(n, rank)  # nt rt nl rl na rb r0


def unpack_proj_up(packed: Tensor) -> Tensor:
    _check("unpack_proj_up", packed, RANK_TILE, RANK_TILE)
    n, rank = packed.shape
    tiles = packed.reshape(n // 16, rank // 16, 8, 4, 2, 2, 2)  # nt rt nl rl na rb r0
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(n, rank)  # nt na nl rt rb rl r0


def pack_awq(codes: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """codes: (O, K) uint8 0..15, O a multiple of 4, K of 64.

    Returns (O/4, K/2) int32 as FLUX files have it, or (O/4, K) int16 as the 4-bit T5 file has it: the same bytes.
    """
    _check("pack_awq", codes, 4, MICRO)
    rows, k = codes.shape
    parts = codes.view(rows // 4, 4, k // MICRO, 2, 4, 8).to(torch.int16)  # ot oi kt kh nibble ke
    units = parts[..., 0, :] | parts[..., 1, :] << 4 | parts[..., 2, :] << 8 | parts[..., 3, :] << 12
    units = units.permute(0, 2, 1, 3, 4).contiguous()  # ot kt oi kh ke
    return units.view(rows // 4, k).view(dtype)


def unpack_awq(packed: Tensor) -> Tensor:
    """packed: (O/4, K/2) int32 or (O/4, K) int16. Returns (O, K) uint8 0..15."""
    units = packed.contiguous().view(torch.int16)
    _check("unpack_awq", units, 1, MICRO)
    tiles, k = units.shape
    units = units.view(tiles, k // MICRO, 4, 2, 8).permute(0, 2, 1, 3, 4)  # ot oi kt kh ke
    codes = torch.empty(tiles, 4, k // MICRO, 2, 4, 8, dtype=torch.uint8, device=packed.device)  # + nibble
    for block in _blocks(codes):
        some = units[block].contiguous()
        for nibble in range(4):
            codes[block, ..., nibble, :] = (some >> 4 * nibble) & 15
    return codes.view(tiles * 4, k)


def interleave_splits(rows: Tensor, splits: int) -> Tensor:
    """Rows split by split (all shifts, all scales, ...) -> channel by channel, as files keep modulation layers."""
    return rows.view(splits, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def deinterleave_splits(rows: Tensor, splits: int) -> Tensor:
    """Undoes `interleave_splits`: the first rows.shape[0] / splits rows are the first split."""
    return rows.view(-1, splits, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def pack_rotary(table: Tensor) -> Tensor:
    """table: (M, D) fp32, column 2 * pair + (0 sine, 1 cosine), M a multiple of 16, D of 8. Same shape."""
    _check("pack_rotary", table, 16, 8)
    m, d = table.shape
    return table.reshape(m // 16, 2, 8, d // 8, 4, 2).permute(0, 3, 2, 4, 1, 5).reshape(m, d)


def unpack_rotary(packed: Tensor) -> Tensor:
    _check("unpack_rotary", packed, 16, 8)
    m, d = packed.shape
    return packed.reshape(m // 16, d // 8, 8, 4, 2, 2).permute(0, 4, 2, 1, 3, 5).reshape(m, d)
