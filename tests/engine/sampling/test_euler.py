"""The walk, and the two predictions of guidance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.sampling.euler import denoise
from engine.sampling.guidance import combine_predictions
from engine.sampling.sigmas import shifted_sigmas


def test_a_straight_flow_is_walked_exactly_whatever_the_steps():
    """On a straight line from image to noise the velocity is noise - image everywhere."""
    image, noise = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    for steps in (1, 3, 8):
        walk = list(denoise(lambda x, sigma: noise - image, noise, shifted_sigmas(steps, 2.0, 6)))
        assert all(torch.allclose(predicted, image, atol=1e-5) for _, predicted in walk)
        assert torch.allclose(walk[-1][0], image, atol=1e-5)


def test_the_steps_are_those_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.sin(3 * x) + sigma * x

    noise = torch.randn(1, 6, 8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7))
    expected = noise
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        expected = scheduler.step(velocity(expected, float(sigma)), timestep, expected).prev_sample
    *_, (latents, _) = denoise(velocity, noise, shifted_sigmas(7, 2.0, 6))
    assert torch.allclose(latents, expected, atol=1e-5)


def test_latents_stay_fp32_when_the_network_answers_in_bf16():
    *_, (latents, predicted) = denoise(lambda x, s: x.bfloat16(), torch.randn(1, 2, 4), [1.0, 0.5, 0.0])
    assert latents.dtype == predicted.dtype == torch.float32


def test_each_step_is_yielded_before_the_next_is_asked_for():
    asked = []
    walk = denoise(lambda x, sigma: asked.append(sigma) or x, torch.randn(1, 2, 4), [1.0, 0.6, 0.3, 0.0])
    next(walk)
    assert asked == [1.0]


@pytest.mark.parametrize("cfg", [1.0, 2.5, 7.0])
def test_guidance_goes_on_from_the_prediction_without_the_prompt(cfg):
    told, untold = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    combined = combine_predictions(torch.cat([told, untold]), cfg)
    assert torch.allclose(combined - untold, cfg * (told - untold), atol=1e-5)
