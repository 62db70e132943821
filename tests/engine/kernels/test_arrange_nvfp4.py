"""svdq_linear.nvfp4 without the card it is for: what its lanes would compute, from the tensors they would read.

Written from the PTX ISA: "Matrix fragments for mma.m16n8k64" (4-bit types) and "Block scaling for mma.sync", and
its figures on thread-id and byte-id. With kind::mxf4nvf4, scale_vec::4X and selectors {0, 0}: lane = 4 g + q, a
word of scales is its four e4m3 bytes in order of k; the scales of row g come from the lane with q = 0, of row g +
8 from q = 1, those of column g from q = 0. CUTLASS has the same:
MMA_Traits<SM120::BLOCKSCALED::SM120_16x8x64_TN_VS>. tests/kernels/emulated_nvfp4.py runs the source itself, on any
card.
"""

from __future__ import annotations

import hashlib
import re

import pytest
import torch
from torch import Tensor

from engine.jit.sources import KERNELS
from engine.kernels._arrange_nvfp4 import pack_nvfp4
from engine.reference.e2m1 import decode_e2m1
from engine.reference.quantize_act import QuantizedAct, dequantize, pack_nibbles
from engine.reference.svdq_linear import SVDQuantWeights

LANE = torch.arange(32)
G, Q = LANE // 4, LANE % 4


def weights_of(n: int, k: int) -> SVDQuantWeights:
    return SVDQuantWeights(
        precision="nvfp4",
        codes=torch.randint(0, 16, (n, k), dtype=torch.uint8),
        wscales=torch.randint(1, 0x7F, (n, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn),
        smooth_factor=torch.ones(k),
        bias=None,
        proj_down=torch.zeros(k, 0),
        proj_up=torch.zeros(n, 0),
        wtscale=torch.tensor(0.25),
        wcscales=torch.randint(-2, 3, (n,)).float().exp2(),
    )


def act_of(m: int, k: int) -> QuantizedAct:
    codes = pack_nibbles(torch.randint(0, 16, (m, k), dtype=torch.uint8))
    return QuantizedAct("nvfp4", codes, torch.randint(0, 0x7F, (m, k // 16), dtype=torch.uint8), None)


def nibbles(words: Tensor) -> Tensor:
    """(32,) int32 -> (32, 8) values, the first in the lowest bits."""
    return decode_e2m1((words[:, None] >> 4 * torch.arange(8) & 15).to(torch.uint8))


def scales_of(words: Tensor) -> Tensor:
    """(32,) int32 -> (32, 4) the e4m3 bytes of each lane's word."""
    return words.contiguous().view(torch.float8_e4m3fn).view(32, 4).float()


def mma(a: list[Tensor], b: list[Tensor], a_scales: Tensor, b_scales: Tensor) -> Tensor:
    """One instruction from the registers of a warp's 32 lanes: the (16, 8) matrix that it adds."""
    rows, columns = torch.zeros(16, 64, dtype=torch.float64), torch.zeros(8, 64, dtype=torch.float64)
    for register, (row, k) in enumerate(((0, 0), (8, 0), (0, 32), (8, 32))):
        values = nibbles(a[register])
        for i in range(8):
            rows[G + row, 8 * Q + k + i] = values[:, i].double()
    for register, k in enumerate((0, 32)):
        values = nibbles(b[register])
        for i in range(8):
            columns[G, 8 * Q + k + i] = values[:, i].double()
    of_rows, of_columns = scales_of(a_scales), scales_of(b_scales)
    for g in range(8):
        rows[g] *= of_rows[4 * g].repeat_interleave(16)
        rows[g + 8] *= of_rows[4 * g + 1].repeat_interleave(16)
        columns[g] *= of_columns[4 * g].repeat_interleave(16)
    return rows @ columns.T


def ldmatrix_x4(shared: Tensor, address: Tensor) -> list[Tensor]:
    """address: (32,) of 16-byte rows in `shared`. Register i of lane 4 g + q: bytes 4 q.. of row g of matrix i."""
    words = shared.view(torch.int32)
    return [words[address[8 * i + G] // 4 + Q] for i in range(4)]


def kernel(act: QuantizedAct, packed: dict[str, Tensor]) -> Tensor:
    """(M, N) float64: the sums over K of svdq_linear.nvfp4.cu before its epilogue, by that file's addresses."""
    assert act.scales is not None
    (tiles, steps, _), m = packed["qweight"].shape, act.num_tokens
    blocks = -(-m // 128)
    y = torch.zeros(blocks * 128, tiles * 128, dtype=torch.float64)
    threads = torch.arange(128)
    for block in range(blocks):
        for step in range(steps):
            act_stage = torch.zeros(4096, dtype=torch.uint8)
            for i in range(2):  # E2M1Tile::load
                row = threads // 2 + 64 * i
                to = row * 32 + (threads % 2 ^ (row >> 2 & 1)) * 16
                source = (block * 128 + row).clamp(max=m - 1)
                for byte in range(16):
                    act_stage[to + byte] = act.codes[source, step * 32 + threads % 2 * 16 + byte]
            scale_stage = act.scales[(block * 128 + threads).clamp(max=m - 1)][:, 4 * step : 4 * step + 4]
            ascales = scale_stage.contiguous().view(torch.int32).flatten()
            for tile in range(tiles):
                record = packed["qweight"][tile, step]
                codes = record[:4096].view(torch.int32).view(-1, 4)  # a uint4 each
                wscales = record[4096:].view(torch.int32).view(-1, 4)
                for row in range(0, 128, 16):  # E2M1Tile::multiply
                    matrix_row = row + LANE % 16
                    a = ldmatrix_x4(act_stage, matrix_row * 32 + (LANE // 16 ^ (matrix_row >> 2 & 1)) * 16)
                    a_scales = ascales[row + G + 8 * (LANE & 1)]
                    for i in range(4):
                        w, even, odd = wscales[8 * i + G], codes[64 * i + LANE], codes[64 * i + 32 + LANE]
                        for j, (b0, b1) in enumerate(((even, 0), (even, 2), (odd, 0), (odd, 2))):
                            c = mma(a, [b0[:, b1], b0[:, b1 + 1]], a_scales, w[:, j])
                            columns = slice(tile * 128 + 8 * (4 * i + j), tile * 128 + 8 * (4 * i + j) + 8)
                            y[block * 128 + row : block * 128 + row + 16, columns] += c
    return y * packed["outer"].double()


@pytest.mark.parametrize(("m", "n", "k"), [(16, 128, 64), (130, 136, 128)], ids=["one tile", "ragged"])
def test_lanes_compute_the_reference_bit_for_bit(m: int, n: int, k: int) -> None:
    weights, act = weights_of(n, k), act_of(m, k)
    packed = pack_nvfp4(weights)
    assert packed["qweight"].shape == (-(-n // 128), k // 64, 4608)
    found = kernel(act, packed)
    # In float64 every product (12 bits) and every sum of a few hundred of them is exact.
    assert torch.equal(found[:m, :n], dequantize(act).double() @ weights.residual().double().T)
    assert not found[:, n:].any()


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 64.*8, 80"):
        pack_nvfp4(weights_of(8, 80))


def test_the_kernel_is_still_the_one_that_is_repeated_here() -> None:
    """Whoever changes the instruction or E2M1Tile repeats that in `mma` and `kernel`, and then changes this."""
    text = (KERNELS / "svdq_linear.nvfp4.cu").read_text("utf-8")
    repeated = text[text.index("constexpr int ACT_BYTES") : text.index('extern "C"')]
    code = re.sub(r"//.*|\s+", "", repeated)
    assert hashlib.sha256(code.encode()).hexdigest()[:16] == "4e297ea119496ca6"
