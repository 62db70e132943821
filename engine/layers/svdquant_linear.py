"""Linears whose weights are 4-bit: SVDQuant's, and the weight-only ones of modulations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.linear_w4a16 import ArrangedW4A16, arrange, linear_w4a16
from engine.kernels.modulation_w4a16 import ArrangedModulation, arrange_modulation, modulation_w4a16
from engine.layers.linear import BranchedLinear
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.quantize_act import pack_nibbles, unpack_nibbles
from engine.reference.svdq_linear import SVDQuantWeights, svdq_linear

MODULATION_GROUP = 64
LayerPlan = Literal["w4a4", "w4a8", "w4a16"]


def runnable_plan(weights: SVDQuantWeights, plan: LayerPlan) -> LayerPlan:
    """The plan a layer can run by: w4a8's signed magnitudes have no place for a code of -8, so it takes w4a16."""
    if plan == "w4a8" and weights.precision == "int4" and bool((weights.codes == -8).any()):
        return "w4a16"
    return plan


class SVDQuantLinear(BranchedLinear):
    """y = low-bit product of quantized x and the residual + bias + (x @ proj_down) @ proj_up.T, by one plan.

    w4a16 leaves activations as they are: without a GPU the weight is expanded once, low-rank branch and bias
    included, and every call is one 32-bit product. w4a4 and w4a8 run the reference arithmetic.
    `plan` is what really runs.
    """

    def __init__(self, weights: SVDQuantWeights, plan: LayerPlan, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weights.in_features, weights.out_features)
        self.plan: LayerPlan = runnable_plan(weights, plan)
        self.precision = weights.precision
        self.rank = weights.rank
        self.weights: SVDQuantWeights | None = None
        self.weight: Tensor | None
        self.bias: Tensor | None
        if self.plan == "w4a16":
            weight, bias = weights.dense()
            self.register_buffer("weight", weight.to(dtype), persistent=False)
            self.register_buffer("bias", None if bias is None else bias.to(dtype), persistent=False)
        else:
            self.weights = weights

    def base(self, x: Tensor) -> Tensor:
        if self.weights is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y = svdq_linear(x.flatten(0, -2), self.weights, self.plan)
        return y.view(*x.shape[:-1], self.out_features)


class W4A16Linear(BranchedLinear):
    """A linear with 4-bit weights and 16-bit activations; without a GPU its weight is expanded once."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weights: W4A16Weights, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weights.in_features, weights.out_features)
        self.register_buffer("weight", weights.dense().to(dtype), persistent=False)
        bias = None if weights.bias is None else weights.bias.to(dtype)
        self.register_buffer("bias", bias, persistent=False)

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear(BranchedLinear):
    """A linear with 4-bit weights and 16-bit activations that stays 4-bit in memory.

    Kernels expand it on the way: for the few rows of a modulation (groups of 64) by one that reads weights once,
    for a text encoder by one that multiplies tiles. fp32, which only a T5 on a card without bf16 takes, has no
    kernel: there the weight is expanded for the call.
    """

    weight = None  # transformers' T5 asks every linear for it

    def __init__(self, weights: W4A16Weights, dtype: torch.dtype, arch: str | None = None) -> None:
        """arch: the card's ("90a"), which `weights` are on; None for the reference."""
        super().__init__(weights.in_features, weights.out_features)
        self._modulation: ArrangedModulation | None = None
        self._linear: ArrangedW4A16 | None = None
        self._nibbles: _Nibbles | None = None
        if weights.group_size == MODULATION_GROUP:
            if weights.scales.dtype == torch.float32:  # legal, never seen
                weights = replace(weights, scales=weights.scales.to(dtype), zeros=weights.zeros.to(dtype))
            self._modulation = arrange_modulation(weights)
        elif dtype != torch.float32 or arch is None:
            self._linear = arrange(weights, dtype, arch)
        else:
            packed = pack_nibbles(weights.codes)
            self._nibbles = _Nibbles(packed, weights.scales, weights.zeros, weights.bias, weights.group_size)

    def base(self, x: Tensor) -> Tensor:
        if self._modulation is not None:
            y = modulation_w4a16(x.flatten(0, -2).contiguous(), self._modulation, splits=1)
            return y.view(*x.shape[:-1], self.out_features)
        if self._linear is not None:
            return linear_w4a16(x, self._linear)
        assert self._nibbles is not None
        weights = self._nibbles.weights()
        return F.linear(x, weights.dense(), None if weights.bias is None else weights.bias.float())


@dataclass(frozen=True, eq=False)
class _Nibbles:
    """W4A16Weights with two codes a byte."""

    packed: Tensor  # (O, K/2) uint8
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    group_size: int

    def weights(self) -> W4A16Weights:
        return W4A16Weights(unpack_nibbles(self.packed), self.scales, self.zeros, self.bias, self.group_size)
