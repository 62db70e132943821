"""The low-rank branch takes the largest directions of a weight and leaves the smallest residual."""

from __future__ import annotations

import pytest
import torch

from engine.quantizer.low_rank import split_low_rank


def flat_weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * k**-0.5


@pytest.mark.parametrize(("n", "k"), [(256, 128), (128, 256)], ids=["tall", "wide"])
@pytest.mark.parametrize("exact", [True, False])
def test_factors_and_residual_add_up_to_the_weight(n, k, exact):
    weight = flat_weight(n, k)
    proj_up, proj_down, residual = split_low_rank(weight, 32, exact=exact)
    assert proj_up.shape == (n, 32)
    assert proj_down.shape == (k, 32)
    assert (proj_up @ proj_down.T + residual - weight).norm() < 1e-6 * weight.norm()


def test_no_other_factors_of_this_rank_leave_less():
    weight = flat_weight(192, 128)
    *_, residual = split_low_rank(weight, 32)
    smallest = torch.linalg.svdvals(weight.double())[32:].square().sum().sqrt()
    assert float(residual.double().norm()) == pytest.approx(float(smallest), rel=1e-5)


def test_the_randomized_way_leaves_a_percent_more_at_most():
    """Random weights are the hardest case: no direction stands out."""
    weight = flat_weight(768, 512)
    exact = split_low_rank(weight, 32, exact=True)[2].norm()
    randomized = split_low_rank(weight, 32, exact=False)[2].norm()
    assert exact <= randomized < 1.01 * exact


def test_a_weight_of_few_directions_is_taken_whole():
    factors = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(2))
    *_, residual = split_low_rank(factors[0] @ factors[1].T, 16, exact=False)
    assert residual.norm() < 1e-4 * (factors[0] @ factors[1].T).norm()


@pytest.mark.parametrize(("rank", "given"), [(0, 0), (16, 16), (1024, 96)], ids=["none", "some", "all there is"])
def test_the_rank_is_a_multiple_of_16_that_the_weight_has(rank, given):
    proj_up, proj_down, residual = split_low_rank(flat_weight(256, 100), rank)
    assert proj_up.shape[1] == proj_down.shape[1] == given
    assert residual.shape == (256, 100)


def test_the_same_weight_gives_the_same_bytes():
    first, second = (split_low_rank(flat_weight(256, 128), 16, exact=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
