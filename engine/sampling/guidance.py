"""Classifier-free guidance: two predictions, with the prompt and without, and a step beyond the first."""

from __future__ import annotations

from torch import Tensor


def combine_predictions(both: Tensor, cfg: float) -> Tensor:
    """both: (2, L, C), the prediction with the prompt, then the one for what is left out. Returns (1, L, C) fp32.

    without + cfg * (with - without): cfg 1 is the prompt alone (Ho and Salimans 2022).
    """
    with_prompt, without = both.float().chunk(2)
    return without + cfg * (with_prompt - without)
