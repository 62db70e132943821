"""Linears of 16 bit, and the run-time low-rank branches that every linear of a network can carry.

A LoRA is never merged: its factors stay beside the layer, and its strength is one number that is read at each
call. So a slider costs nothing, and a strength of 0 computes exactly what no LoRA computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Act: TypeAlias = Tensor  # what a linear reads
RANK_STEP = 16  # ranks that share one scale; every branch is padded to it


class BranchSlice(NamedTuple):
    """The ranks of one LoRA inside a layer's stacked factors, and where its strength stands."""

    lora: int  # index into the stack's strengths
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LowRankBranches:
    """All LoRAs of one linear, stacked along rank.

    proj_down: (K, R), proj_up: (N, R), in the network's dtype; R a multiple of 16.
    scales: (R / 16,) fp32, a view into the one buffer of the model: strength x alpha / rank of each 16 ranks.
    strengths: shared by all layers; the host's copy, so that a slice at 0 is skipped without asking the device.
    bias_delta: (L, N) one row a LoRA of `slices`, or None where no LoRA brings one.
    """

    proj_down: Tensor
    proj_up: Tensor
    scales: Tensor
    slices: tuple[BranchSlice, ...]
    strengths: list[float]
    bias_delta: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., N) + the branches' part for x (..., K); LoRAs at strength 0 are skipped, not multiplied."""
        for row, (lora, start, stop) in enumerate(self.slices):
            strength = self.strengths[lora]
            if strength == 0.0:
                continue
            if stop > start:
                scale = self.scales[start // RANK_STEP : stop // RANK_STEP].repeat_interleave(RANK_STEP)
                down = (x @ self.proj_down[:, start:stop]) * scale.to(x.dtype)
                y = y + down @ self.proj_up[:, start:stop].T
            if self.bias_delta is not None:
                y = y + strength * self.bias_delta[row]
        return y


class BranchedLinear(nn.Module):
    """y = base(x) + the run-time low-rank branches. Subclasses say what `base` is."""

    in_features: int
    out_features: int
    branches: LowRankBranches | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.branches = None

    def base(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) without any LoRA."""
        raise AssertionError("a subclass says what base is")

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.branches is None else self.branches.add_to(y, x)

    def gelu(self, x: Act, reader: BranchedLinear) -> Act:
        """GELU(self(x)), tanh's form, as `reader` reads it: (..., K) -> (..., N)."""
        return F.gelu(self(x), approximate="tanh")

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class Linear(BranchedLinear):
    """A linear with 16- or 32-bit weights. weight: (N, K); bias: (N,) or None."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
