"""modulation_w4a16: the adaLN linears of a network, one row of x for each picture, weights of 4 bits read once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.jit import Variant, launch
from engine.reference import modulation_w4a16 as reference
from engine.reference.linear_w4a16 import W4A16Weights

GROUP, TILE_ROWS, TILE_BATCH, THREADS = 64, 32, 8, 256
HALVES = (torch.float16, torch.bfloat16)
# By the dtypes of x and of the scales, which keep their file's.
VARIANTS = {
    (x, scales): Variant("modulation_w4a16", (("H_BF16", HALVES.index(x)), ("SCALES_BF16", HALVES.index(scales))))
    for x in HALVES
    for scales in HALVES
}


@dataclass(frozen=True, eq=False)
class ArrangedModulation:
    """W4A16Weights in the order of the kernel, on any device. O out, K in channels, T = ceil(O / 32) tiles."""

    codes: Tensor  # (T, K/64, 2, 32, 4) int32, eight codes a word; kernels_cu/modulation_w4a16.cu says which
    scales: Tensor  # (T, K/64, 2, 8, 4) fp16 or bf16: scale and zero of one row, then of the row 8 below
    bias: Tensor | None  # (O,) fp32
    out_features: int

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * GROUP

    def logical(self) -> W4A16Weights:
        """The weights as they were before, with the bias in fp32."""
        tiles, groups = self.codes.shape[:2]
        pairs = self.codes.view(torch.uint8).view(tiles, groups, 2, 8, 4, 4, 2, 2)  # t k h g q i e s
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1)  # ... r
        codes = codes.permute(0, 2, 8, 3, 1, 4, 5, 7, 6).reshape(tiles * TILE_ROWS, groups * GROUP)
        scales = self.scales.view(tiles, groups, 2, 8, 2, 2).permute(5, 0, 2, 4, 3, 1).reshape(2, -1, groups)
        n = self.out_features
        return W4A16Weights(codes[:n].contiguous(), scales[0, :n], scales[1, :n], self.bias, GROUP)


def arrange_modulation(weights: W4A16Weights) -> ArrangedModulation:
    """Put weights into the kernel's order; once, when a model is loaded, on the device where they are."""
    n, k = weights.out_features, weights.in_features
    if weights.group_size != GROUP:
        raise ValueError(f"modulation_w4a16: groups must be of {GROUP} channels, got {weights.group_size}")
    if weights.scales.dtype not in HALVES or weights.zeros.dtype != weights.scales.dtype:
        raise ValueError(
            f"modulation_w4a16: scales and zeros must both be of one of {HALVES}, "
            f"got {weights.scales.dtype} and {weights.zeros.dtype}"
        )
    tiles, groups = -(-n // TILE_ROWS), k // GROUP
    rows = (0, 0, 0, tiles * TILE_ROWS - n)  # of zeros, below
    codes = F.pad(weights.codes, rows).view(tiles, 2, 2, 8, groups, 4, 4, 2, 2)  # t h r g k q i s e
    codes = codes.permute(0, 4, 1, 3, 5, 6, 8, 7, 2).contiguous()  # t k h g q i e s r
    words = (codes[..., 0] | codes[..., 1] << 4).view(tiles, groups, 2, 32, 16).view(torch.int32)
    scales = torch.stack([F.pad(weights.scales, rows), F.pad(weights.zeros, rows)], dim=-1)
    scales = scales.view(tiles, 2, 2, 8, groups, 2).permute(0, 4, 1, 3, 2, 5).reshape(tiles, groups, 2, 8, 4)
    bias = None if weights.bias is None else weights.bias.float()
    return ArrangedModulation(words, scales.contiguous(), bias, n)


def modulation_w4a16(x: Tensor, weights: ArrangedModulation, splits: int) -> Tensor:
    """Shifts, scales (which contain their 1) and gates from a conditioning vector.

    x: (B, K) h, contiguous, behind its SiLU. Eight rows cost what one does; 16 read the weights twice.
    Returns (B, splits, C) h, C = O / splits. CPU tensors go to the reference.
    """
    n, k = weights.out_features, weights.in_features
    if x.ndim != 2 or x.shape[1] != k or not len(x) or n % splits:
        raise ValueError(
            f"modulation_w4a16: x must be (B, {k}) and {n} rows a multiple of {splits}, got x {tuple(x.shape)}"
        )
    if not x.is_cuda:
        return reference.modulation_w4a16(x, weights.logical(), splits)
    if x.dtype not in HALVES or not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(
            f"modulation_w4a16: x must be of one of {HALVES}, contiguous, at a multiple of 16 bytes, "
            f"got {x.dtype} with strides {x.stride()} at byte {x.data_ptr() % 256} of 256"
        )
    out = torch.empty(len(x), splits, n // splits, dtype=x.dtype, device=x.device)
    tiles, groups = weights.codes.shape[:2]
    launch(
        VARIANTS[x.dtype, weights.scales.dtype], (tiles, -(-len(x) // TILE_BATCH)), (THREADS,),
        x, weights.codes, weights.scales, weights.bias, out, len(x), groups, n,
    )  # fmt: skip
    return out


def variants(arch: str) -> list[Variant]:
    """What can be launched on an architecture; sm_75 has no bf16 products."""
    return [variant for (x, _), variant in VARIANTS.items() if arch != "75" or x == torch.float16]
