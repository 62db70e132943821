"""Noise levels, held to diffusers' scheduler."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from engine.sampling.sigmas import ResolutionShift, shifted_sigmas


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 8, 28])
def test_a_fixed_shift_gives_the_sigmas_of_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    assert torch.allclose(scheduler.sigmas, torch.tensor(shifted_sigmas(steps, shift, 256)), atol=2e-7)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 9216])
def test_the_resolution_dependent_shift_gives_the_sigmas_of_diffusers(tokens):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=calculate_shift(tokens))
    assert torch.allclose(scheduler.sigmas, torch.tensor(shifted_sigmas(20, ResolutionShift(), tokens)), atol=2e-7)


def test_the_shift_of_flux_at_its_two_given_sizes():
    assert ResolutionShift().at(256) == pytest.approx(math.exp(0.5))
    assert ResolutionShift().at(4096) == pytest.approx(math.exp(1.15))


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, ResolutionShift()])
def test_sigmas_fall_from_one_to_zero(shift):
    sigmas = shifted_sigmas(9, shift, 300)
    assert len(sigmas) == 10
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert all(a > b for a, b in pairwise(sigmas))
