"""Smoothing divides activations and multiplies weights by the same factor, within what 16 bits can hold."""

from __future__ import annotations

import pytest
import torch

from engine.quantizer import smooth
from tests.tolerances import relative_error


def inputs_with_outliers() -> torch.Tensor:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(6))
    x[:, 7] *= 50
    return x


def weight() -> torch.Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("exponents", smooth.coarse_candidates(), ids=str)
def test_the_product_stays_what_it_was(exponents):
    x, w = inputs_with_outliers(), weight()
    factor = smooth.smooth_factor(smooth.activation_sizes(x), smooth.weight_sizes([w]), exponents)
    assert factor.dtype == torch.bfloat16
    assert relative_error((x / factor.float()) @ (w * factor.float()).T, x @ w.T) < 1e-5


def test_full_smoothing_makes_all_channels_equally_large():
    x = inputs_with_outliers()
    factor = smooth.smooth_factor(
        smooth.activation_sizes(x), smooth.weight_sizes([weight()]), smooth.Exponents(1.0, 0.0, 2)
    )
    sizes = (x / factor.float()).square().mean(dim=0).sqrt()
    assert float(sizes.max() / sizes.min()) < 1.02  # the factor has 8 bits of mantissa


def test_the_first_candidate_is_no_smoothing():
    factor = smooth.smooth_factor(
        smooth.activation_sizes(inputs_with_outliers()),
        smooth.weight_sizes([weight()]),
        smooth.coarse_candidates()[0],
    )
    assert torch.equal(factor.float(), torch.ones(64))


def test_finer_candidates_stand_beside_the_best():
    for best in smooth.coarse_candidates():
        for finer in smooth.finer_candidates(best):
            assert 0 < abs(finer.alpha - best.alpha) <= smooth.STEP + 1e-9
            assert finer.beta == 0 or finer.alpha + finer.beta == pytest.approx(1)


@pytest.mark.parametrize("x", [torch.zeros(8, 64), inputs_with_outliers().index_fill(1, torch.tensor([3]), 0.0)])
def test_channels_that_are_never_seen_get_a_moderate_factor(x):
    w = weight().index_fill(1, torch.tensor([9]), 0.0)
    for exponents in smooth.coarse_candidates():
        factor = smooth.smooth_factor(smooth.activation_sizes(x), smooth.weight_sizes([w]), exponents).float()
        assert torch.isfinite(factor).all()
        assert (factor > 1e-3).all()
        assert (factor < 1e3).all()


def test_the_shift_of_a_gelu_is_seen():
    sizes = smooth.activation_sizes(torch.full((4, 64), -11 / 64), shift=11 / 64)
    assert torch.equal(sizes[2], torch.ones(64))  # nothing is left of such a channel


def test_without_activations_small_weights_get_large_factors():
    w = torch.ones(4, 64)
    w[:, :32] = 0.01
    factor = smooth.smooth_factor_from_weights(smooth.weight_sizes([w])).float()
    assert (factor[:32] > factor[32:]).all()
