"""attention_fp16: attention with fp16 accumulation, for cards on which torch has none or a slower one."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.jit import Strided, Variant, launch
from engine.reference import attention_fp16 as reference

HEAD_DIM = 128
BLOCK_ROWS, THREADS = 128, 128
ALIGNED = 8  # elements in the 16 bytes that the kernel loads at once
MOST_ROWS = 2**31 - BLOCK_ROWS
MOST_BLOCKS = 65535  # of a grid's second and third number
VARIANT = Variant("attention_fp16", (("H_BF16", 0),))


def attention_fp16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head.

    q, k, v: (B, H, L, D) fp16, D = 128, views into any tensor whose rows are contiguous and whose other strides are
    multiples of 8. Returns (B, L, H * D) fp16, contiguous.
    Scores are fp16: |q k| up to 2^20 (a logit of 92,000) and |v| up to 2^15 are safe; RMS-normalized q and k are
    far below. bf16 is converted by the caller, who knows whether the values fit fp16.
    CPU tensors go to the reference.
    """
    _check(q, k, v)
    if not q.is_cuda:
        return reference.attention_fp16(q, k, v)
    batch, heads, length, _ = q.shape
    out = torch.empty(batch, length, heads * HEAD_DIM, dtype=q.dtype, device=q.device)
    grid = (-(-length // BLOCK_ROWS), heads, batch)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    launch(VARIANT, grid, (THREADS,), Strided(q), Strided(k), Strided(v), out, length, *strides)
    return out


def variants(arch: str) -> list[Variant]:
    """What can be launched on an architecture: the same everywhere."""
    return [VARIANT]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape != q.shape or x.shape[3] != HEAD_DIM or 0 in x.shape:
            raise ValueError(
                f"attention_fp16: q, k and v must be (B, H, L, {HEAD_DIM}) of one shape, none of it 0, "
                f"got {name} {tuple(x.shape)} beside q {tuple(q.shape)}"
            )
        if x.dtype != torch.float16 or x.device != q.device:
            raise ValueError(
                f"attention_fp16: q, k and v must be float16 on {q.device}, got {name} {x.dtype} on {x.device}"
            )
        if x.stride(3) != 1 or any(stride % ALIGNED for stride in x.stride()[:3]) or x.data_ptr() % (2 * ALIGNED):
            raise ValueError(
                f"attention_fp16: rows must be contiguous and start at multiples of {2 * ALIGNED} bytes, "
                f"got {name} with strides {x.stride()} at byte {x.data_ptr() % 256} of 256"
            )
    batch, heads, length, _ = q.shape
    if batch > MOST_BLOCKS or heads > MOST_BLOCKS or length > MOST_ROWS:
        raise ValueError(f"attention_fp16: a grid has no place for {batch} x {heads} heads of {length} rows")
