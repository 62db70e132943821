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

from engine.reference.quantize_act import QuantizedAct

Act: TypeAlias = Tensor | QuantizedAct  # what a linear reads
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
    strengths: shared by all layers, once for the host and once, (L,) fp32, where the layers are.
    bias_delta: (L, N) one row a LoRA of `slices`, or None where no LoRA brings one.
    """

    proj_down: Tensor
    proj_up: Tensor
    scales: Tensor
    slices: tuple[BranchSlice, ...]
    strengths: list[float]
    strengths_there: Tensor
    bias_delta: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., N) + the branches' part for x (..., K), and not a bit of a LoRA at strength 0.

        The CPU skips those. A card may replay this as a graph after a slider has moved, so it decides when it runs.
        """
        for row, (lora, _, _) in enumerate(self.slices):
            if y.is_cuda:
                strength = self.strengths_there[lora]
                y = torch.where(strength == 0, y, self._with_slice(row, y, x, strength))
            elif self.strengths[lora] != 0:
                y = self._with_slice(row, y, x, self.strengths[lora])
        return y

    def _with_slice(self, row: int, y: Tensor, x: Tensor, strength: Tensor | float) -> Tensor:
        _, start, stop = self.slices[row]
        if stop > start:
            scale = self.scales[start // RANK_STEP : stop // RANK_STEP].repeat_interleave(RANK_STEP)
            down = (x @ self.proj_down[:, start:stop]) * scale.to(x.dtype)
            y = y + down @ self.proj_up[:, start:stop].T
        return y if self.bias_delta is None else y + strength * self.bias_delta[row]


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
