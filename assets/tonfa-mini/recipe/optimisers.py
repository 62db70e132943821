"""Muon for the matrices of blocks, AdamW for the rest, a schedule over wall-clock time, and a moving average."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipe.parallel import agree, average_gradients


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al. 2024): (N, m, n) with m <= n -> nearest to orthogonal."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    nearest: Tensor = x.float()
    return nearest


class Muon:
    """Momentum whose step is made orthogonal; scaled to the size of an AdamW step (Liu et al. 2025).

    A matrix of three stacked ones (q, k, v) counts as three. Convolutions count as (out, in * h * w).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.groups: dict[tuple[int, int], list[tuple[nn.Parameter, int]]] = {}
        for p in parameters:
            rows, columns = p.flatten(1).shape
            stacked = 3 if p.ndim == 2 and rows == 3 * columns else 1
            shape = (min(rows // stacked, columns), max(rows // stacked, columns))
            self.groups.setdefault(shape, []).extend((p, part) for part in range(stacked))
        self.buffers = {
            shape: torch.zeros(len(parts), *shape, device=parts[0][0].device)
            for shape, parts in self.groups.items()
        }

    @torch.no_grad()
    def step(self, scale: float) -> None:
        lr = self.lr * scale
        for (small, large), parts in self.groups.items():
            targets = [_part(p.data, part) for p, part in parts]
            gradients = [_part(p.grad, part).flatten(1) for p, part in parts if p.grad is not None]
            wide = [g.shape[0] == small for g in gradients]
            stack = torch.stack([g if w else g.mT for g, w in zip(gradients, wide, strict=True)]).float()
            buffer = self.buffers[small, large]
            buffer.lerp_(stack, 1 - self.momentum)
            update = orthogonalise(stack.lerp(buffer, self.momentum)) * (0.2 * large**0.5)
            turned = [u if w else u.mT for u, w in zip(update.unbind(0), wide, strict=True)]
            updates = [u.reshape(t.shape) for u, t in zip(turned, targets, strict=True)]
            torch._foreach_mul_(targets, 1 - lr * self.weight_decay)
            torch._foreach_add_(targets, updates, alpha=-lr)


def _part(tensor: Tensor, part: int) -> Tensor:
    """A view of one of three stacked matrices, or the tensor itself."""
    if tensor.ndim == 2 and tensor.shape[0] == 3 * tensor.shape[1]:
        return tensor[part * tensor.shape[1] : (part + 1) * tensor.shape[1]]
    return tensor


@dataclass(frozen=True, slots=True)
class LearningRates:
    muon: float
    adam: float


class Optimiser:
    """Muon on `matrices`, AdamW on `others`; weight decay on matrices only; gradients clipped to norm 1."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: LearningRates,
        weight_decay: float = 0.01,
    ) -> None:
        self.parameters = [*matrices, *others]
        self.muon = Muon(matrices, lr.muon, weight_decay) if matrices else None
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.adam = torch.optim.AdamW(groups, lr=lr.adam, betas=(0.9, 0.98), fused=self.parameters[0].is_cuda)
        self.lr = lr

    def step(self, scale: float) -> None:
        """One step at `scale` times the learning rates; clears the gradients."""
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = self.lr.adam * scale
        self.adam.step()
        if self.muon is not None:
            self.muon.step(scale)
        for p in self.parameters:
            p.grad = None


class MovingAverage:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.live = list(module.parameters())
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module computes with the average inside the block."""
        backup = [p.detach().clone() for p in self.live]
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.live], self.mean)
        yield
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.live], backup)


def warm_stable_decay(done: float, warm: float = 0.01, decay: float = 0.4) -> float:
    """Learning-rate scale at `done` (0 .. 1) of the time: up, flat, then straight down to 1 %."""
    if done < warm:
        return max(done, 1e-3) / warm
    return 1.0 if done < 1 - decay else max(0.01, (1 - done) / decay)


class Countdown:
    """Training runs until a time of day, not for a number of steps. All ranks read rank 0's clock."""

    def __init__(self, until: float, every: int = 10) -> None:
        self.start, self.until, self.every = time.time(), until, every
        self.steps, self.done = 0, 0.0

    def __iter__(self) -> Iterator[float]:
        """Yields the part of the time that is over, 0 .. 1, once a step."""
        while True:
            if self.steps % self.every == 0:
                self.done = agree((time.time() - self.start) / max(1e-3, self.until - self.start))
            if self.done >= 1:
                return
            yield self.done
            self.steps += 1

    @property
    def elapsed_s(self) -> float:
        return time.time() - self.start
