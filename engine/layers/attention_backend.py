"""Softmax attention, by whichever implementation was fastest on this card.

A choice decides bytes: it is made once for a size (`fastest`), kept by whoever owns a cache folder, named in
recipes, and given back here (`choices`). Without one torch decides.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.kernels import attention_fp16 as ours

Backend: TypeAlias = Literal["torch", "flash", "cudnn", "efficient", "fp16"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
TORCH_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TOKEN_STEP = 512
ROUNDS = 5
WORTH = 0.97  # of the time of the one before: less is within what a clock wavers


class SizeClass(NamedTuple):
    """Attentions that share a choice on one card."""

    heads: int
    token_steps: int  # tokens / TOKEN_STEP, rounded up
    dtype: torch.dtype


choices: dict[SizeClass, Backend] = {}


def size_class(heads: int, tokens: int, dtype: torch.dtype) -> SizeClass:
    return SizeClass(heads, -(-tokens // TOKEN_STEP), dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: three of (B, H, L, D), rows contiguous -> (B, L, H * D)."""
    backend = choices.get(size_class(q.shape[1], q.shape[2], q.dtype), "torch") if q.is_cuda else "torch"
    return _attend_by(backend, q, k, v)


def fastest(heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Backend:
    """Time every implementation that runs on this card, on views as a fused projection leaves them."""
    qkv = torch.randn(1, tokens, 3, heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    best, best_ms = BACKENDS[0], float("inf")
    for backend in BACKENDS:
        if backend == "fp16" and (dtype != torch.float16 or head_dim != ours.HEAD_DIM):
            continue
        try:
            needed = _milliseconds(lambda backend=backend: _attend_by(backend, q, k, v))  # type: ignore[misc]
        except RuntimeError:  # torch has no such implementation for this card
            continue
        if needed < WORTH * best_ms:
            best, best_ms = backend, needed
    return best


def _attend_by(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if backend == "fp16":
        return ours.attention_fp16(q, k, v)
    if backend == "torch":
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(TORCH_BACKENDS[backend]):
            mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2)


def _milliseconds(run: Callable[[], object]) -> float:
    run()
    times: list[float] = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)
