"""Attention over text and image tokens together."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.layers.norms import RMSNorm
from engine.layers.rope import rotate


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3C), rows q then k then v -> three of (B, H, L, D)."""
    q, k, v = qkv.view(*qkv.shape[:-1], 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def normed_qkv(qkv: Tensor, num_heads: int, norm_q: RMSNorm, norm_k: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Split into heads and RMS-normalize q and k, each head for itself."""
    q, k, v = split_heads(qkv, num_heads)
    return norm_q(q), norm_k(k), v


def attend(q: Tensor, k: Tensor, v: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """softmax(rot(q) rot(k)^T / sqrt(D)) v: three of (B, H, L, D) -> (B, L, H * D)."""
    mixed = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v)
    return mixed.transpose(1, 2).flatten(2)
