"""One factor per in channel: outliers move from activations into weights, where the low-rank branch takes them.

    x @ W.T = (x / smooth) @ (W * smooth).T,    smooth = size(x)^alpha / size(W)^beta

size is a norm over rows, channel by channel. The published method takes the largest value; here activations are
measured by their 2- or 4-norm, since what fills a group's 15 levels is the usual row and not the one extreme row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantizer.round_weights import HALF

FLOOR = 0.01  # of the mean size: a channel that calibration hardly saw must not get an extreme factor
WEIGHTS_ONLY_BETA = 0.25  # without activations; 0.5 is worse on half of the layers measured
STEP = 0.1  # between alphas once the best of the coarse ones is known


@dataclass(frozen=True, slots=True)
class Exponents:
    """One candidate. norm: of the activations, 2 or 4."""

    alpha: float
    beta: float
    norm: int


def coarse_candidates() -> list[Exponents]:
    """No smoothing, then alphas from weak to full, with the weights' share left out or the complement.

    beta = 1 - alpha is what minimizes the activations' error where a group's largest value follows its p-norm,
    alpha = p / (p + 2); beta = 0 looks at activations alone.
    """
    candidates = [Exponents(0.0, 0.0, 2)]
    for norm in (2, 4):
        for alpha in (0.3, 0.5, 0.7, 0.9):
            candidates += [Exponents(alpha, 0.0, norm), Exponents(alpha, round(1 - alpha, 2), norm)]
    return candidates


def finer_candidates(best: Exponents) -> list[Exponents]:
    """The neighbours of the best coarse candidate."""
    if best.alpha == 0:
        return [Exponents(STEP, 0.0, norm) for norm in (2, 4)]
    finer = []
    for alpha in (best.alpha - STEP, best.alpha + STEP):
        beta = 0.0 if best.beta == 0 else 1 - alpha
        finer.append(Exponents(round(alpha, 2), round(beta, 2), best.norm))
    return finer


def activation_sizes(x: Tensor, shift: float = 0.0) -> dict[int, Tensor]:
    """x (M, K) -> norm -> (K,): the 2- and the 4-norm of x + shift over rows, divided by the number of rows."""
    shifted = x + shift
    return {norm: _floored(shifted.abs().pow(norm).mean(dim=0).pow(1 / norm)) for norm in (2, 4)}


def weight_sizes(weights: Sequence[Tensor]) -> Tensor:
    """weights (N, K) of layers that share their input -> (K,) root mean square over all their rows."""
    return _floored(torch.cat([weight.square() for weight in weights]).mean(dim=0).sqrt())


def smooth_factor(activations: dict[int, Tensor], weights: Tensor, exponents: Exponents) -> Tensor:
    """(K,) in HALF, centred around 1 so that neither side leaves the range of 16 bits."""
    return _stored(activations[exponents.norm].pow(exponents.alpha) / weights.pow(exponents.beta))


def smooth_factor_from_weights(weights: Tensor) -> Tensor:
    """(K,) in HALF, without any activation: large in channels of small weights."""
    return _stored(weights.pow(-WEIGHTS_ONLY_BETA))


def _floored(sizes: Tensor) -> Tensor:
    mean = sizes.mean()
    return sizes.clamp_min(float(mean) * FLOOR) if float(mean) > 0 else torch.ones_like(sizes)


def _stored(factor: Tensor) -> Tensor:
    return (factor / (factor.amax() * factor.amin()).sqrt()).to(HALF)
