"""Noise levels of a flow: 1 (noise) down to 0 (image), bent towards the noisy end by a shift."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResolutionShift:
    """FLUX's shift: mu grows linearly with the number of image tokens, and the shift is exp(mu).

    Larger pictures need more noise to hide the same amount of structure (Esser et al. 2024, section 5.3.2).
    """

    base_tokens: int = 256
    base: float = 0.5
    max_tokens: int = 4096
    max: float = 1.15

    def at(self, num_tokens: int) -> float:
        slope = (self.max - self.base) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base + slope * (num_tokens - self.base_tokens))


Shift = float | ResolutionShift


def shifted_sigmas(steps: int, shift: Shift, num_tokens: int) -> list[float]:
    """`steps` + 1 levels from 1 to 0: evenly spaced t, then shift * t / (1 + (shift - 1) * t).

    num_tokens: packed image tokens, which decide a resolution-dependent shift.
    """
    factor = shift.at(num_tokens) if isinstance(shift, ResolutionShift) else shift
    levels = [1 - step / steps for step in range(steps + 1)]
    return [factor * t / (1 + (factor - 1) * t) for t in levels]
