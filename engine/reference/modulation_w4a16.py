"""modulation_w4a16: the linear that turns a timestep's embedding into shifts, scales and gates (adaLN)."""

from __future__ import annotations

from torch import Tensor

from engine.reference.linear_w4a16 import W4A16Weights, linear_w4a16


def modulation_w4a16(x: Tensor, weights: W4A16Weights, splits: int) -> Tensor:
    """x: (B, K) h, behind its SiLU. Returns (B, splits, C) h, C = O / splits: shift, scale, gate, ...

    Rows of `weights` stand split by split (files have them channel by channel). A scale already contains its 1.
    """
    if x.ndim != 2 or weights.out_features % splits:
        raise ValueError(
            f"modulation_w4a16: x must be (B, K) and {weights.out_features} rows a multiple of {splits}, "
            f"got x {tuple(x.shape)}"
        )
    return linear_w4a16(x, weights).view(x.shape[0], splits, -1)
