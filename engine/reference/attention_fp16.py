"""attention_fp16: attention whose kernel sums both of its products in fp16."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_fp16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head, in fp32 until the one rounding at the end.

    q, k, v: (B, H, L, D), any strides. Returns (B, L, H * D) in q's dtype, contiguous.
    """
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            "attention_fp16: q, k and v must be (B, H, L, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5  # (B, H, L, L)
    mixed = torch.softmax(scores, dim=-1) @ v.float()
    return mixed.transpose(1, 2).flatten(2).to(q.dtype)
