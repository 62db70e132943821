"""Group scales that a file can hold, codes that are nearest, and codes that mend one another (GPTQ)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quantizer.round_weights import GRIDS, group_scales, round_gptq, round_nearest, uint4

PRECISIONS = ["int4", "nvfp4"]


def weight_of(n: int = 96, k: int = 256) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3)) * 0.05


def correlated_inputs(m: int = 1024, k: int = 256, seed: int = 4) -> Tensor:
    """Rows in which a few directions hold most of what there is, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -2, k)[:, None]
    return torch.randn(m, k, generator=generator) @ mixing


@pytest.mark.parametrize(("precision", "levels"), [("int4", 7), ("nvfp4", 3)])
def test_nearest_is_off_by_half_a_level_at_most(precision, levels):
    weight = weight_of()
    scales = group_scales(weight, precision)
    codes = round_nearest(weight, scales.effective, GRIDS[precision])
    size = GRIDS[precision].group_size
    largest = weight.view(len(weight), -1, size).abs().amax(dim=-1).repeat_interleave(size, dim=1)
    # 2 % more: the scale itself was rounded; e4m3 has three bits of mantissa, so 7 %
    slack = 1.02 if precision == "int4" else 1.07
    assert (
        (GRIDS[precision].dequantize(codes, scales.effective) - weight).abs() <= largest / levels / 2 * slack
    ).all()


def test_int4_codes_are_symmetric():
    codes = round_nearest(weight_of(), group_scales(weight_of(), "int4").effective, GRIDS["int4"])
    assert (int(codes.min()), int(codes.max())) == (-7, 7)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scales_come_to_exactly_what_the_file_will_hold(precision):
    scales = group_scales(weight_of(), precision, fused=3, importance=torch.ones(256))
    stored = scales.wscales.float()
    if precision == "nvfp4":
        assert scales.wtscale is None
        assert scales.wcscales is not None
        stored = stored * scales.wcscales.float()[:, None]
        assert len(scales.wcscales.unique()) == 3
    assert torch.equal(stored, scales.effective)


def test_an_unfused_nvfp4_layer_has_one_outer_scale():
    scales = group_scales(weight_of(), "nvfp4")
    assert scales.wcscales is None
    assert scales.wtscale is not None
    assert torch.equal(scales.wscales.float() * scales.wtscale, scales.effective)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_searched_scales_never_lose_to_the_plain_ones(precision):
    weight = weight_of()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(5)) + 0.1
    errors = []
    for given in (None, importance):
        scales = group_scales(weight, precision, importance=given)
        codes = round_nearest(weight, scales.effective, GRIDS[precision])
        errors.append(
            float(((GRIDS[precision].dequantize(codes, scales.effective) - weight).square() * importance).sum())
        )
    assert errors[1] < errors[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_groups_of_zeros_have_codes_of_zero(precision):
    weight = weight_of()
    weight[:, 64:128] = 0
    weight[5] = 0
    scales = group_scales(weight, precision, importance=torch.ones(256))
    rounded = GRIDS[precision].dequantize(
        round_nearest(weight, scales.effective, GRIDS[precision]), scales.effective
    )
    assert torch.isfinite(rounded).all()
    assert float(rounded[:, 64:128].abs().max()) == float(rounded[5].abs().max()) == 0.0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gptq_halves_the_output_error_on_inputs_it_has_not_seen(precision):
    weight, seen, unseen = weight_of(), correlated_inputs(seed=4), correlated_inputs(seed=5)
    grid, scales = GRIDS[precision], group_scales(weight, precision).effective
    errors = [
        float((unseen @ (grid.dequantize(codes, scales) - weight).T).norm())
        for codes in (round_nearest(weight, scales, grid), round_gptq(weight, scales, grid, seen.T @ seen))
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gptq_for_inputs_without_correlation_is_nearest(precision):
    weight, scales = weight_of(), group_scales(weight_of(), precision).effective
    hessian = torch.diag(torch.linspace(1.0, 3.0, 256))
    assert torch.equal(
        round_gptq(weight, scales, GRIDS[precision], hessian), round_nearest(weight, scales, GRIDS[precision])
    )


def test_gptq_works_with_zeros_too():
    weight, x = weight_of() + 0.02, correlated_inputs()
    groups = weight.view(len(weight), -1, 128)
    zeros = groups.amin(dim=-1)
    scales = (groups.amax(dim=-1) - zeros) / 15
    grid = uint4(128)
    errors = []
    for codes in (
        round_nearest(weight, scales, grid, zeros),
        round_gptq(weight, scales, grid, x.T @ x, zeros),
    ):
        values = (codes.float().view_as(groups) * scales.unsqueeze(-1) + zeros.unsqueeze(-1)).view_as(weight)
        errors.append(float((x @ (values - weight).T).norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    "hessian", [torch.zeros(256, 256), torch.full((256, 256), torch.nan)], ids=["zeros", "NaN"]
)
def test_a_useless_hessian_rounds_to_nearest(hessian):
    weight, scales = weight_of(), group_scales(weight_of(), "int4").effective
    assert torch.equal(
        round_gptq(weight, scales, GRIDS["int4"], hessian), round_nearest(weight, scales, GRIDS["int4"])
    )


def test_inputs_of_few_directions_do_not_break_gptq():
    x = correlated_inputs(m=3)
    codes = round_gptq(weight_of(), group_scales(weight_of(), "int4").effective, GRIDS["int4"], x.T @ x)
    assert codes.abs().max() <= 7
