"""modulate_quantize: LayerNorm, shift and scale, and then all that quantize_act does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.reference.quantize_act import ActTarget, QuantizedAct, quantize_act

LAYER_NORM_EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h(LayerNorm(x) * scale + shift), without weights of its own: fp32 inside, rounded once.

    x: (M, K) h; shift, scale: (K,) h, and scale already contains its 1.
    """
    if x.ndim != 2 or shift.shape != x.shape[1:] or scale.shape != x.shape[1:]:
        raise ValueError(
            f"modulate_quantize: x must be (M, K), shift and scale (K,), "
            f"got {tuple(x.shape)}, {tuple(shift.shape)}, {tuple(scale.shape)}"
        )
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=LAYER_NORM_EPS)
    return (normed * scale.float() + shift.float()).to(x.dtype)


def modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, target: ActTarget) -> QuantizedAct:
    """x: (M, K) h; shift, scale: (K,) h. Returns quantize_act(modulate(x, shift, scale), target)."""
    return quantize_act(modulate(x, shift, scale), target)
