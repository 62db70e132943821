"""Attention over text and image tokens together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.linear import Act, BranchedLinear
from engine.layers.norms import RMSNorm
from engine.layers.rope import rotate


class Projection(NamedTuple):
    """How some tokens enter an attention: what `linear` (C -> 3C; q, k, v) reads, and the norms of its q and k."""

    linear: BranchedLinear
    norm_q: RMSNorm
    norm_k: RMSNorm
    x: Act
    num_tokens: int


def joint_attention(projections: Sequence[Projection], table: tuple[Tensor, Tensor]) -> Tensor:
    """Every token attends to all tokens of all projections: softmax(rot(q) rot(k)^T / sqrt(D)) v.

    table: rotary cos and sin, (L, D / 2) each, L tokens in the order of `projections`. Returns (B, L, C).
    """
    heads = [_normed_heads(one.linear(one.x), one.norm_q, one.norm_k) for one in projections]
    q, k, v = heads[0] if len(heads) == 1 else (torch.cat(parts, dim=2) for parts in zip(*heads, strict=True))
    mixed = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v)
    return mixed.transpose(1, 2).flatten(2)


def _normed_heads(qkv: Tensor, norm_q: RMSNorm, norm_k: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3C), q then k then v -> three of (B, H, L, D), q and k RMS-normalized, each head for itself."""
    head_dim = norm_q.weight.shape[0]
    q, k, v = qkv.view(*qkv.shape[:-1], 3, -1, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return norm_q(q), norm_k(k), v
