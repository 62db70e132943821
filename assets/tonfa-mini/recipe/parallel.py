"""One process a GPU: who we are, and what the processes agree on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def start(rendezvous: str = "") -> tuple[int, int, torch.device]:
    """(rank, world size, device). With RANK and WORLD_SIZE set joins the others through the file `rendezvous`."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", rank if world > 1 else int(os.environ.get("GPU", "0")))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch._dynamo.config.recompile_limit = 64  # blocks of several networks and shapes share their code
        # cuDNN's attention was suspected of an illegal access in the first compiled backward of an earlier run.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    return rank, world, device


def is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized()


def agree(number: float) -> float:
    """Rank 0's number, on every rank; through the CPU, so that no GPU waits."""
    if not is_parallel():
        return number
    box = torch.tensor([number], dtype=torch.float64)
    dist.broadcast(box, 0)
    return float(box)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over the processes, as one flat message; in bf16 between GPUs."""
    if not is_parallel():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    flat = flat.bfloat16() if flat.is_cuda else flat
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat = flat.float() / dist.get_world_size()
    parts = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    torch._foreach_copy_(gradients, parts)


@torch.no_grad()
def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Rank 0's values on every rank."""
    if is_parallel():
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def channels_last(module: Network, device: torch.device) -> Network:
    """The module on the device, its convolutions in the memory order that GPUs prefer."""
    untyped: Any = module
    untyped.to(device, memory_format=torch.channels_last)
    return module


def autocast(device: torch.device) -> torch.autocast:
    """bf16 arithmetic on a GPU, fp32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def eager() -> AbstractContextManager[None]:
    """Inside, compiled modules run uncompiled: for shapes that come once."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
