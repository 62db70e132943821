"""The order in which w4a8 kernels read weights: what their lanes hold is what the reference multiplies by.

The fragments are those of the PTX ISA (mma.m16n8k32 and wgmma.m64nNk32, 8-bit types): lane = 4 g + q.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from engine.kernels._arrange_w4a8 import pack_w4a8, pack_w4a8_sm90, scale_type
from engine.reference.svdq_linear import SVDQuantWeights

SIZES = [(128, 256), (264, 512), (8, 64), (136, 192)]
LANE = torch.arange(32)
G, Q = LANE // 4, LANE % 4


def weights_of(n: int, k: int, dtype: torch.dtype = torch.bfloat16, outer: bool = True) -> SVDQuantWeights:
    """Scales are powers of two, so that every sum below is exact."""
    return SVDQuantWeights(
        precision="int4",
        codes=torch.randint(-7, 8, (n, k), dtype=torch.int8),
        wscales=torch.randint(-6, 0, (n, k // 64)).float().exp2().to(dtype),
        smooth_factor=torch.ones(k),
        bias=None,
        proj_down=torch.zeros(k, 0),
        proj_up=torch.zeros(n, 0),
        wtscale=torch.tensor(0.5) if outer else None,
        wcscales=torch.randint(-2, 3, (n,)).float().exp2() if outer else None,
    )


def e4m3(words: Tensor) -> Tensor:
    """(...) int32 -> (..., 4) fp32, the e4m3 numbers of its bytes."""
    return words.contiguous().view(torch.float8_e4m3fn).view(*words.shape, 4).float()


def eight(words: Tensor) -> tuple[Tensor, Tensor]:
    """What first_four and second_four of kernels_cu/common/e4m3.cuh make of words: two times (..., 4) fp32."""
    mask = torch.tensor(0x87878787 - 2**32, dtype=torch.int32)
    turned = words << 4 | (words >> 28 & 15)
    return e4m3(words & mask), e4m3(turned & mask)


def parts(record: Tensor, code_bytes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A record's codes as (..., 32 lanes, 4 words) and its scales."""
    codes = record[:code_bytes].view(torch.int32).view(-1, 32, 4)
    return codes, record[code_bytes:].view(dtype).float()


def wgmma_weights(packed: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(N, K) fp32: what svdq_linear.w4a8_sm90 multiplies by, from the registers of its lanes."""
    qweight = packed["qweight"]
    tiles, steps = qweight.shape[:2]
    dense = torch.zeros(tiles * 128, steps * 128)
    for tile in range(tiles):
        for step in range(steps):
            codes, scales = parts(qweight[tile, step], 2 * 4096, dtype)
            for group in range(2):
                for warp in range(8):
                    words = codes[8 * group + warp]
                    rows = tile * 128 + 16 * warp + G
                    place = group * 128 + (32 * warp + LANE) // 4 * 2  # of the scales of rows g and g + 8
                    for k32 in range(2):
                        k = step * 128 + 64 * group + 32 * k32 + 4 * Q
                        a0, a2 = eight(words[:, 2 * k32])
                        a1, a3 = eight(words[:, 2 * k32 + 1])
                        for a, row, channel in ((a0, 0, 0), (a1, 8, 0), (a2, 0, 16), (a3, 8, 16)):
                            scale = scales[place + row // 8]
                            for e in range(4):
                                dense[rows + row, k + channel + e] = a[:, e] * scale
    return dense * packed["outer"].unsqueeze(-1)


def mma_weights(packed: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(N, K) fp32: what svdq_linear.w4a8 multiplies by, from the registers of its lanes."""
    qweight = packed["qweight"]
    tiles, steps = qweight.shape[:2]
    dense = torch.zeros(tiles * 128, steps * 64)
    for tile in range(tiles):
        for step in range(steps):
            codes, scales = parts(qweight[tile, step], 4096, dtype)
            for j in range(16):
                words = codes[j // 2][:, 2 * (j % 2) :]
                column = tile * 128 + 8 * j + G  # of B; the scales are those of the columns of C
                for k32 in range(2):
                    for b, channel in zip(eight(words[:, k32]), (0, 16), strict=True):
                        for e in range(4):
                            k = step * 64 + 32 * k32 + 4 * Q + channel + e
                            dense[column, k] = b[:, e] * scales[8 * j + G]
    return dense * packed["outer"].unsqueeze(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_lanes_of_wgmma_hold_the_weights(n: int, k: int, dtype: torch.dtype) -> None:
    weights = weights_of(n, k, dtype)
    packed = pack_w4a8_sm90(weights)
    bytes_of_scale = {0: 4, 1: 2, 2: 2}[scale_type(weights)]
    assert packed["qweight"].shape == (-(-n // 128), -(-k // 256) * 2, 8192 + 256 * bytes_of_scale)
    found = wgmma_weights(packed, dtype)
    assert torch.equal(found[:n, :k], weights.residual())
    assert not found[n:].any()
    assert not found[:, k:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_lanes_of_mma_hold_the_weights(n: int, k: int, dtype: torch.dtype) -> None:
    weights = weights_of(n, k, dtype)
    packed = pack_w4a8(weights)
    found = mma_weights(packed, dtype)
    assert torch.equal(found[:n], weights.residual())
    assert not found[n:].any()


def test_without_outer_scales_only_the_unit_of_e4m3_is_left() -> None:
    packed = pack_w4a8(weights_of(8, 64, outer=False))
    assert packed["outer"].tolist() == [512.0] * 8 + [0.0] * 120


@pytest.mark.parametrize("pack", [pack_w4a8, pack_w4a8_sm90])
def test_what_has_no_place_is_refused(pack) -> None:  # type: ignore[no-untyped-def]
    weights = weights_of(8, 64)
    weights.codes[3, 5] = -8
    with pytest.raises(ValueError, match=r"-8.*\(8, 64\)"):
        pack(weights)
    nvfp4 = replace(
        weights,
        precision="nvfp4",
        codes=torch.zeros(8, 64, dtype=torch.uint8),
        wscales=torch.zeros(8, 4).to(torch.float8_e4m3fn),
    )
    with pytest.raises(ValueError, match="nvfp4"):
        pack(nvfp4)


def test_a_turned_tile_meets_no_bank_twice() -> None:
    """svdq_linear.w4a8_sm90 turns its tile through shared memory; the exchange of columns by token spreads both."""

    def column(token: int, channel: int) -> int:
        return channel ^ (((token & 3) ^ (token >> 2 & 1)) << 3 | (token & 1) << 2)

    for j in range(16):
        for i in range(2):  # a warp's writes: 8 channels x 4 tokens
            banks = {(8 * j + 2 * q + i) * 128 + column(8 * j + 2 * q + i, g) for g in range(8) for q in range(4)}
            assert len({bank % 32 for bank in banks}) == 32
    for g, t, four in product(range(0, 8, 2), range(4), (0, 4)):  # reads of 16 bytes go by 8 lanes
        places = [token * 128 + column(token, 32 * t + 8 * q + four) for token in (g, g + 1) for q in range(4)]
        assert len({(place + i) % 32 for place in places for i in range(4)}) == 32


def test_a_turned_tile_of_16_bit_numbers_meets_no_bank_twice() -> None:
    """16 bytes at a time: 8 tokens of a channel's matrix are written together, 2 tokens x 32 channels are read."""

    def chunk(token: int, chunk: int) -> int:
        return chunk ^ ((token & 1) << 2 | (token >> 1 & 3))

    for written in range(16):
        assert len({chunk(token, written) % 8 for token in range(8)}) == 8
    for g, t in product(range(0, 8, 2), range(4)):
        assert len({chunk(token, 4 * t + q) % 8 for token in (g, g + 1) for q in range(4)}) == 8
