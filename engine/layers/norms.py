"""Norms, computed in fp32 whatever the network's dtype is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without weights (Ba et al. 2016); FLUX's modulation follows it."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019). weight: (D,)."""

    weight: nn.Parameter

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), EPS).to(x.dtype)
