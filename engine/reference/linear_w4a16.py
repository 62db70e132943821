"""linear_w4a16: a linear with unsigned 4-bit weights, scales and zeros per group, and 16-bit activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class W4A16Weights:
    """W[o, k] = codes[o, k] * scales[o, k // G] + zeros[o, k // G], in logical order, on any device.

    O out channels, K in channels, G group size (64 for modulation, 128 for T5), h bf16, fp16 or fp32.
    Raises ValueError when shapes or dtypes do not fit together.
    """

    codes: Tensor  # (O, K) uint8 0..15
    scales: Tensor  # (O, K/G) h
    zeros: Tensor  # (O, K/G) h, already multiplied by the scale
    bias: Tensor | None  # (O,) h
    group_size: int

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.group_size <= 0 or self.codes.shape[1] % self.group_size:
            raise ValueError(
                f"W4A16Weights: codes must be (O, K) with K a multiple of {self.group_size}, "
                f"got {tuple(self.codes.shape)}"
            )
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"W4A16Weights: codes must be uint8, got {self.codes.dtype}")
        groups = (self.out_features, self.in_features // self.group_size)
        for name, tensor, shape in (
            ("scales", self.scales, groups),
            ("zeros", self.zeros, groups),
            ("bias", self.bias, groups[:1]),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"W4A16Weights: {name} must be {shape}, got {tuple(tensor.shape)}")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def dense(self) -> Tensor:
        """(O, K) fp32: the weight these codes stand for."""
        groups = self.codes.float().view(self.out_features, -1, self.group_size)
        weight = torch.addcmul(self.zeros.float().unsqueeze(-1), groups, self.scales.float().unsqueeze(-1))
        return weight.view(self.out_features, self.in_features)


def linear_w4a16(x: Tensor, weights: W4A16Weights, weight_dtype: torch.dtype = torch.float32) -> Tensor:
    """x: (..., K) h. Returns (..., O) h: h(x @ W.T + bias), in fp32 until the one rounding at the end.

    weight_dtype: what W is rounded to before it is multiplied; a kernel's tensor units take it as h.
    """
    if x.shape[-1] != weights.in_features:
        raise ValueError(f"linear_w4a16: x must be (..., {weights.in_features}), got {tuple(x.shape)}")
    y = x.float() @ weights.dense().to(weight_dtype).float().T
    return (y if weights.bias is None else y + weights.bias.float()).to(x.dtype)
