"""Modulations and T5: unsigned 4-bit weights with a scale and a zero per group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quantizer.weight_only import quantize_weight_only
from tests.tolerances import relative_error


def weight(mean: float = 0.0) -> Tensor:
    return torch.randn(96, 256, generator=torch.Generator().manual_seed(11)) * 0.1 + mean


def inputs(seed: int) -> Tensor:
    """Rows along few directions, as the conditioning of modulations is."""
    directions = torch.randn(24, 256, generator=torch.Generator().manual_seed(12))
    return torch.rand(512, 24, generator=torch.Generator().manual_seed(seed)) @ directions


def test_modulations_have_their_zero_at_code_seven():
    made = quantize_weight_only(weight(), torch.ones(96), 64, symmetric=True)
    assert torch.equal(made.zeros, -7 * made.scales)
    assert made.bias is not None
    assert made.bias.dtype == torch.bfloat16
    assert relative_error(made.dense(), weight()) < 0.13


def test_groups_with_their_own_zero_follow_a_mean():
    symmetric, free = (
        relative_error(quantize_weight_only(weight(0.3), None, 128, symmetric=s).dense(), weight(0.3))
        for s in (True, False)
    )
    assert free < 0.6 * symmetric


def test_searched_clips_never_lose():
    found, plain = (
        relative_error(quantize_weight_only(weight(), None, 64, symmetric=True, search=s).dense(), weight())
        for s in (True, False)
    )
    assert found < plain


@pytest.mark.parametrize(("group", "symmetric"), [(64, True), (128, False)], ids=["modulation", "T5"])
def test_gptq_leaves_a_third_of_the_error_on_unseen_inputs(group, symmetric):
    x, unseen = inputs(13), inputs(14)
    exact = unseen @ weight().T
    nearest, gptq = (
        relative_error(
            unseen @ quantize_weight_only(weight(), None, group, symmetric=symmetric, hessian=h).dense().T, exact
        )
        for h in (None, x.T @ x)
    )
    assert gptq < nearest / 3


def test_a_group_of_zeros_stays_zero():
    w = weight()
    w[:, :64] = 0
    assert not quantize_weight_only(w, None, 64, symmetric=True).dense()[:, :64].any()
