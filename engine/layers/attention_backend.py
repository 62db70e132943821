"""Softmax attention, by whichever implementation was fastest on this card.

A choice decides bytes: it is made once for a size (`fastest`), kept by whoever owns a cache folder, named in
recipes, and given back here (`choices`). Without one torch decides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
ROUNDS, CALLS = 7, 4
WORTH = 0.97  # of the time of the best before: less is within what a clock wavers


class SizeClass(NamedTuple):
    """Attentions that share a choice."""

    card: int  # torch's index
    heads: int
    head_dim: int
    token_steps: int  # tokens / TOKEN_STEP, rounded up
    dtype: torch.dtype

    @property
    def most_tokens(self) -> int:
        return self.token_steps * TOKEN_STEP


choices: dict[SizeClass, Backend] = {}


def size_class(card: int, heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> SizeClass:
    return SizeClass(card, heads, head_dim, -(-tokens // TOKEN_STEP), dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: three of (B, H, L, D), rows contiguous -> (B, L, H * D)."""
    backend: Backend = "torch"
    if q.is_cuda:
        _, heads, tokens, head_dim = q.shape
        backend = choices.get(size_class(q.get_device(), heads, head_dim, tokens, q.dtype), backend)
    return attend_by(backend, q, k, v)


def attend_by(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by a certain implementation. Raises RuntimeError where torch has none such for these tensors."""
    if backend == "fp16":
        return ours.attention_fp16(q, k, v)
    if backend == "torch":
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(TORCH_BACKENDS[backend]):
            mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2)


def fastest(size: SizeClass) -> Backend:
    """Time every implementation that runs on this card, for the most tokens of the class.

    On views as a fused projection leaves them, and in CUDA graphs as steps run: a small attention takes less time
    than its launch from Python. Rounds alternate, so that a clock that rises favours none.
    Raises OutOfMemoryError where there is no room for the tensors of one attention.
    """
    shape = (1, size.most_tokens, 3, size.heads, size.head_dim)
    qkv = torch.randn(shape, dtype=size.dtype, device=f"cuda:{size.card}")
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    runs: dict[Backend, Callable[[], object]] = {}
    for backend in BACKENDS:
        if backend == "fp16" and (size.dtype != torch.float16 or size.head_dim != ours.HEAD_DIM):
            continue
        try:
            runs[backend] = _graph(partial(attend_by, backend, q, k, v))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            continue
    times: dict[Backend, list[float]] = {backend: [] for backend in runs}
    for _ in range(ROUNDS):
        for backend, run in runs.items():
            times[backend].append(_milliseconds(run))
    best, best_ms = BACKENDS[0], float("inf")
    for backend, measured in times.items():
        if median(measured) < WORTH * best_ms:
            best, best_ms = backend, median(measured)
    return best


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    """Several calls as one launch, ready to be timed."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    graph.replay()
    return graph.replay


def _milliseconds(run: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
