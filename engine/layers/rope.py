"""Rotary positions over several axes (RoFormer, Su et al. 2021; FLUX turns three: t, y, x)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

THETA = 10_000.0


def rotary_table(ids: Tensor, axes_dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """cos and sin, each (L, D / 2) fp32, for positions ids (L, axes); D = sum(axes_dims).

    Angles are computed in fp64: at position 1000 an fp32 angle is already off by 3e-5 radians.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(torch.outer(ids[:, axis].double(), frequencies))
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring pairs of x (B, H, L, D) by the angles of `table`; fp32 inside, x's dtype outside."""
    cos, sin = table
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)  # (B, H, L, D/2) each
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
