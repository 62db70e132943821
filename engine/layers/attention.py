"""Attention over text and image tokens together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.layers.attention_backend import attend
from engine.layers.fused_linear import HEAD_DIM, FusedLinear
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
    if all(isinstance(one.linear, FusedLinear) for one in projections) and _head_dim(projections[0]) == HEAD_DIM:
        return attend(*_fused_heads(projections, table))
    heads = [_normed_heads(one) for one in projections]
    q, k, v = heads[0] if len(heads) == 1 else (torch.cat(parts, dim=2) for parts in zip(*heads, strict=True))
    return attend(rotate(q, table), rotate(k, table), v)


def _head_dim(projection: Projection) -> int:
    return projection.norm_q.weight.shape[0]


def _normed_heads(one: Projection) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (B, H, L, D) each, q and k RMS-normalized, each head for itself."""
    qkv = one.linear(one.x)  # (B, L, 3C)
    q, k, v = qkv.view(*qkv.shape[:-1], 3, -1, _head_dim(one)).permute(2, 0, 3, 1, 4).unbind(0)
    return one.norm_q(q), one.norm_k(k), v


def _fused_heads(projections: Sequence[Projection], table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (1, H, L, D) each, normed and turned: views of one tensor that all projections write rows of."""
    counts = [one.num_tokens for one in projections]
    first = projections[0].linear
    assert isinstance(first, FusedLinear)
    qkv = torch.empty(sum(counts), first.out_features, dtype=first.dtype, device=table[0].device)
    parts = zip(projections, qkv.split(counts), *(angles.split(counts) for angles in table), strict=True)
    for one, rows, cos, sin in parts:
        assert isinstance(one.linear, FusedLinear)
        one.linear.write_qkv(rows, one.x, one.norm_q.weight, one.norm_k.weight, (cos, sin))
    q, k, v = qkv.view(1, sum(counts), 3, -1, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
