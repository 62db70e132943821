"""The walk from noise to latents by Euler's method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # latents (B, L, C) fp32, sigma -> d(latents) / d(sigma), same shape


def denoise(
    predict_velocity: Velocity, latents: Tensor, sigmas: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk `latents` (B, L, C) fp32 from noise to image, one Euler step of the flow per yield.

    Yields the latents and the clean image predicted so far, which is what a preview shows.
    """
    for sigma, next_sigma in pairwise(sigmas):
        velocity = predict_velocity(latents, sigma).float()
        predicted = latents - sigma * velocity
        latents = latents + (next_sigma - sigma) * velocity
        yield latents, predicted
