"""Weights to 4-bit codes: group scales first, then codes, nearest or by GPTQ.

Letters: N out channels, K in channels, G group size. A weight is stored as decode(code) * scale + zero, where scale
and zero belong to its row's group of G neighbouring in channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.reference.e2m1 import E2M1_MAX, decode_e2m1, encode_e2m1
from engine.reference.svdq_linear import Precision

HALF = torch.bfloat16  # of scales, vectors and factors in the files we write, as in published ones
E4M3_TOP = 256.0  # the largest group's scale: leaves the search room below e4m3's 448
DAMPING = 0.01  # of the Hessian's mean diagonal, added to it: GPTQ's own choice
BLOCK = 128  # columns that are rounded before the rest of the weight is corrected

# Group scales that the search tries, as parts of the one that holds the largest weight of the group. For int4 a
# smaller scale clips a few weights and rounds the others finer. e2m1 has no value between 4 and 6, so that a larger
# scale, which puts the largest weight on 4, can be the better one.
CLIPS: dict[Precision, tuple[float, ...]] = {
    "int4": tuple(step / 50 for step in range(30, 51)),
    "nvfp4": tuple(step / 16 for step in range(11, 27)),
}


@dataclass(frozen=True, slots=True)
class Grid:
    """The 16 values a code can stand for, before scale and zero."""

    group_size: int
    encode: Callable[[Tensor], Tensor]  # any number -> the nearest code
    decode: Callable[[Tensor], Tensor]  # code -> its value, fp32

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """codes (N, K), scales (N, K/G) fp32 -> what they stand for, (N, K) fp32; no zeros."""
        groups = self.decode(codes).view(len(codes), -1, self.group_size)
        return (groups * scales.unsqueeze(-1)).view(codes.shape)


INT4 = Grid(64, lambda u: u.round().clamp(-7, 7).to(torch.int8), lambda codes: codes.float())
NVFP4 = Grid(16, encode_e2m1, decode_e2m1)
GRIDS: dict[Precision, Grid] = {"int4": INT4, "nvfp4": NVFP4}


def uint4(group_size: int) -> Grid:
    """Codes 0..15 with a zero per group: modulations (G = 64) and T5 (G = 128)."""
    return Grid(group_size, lambda u: u.round().clamp(0, 15).to(torch.uint8), lambda codes: codes.float())


@dataclass(frozen=True, slots=True)
class GroupScales:
    """Scales as a file stores them, and what they come to.

    effective: (N, K/G) fp32 = wscales * wtscale * wcscales. wtscale () fp32 and wcscales (N,) are NVFP4's.
    """

    effective: Tensor
    wscales: Tensor
    wtscale: Tensor | None = None
    wcscales: Tensor | None = None


def group_scales(
    residual: Tensor, precision: Precision, *, fused: int = 1, importance: Tensor | None = None
) -> GroupScales:
    """A scale for every group of residual (N, K), rounded to what the file can store.

    importance: (K,) how much an error in each in channel matters (the Hessian's diagonal); each group then gets the
    scale of CLIPS with the smallest error. None takes the scale that just holds the largest weight.
    fused: matrices stacked along N (3 for q, k, v): NVFP4 gives each its own outer scale.
    """
    grid = GRIDS[precision]
    groups = residual.view(residual.shape[0], -1, grid.group_size)
    largest = groups.abs().amax(dim=-1)
    if precision == "int4":
        exact, outer = largest / 7, torch.ones_like(largest[:, :1])
    else:
        exact = largest / E2M1_MAX
        outer = torch.cat([_outer_scale(part).expand(len(part)) for part in exact.chunk(fused)])[:, None]

    def stored(ratio: float | Tensor) -> Tensor:
        scales = exact * ratio / outer
        return scales.to(HALF if precision == "int4" else torch.float8_e4m3fn)

    ratio = torch.ones_like(largest)
    if importance is not None:
        weight_of = importance.view(1, -1, grid.group_size)
        smallest = torch.full_like(largest, torch.inf)
        for tried in CLIPS[precision]:
            effective = (stored(tried).float() * outer).unsqueeze(-1)
            values = grid.decode(grid.encode(groups * reciprocal(effective))) * effective
            error = ((values - groups).square() * weight_of).sum(dim=-1)
            ratio = torch.where(error < smallest, tried, ratio)
            smallest = torch.minimum(error, smallest)
    wscales = stored(ratio)
    effective = wscales.float() * outer
    if precision == "int4":
        return GroupScales(effective, wscales)
    if fused > 1:
        return GroupScales(effective, wscales, wcscales=outer.squeeze(-1).to(HALF))
    return GroupScales(effective, wscales, wtscale=outer[0, 0].clone())


def _outer_scale(exact: Tensor) -> Tensor:
    """() fp32 that HALF holds exactly: brings the largest of the scales (N, K/G) to E4M3_TOP."""
    largest = exact.amax()
    return torch.where(largest > 0, largest / E4M3_TOP, 1.0).to(HALF).float()


def reciprocal(scales: Tensor) -> Tensor:
    """1 / scales, and 0 for a group of zeros: its codes are 0."""
    return torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, 1 / scales)


def round_nearest(weight: Tensor, scales: Tensor, grid: Grid, zeros: Tensor | None = None) -> Tensor:
    """weight (N, K) fp32, scales and zeros (N, K/G) fp32 -> codes (N, K)."""
    groups = weight.view(weight.shape[0], -1, grid.group_size)
    shifted = groups if zeros is None else groups - zeros.unsqueeze(-1)
    return grid.encode(shifted * reciprocal(scales).unsqueeze(-1)).view(weight.shape)


def round_gptq(weight: Tensor, scales: Tensor, grid: Grid, hessian: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Round column by column; what a column's rounding did to the output is mended in those not yet rounded.

    Minimizes || x (weight - rounded).T || for inputs with x.T @ x = hessian (K, K) (GPTQ, Frantar et al. 2022).
    Scales stay as they are, so columns go in the order of their importance and not of their groups. Shapes as
    `round_nearest`. A Hessian that cannot be inverted however it is damped rounds to nearest.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = _inverse_factor(hessian[order][:, order])
    if inverse is None:
        return round_nearest(weight, scales, grid, zeros)
    k = weight.shape[1]
    rest = weight[:, order].clone()
    scale = scales.repeat_interleave(grid.group_size, dim=1)[:, order]
    zero = None if zeros is None else zeros.repeat_interleave(grid.group_size, dim=1)[:, order]
    times = reciprocal(scale)
    columns = []
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, factor = rest[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            j = start + i
            column = block[:, i]
            shifted = column if zero is None else column - zero[:, j]
            codes = grid.encode(shifted * times[:, j])
            value = grid.decode(codes) * scale[:, j]
            value = value if zero is None else value + zero[:, j]
            errors[:, i] = (column - value) / factor[i, i]
            block[:, i:].addr_(errors[:, i], factor[i, i:], alpha=-1)
            columns.append(codes)
        rest[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
    codes = torch.stack(columns, dim=1)
    return codes[:, order.argsort()]


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the damped Hessian's inverse, or None if there is none."""
    mean = hessian.diagonal().mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        return None
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = hessian + damping * mean * torch.eye(len(hessian), device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            return upper
    return None
