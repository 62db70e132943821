"""The scale of a fused GELU: no row passes the bound that it is a share of, and it costs next to nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels._fused_scale import SHARE_OF_BOUND, fused_gelu_scale, gelu_reach
from engine.reference.quantize_act import E4M3_MAX, quantize_act_e4m3
from engine.reference.svdq_linear import SVDQuantWeights


def random_fc1(n: int = 256, k: int = 128, *, bias: bool = True) -> SVDQuantWeights:
    return SVDQuantWeights(
        precision="int4",
        codes=torch.randint(-7, 8, (n, k), dtype=torch.int8),
        wscales=0.01 + 0.05 * torch.rand(n, k // 64),
        smooth_factor=0.5 + torch.rand(k),
        bias=torch.randn(n) if bias else None,
        proj_down=torch.randn(k, 16) / k**0.5,
        proj_up=torch.randn(n, 16),
    )


def gelu_of(x: Tensor, fc1: SVDQuantWeights) -> tuple[Tensor, Tensor]:
    """fc1's output behind its GELU, and the scale of each row of its input."""
    rows = (x / fc1.smooth_factor).abs().amax(dim=1) / E4M3_MAX
    return F.gelu(F.linear(x, *fc1.dense()), approximate="tanh"), rows


@pytest.mark.parametrize("bias", [True, False])
def test_no_input_passes_the_bound(bias: bool) -> None:
    """Inputs at the corners of what a row scale allows, each aimed at one channel."""
    fc1, smooth_factor = random_fc1(bias=bias), torch.exp2(3 * torch.rand(256) - 1)
    weight, _ = fc1.dense()
    x = torch.sign(weight) * fc1.smooth_factor * torch.exp2(6 * torch.rand(256, 1) - 3)
    y, rows = gelu_of(torch.cat([x, -x, torch.zeros(1, 128)]), fc1)
    slope, offset = fused_gelu_scale(gelu_reach(fc1), smooth_factor)
    largest = (y / smooth_factor).abs().amax(dim=1)
    bound = E4M3_MAX * (slope / SHARE_OF_BOUND * rows + offset)
    assert (largest <= bound * 1.0001).all()
    assert (largest / bound).max() > 0.5  # and it is not much larger than it has to be


@pytest.mark.parametrize("outliers", [1.0, 30.0])
def test_it_costs_nothing_beside_the_exact_scale(outliers: float) -> None:
    fc1, smooth_factor = random_fc1(1024, 512), 0.5 + torch.rand(1024)
    x = torch.randn(64, 512)
    x[:, :3] *= outliers
    y, rows = gelu_of(x, fc1)
    slope, offset = fused_gelu_scale(gelu_reach(fc1), smooth_factor)
    errors = []
    for scale in (None, slope * rows + offset):
        codes, scales = quantize_act_e4m3(y, smooth_factor, scale=scale)
        assert scale is None or not (codes.float().abs() == E4M3_MAX).any()
        found = codes.float() * scales.unsqueeze(-1)
        errors.append(float((found - y / smooth_factor).norm() / (y / smooth_factor).norm()))
    assert errors[1] < 1.1 * errors[0]
