"""The part of a weight that 4 bits do not have to hold: its largest singular directions, kept in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 16  # directions looked at beyond the rank
POWER_STEPS = 2  # passes over the weight that sharpen them
EXACT_UP_TO = 1024  # the smaller side of a weight whose SVD still takes less than a second


def split_low_rank(weight: Tensor, rank: int, *, exact: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """weight (N, K) = proj_up (N, R) @ proj_down (K, R).T + residual (N, K), the residual as small as R allows.

    fp32 in and out. R is `rank`, or less for a weight with fewer directions; always a multiple of 16. Both factors
    carry the square root of the singular values, so that 16 bits suit both. exact: a full SVD, or a randomized one
    (Halko, Martinsson and Tropp 2011), whose residual is larger by less than a percent; None decides by size.
    """
    rank = min(rank, *weight.shape) // 16 * 16
    if rank == 0:
        return weight.new_zeros(weight.shape[0], 0), weight.new_zeros(weight.shape[1], 0), weight
    if exact is None:
        exact = min(weight.shape) <= EXACT_UP_TO
    if exact:
        u, s, vt = (part.float() for part in torch.linalg.svd(weight.double(), full_matrices=False))
    else:
        u, s, vt = _randomized_svd(weight, rank)
    root = s[:rank].sqrt()
    proj_up, proj_down = u[:, :rank] * root, vt[:rank].T * root
    return proj_up, proj_down, weight - proj_up @ proj_down.T


def _randomized_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    width = min(rank + OVERSAMPLING, n, k)
    generator = torch.Generator().manual_seed(0)  # the same directions in every run
    directions = torch.randn(k, width, generator=generator).to(weight)
    basis, _ = torch.linalg.qr(weight @ directions)
    for _ in range(POWER_STEPS):
        basis, _ = torch.linalg.qr(weight.T @ basis)
        basis, _ = torch.linalg.qr(weight @ basis)
    u, s, vt = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vt
