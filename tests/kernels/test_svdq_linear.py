"""svdq_linear: every plan computes the dense linear that the weights stand for, as well as its precision allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.reference.e2m1 import encode_e2m1
from engine.reference.quantize_act import quantize_act_e4m3, quantize_act_int4, quantize_act_nvfp4
from engine.reference.svdq_linear import LinearPlan, Precision, SVDQuantWeights, svdq_linear
from tests.golden import golden
from tests.kernels.golden_linears import GELU_SHIFT, golden_linear
from tests.tolerances import RELATIVE, largest_error, relative_error

PRECISIONS: list[Precision] = ["int4", "nvfp4"]
# Relative error of the layer's output on normal activations: 4 and 8 bit codes of them, or none.
PLAN_ERROR: dict[LinearPlan, float] = {"w4a4": 0.14, "w4a8": 0.04, "w4a16": 1e-5}


def random_weights(precision: Precision, n: int = 96, k: int = 256, rank: int = 16) -> SVDQuantWeights:
    wcscales: Tensor | None = None
    wtscale: Tensor | None = None
    if precision == "int4":
        codes = torch.randint(-7, 8, (n, k), dtype=torch.int8)
        wscales = 0.01 + 0.01 * torch.rand(n, k // 64)
    else:
        codes = encode_e2m1(3 * torch.randn(n, k))
        wscales = (100 + 200 * torch.rand(n, k // 16)).to(torch.float8_e4m3fn)
        wtscale, wcscales = torch.tensor(1e-4), 0.5 + torch.rand(n)
    return SVDQuantWeights(
        precision=precision,
        codes=codes,
        wscales=wscales,
        smooth_factor=0.5 + torch.rand(k),
        bias=torch.randn(n),
        proj_down=torch.randn(k, rank) / k**0.5,
        proj_up=torch.randn(n, rank),
        wtscale=wtscale,
        wcscales=wcscales,
    )


def dense(x: Tensor, weights: SVDQuantWeights) -> Tensor:
    return F.linear(x, *weights.dense())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", list(PLAN_ERROR))
def test_every_plan_is_near_the_dense_linear(plan: LinearPlan, precision: Precision) -> None:
    weights, x = random_weights(precision), torch.randn(40, 256)
    error = relative_error(svdq_linear(x, weights, plan), dense(x, weights))
    assert PLAN_ERROR[plan] / 10 < error < PLAN_ERROR[plan] or (plan == "w4a16" and error < PLAN_ERROR[plan])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", list(PLAN_ERROR))
def test_what_is_exact_in_few_bits_comes_out_exact(plan: LinearPlan, precision: Precision) -> None:
    """Activations that are codes already: then only the low-rank branch and the sums are left to go wrong."""
    weights = random_weights(precision)
    weights = replace(weights, smooth_factor=torch.ones(256))
    x = torch.randint(-3, 4, (8, 256)).float()
    x[:, ::16] = (
        6 if (precision, plan) == ("nvfp4", "w4a4") else 7
    )  # the largest of every group: scale a power of 2
    found = svdq_linear(x, weights, plan)
    assert largest_error(found, dense(x, weights)) < RELATIVE[torch.float32]


@pytest.mark.parametrize("plan", list(PLAN_ERROR))
def test_the_gelu_shift_changes_nothing_but_the_codes(plan: LinearPlan) -> None:
    """A bias that holds the correction for a shift: with it taken into account, the linear is the same one."""
    plain = random_weights("int4")
    assert plain.bias is not None
    folded = plain.bias - GELU_SHIFT * (plain.residual() / plain.smooth_factor).sum(1)
    shifted = replace(plain, bias=folded, input_shift=GELU_SHIFT)
    x = F.gelu(torch.randn(40, 256), approximate="tanh")
    assert relative_error(dense(x, shifted), dense(x, plain)) < 1e-6
    assert relative_error(svdq_linear(x, shifted, plan), dense(x, plain)) < PLAN_ERROR[plan]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outer_scales_do_not_touch_the_low_rank_branch(precision: Precision) -> None:
    weights = replace(random_weights(precision), bias=None)
    silent = replace(weights, wcscales=torch.zeros(96), wtscale=torch.tensor(1.0))
    x = torch.randn(4, 256)
    for plan in PLAN_ERROR:
        low_rank = (x @ weights.proj_down) @ weights.proj_up.T
        assert relative_error(svdq_linear(x, silent, plan), low_rank) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", list(PLAN_ERROR))
def test_sixteen_bit_activations_cost_one_rounding(
    plan: LinearPlan, precision: Precision, dtype: torch.dtype
) -> None:
    weights, x = random_weights(precision), torch.randn(40, 256).to(dtype)
    narrow, wide = svdq_linear(x, weights, plan), svdq_linear(x.float(), weights, plan)
    assert narrow.dtype == dtype
    assert largest_error(narrow, wide) < RELATIVE[dtype]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tonfa_numerics_are_the_sum_of_the_docstring(precision: Precision) -> None:
    """Group by group, as the formula has it, for one row and one out channel."""
    weights, x = random_weights(precision), torch.randn(1, 256)
    n, group = 5, weights.group_size
    w = weights.residual()[n].view(-1, group)  # scales of weights included
    if precision == "int4":
        codes, ascales = quantize_act_int4(x, weights.smooth_factor)
        p = codes.float()
    else:
        codes, ascales = quantize_act_nvfp4(x, weights.smooth_factor)
        p = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes.int()]
    assert weights.bias is not None
    rest = weights.bias[n] + (x @ weights.proj_down @ weights.proj_up.T)[0, n]
    expected = (ascales[0].float() * (p.view(-1, group) * w).sum(1)).sum() + rest
    assert float(svdq_linear(x, weights, "w4a4")[0, n]) == pytest.approx(float(expected), rel=1e-5)
    codes, ascales = quantize_act_e4m3(x, weights.smooth_factor)
    expected = ascales[0] * (codes.float().view(-1, group) * w).sum() + rest
    assert float(svdq_linear(x, weights, "w4a8")[0, n]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("layer", "x"), [("fc1", "fc1.x"), ("fc2", "mlp.gelu")])
def test_public_numerics_are_the_golden_ones(layer: str, x: str, tmp_path: Path) -> None:
    tensors, weights = golden("svdq_numerics_int4"), golden_linear(layer, tmp_path)
    found, expected = svdq_linear(tensors[x], weights, "w4a4", "public"), tensors[f"{layer}.y_half_accum"]
    assert largest_error(found, expected) < RELATIVE[torch.bfloat16]
    assert (found != expected).float().mean() < 0.01


def test_without_intermediate_rounding_the_mlp_is_the_golden_one(tmp_path: Path) -> None:
    """Golden `y_fp32_accum`: public codes and scales, sums in fp32, and its fc2 reads its own fc1."""
    tensors = golden("svdq_numerics_int4")
    x = tensors["fc1.x"]
    for layer, shift in (("fc1", None), ("fc2", GELU_SHIFT)):
        weights, expected = golden_linear(layer, tmp_path), tensors[f"{layer}.y_fp32_accum"]
        codes, ascales = quantize_act_int4(x, weights.smooth_factor, unsigned_shift=shift, numerics="public")
        assert weights.bias is not None
        found = (codes.float() * ascales.float().repeat_interleave(64, 1)) @ weights.residual().T
        found += weights.bias.float() + x.float() @ weights.proj_down.float() @ weights.proj_up.float().T
        assert largest_error(found, expected) < RELATIVE[torch.float32]
        x = F.gelu(expected, approximate="tanh").bfloat16()


def test_public_nvfp4_is_near_ours() -> None:
    weights, x = random_weights("nvfp4"), torch.randn(40, 256).bfloat16()
    public, ours = (svdq_linear(x, weights, "w4a4", numerics) for numerics in ("public", "tonfa"))
    assert 0.001 < relative_error(public, ours) < 0.05  # codes of groups whose scale was rounded differ
    assert relative_error(ours, dense(x.float(), weights)) < relative_error(public, dense(x.float(), weights))


def test_what_does_not_exist_is_refused() -> None:
    weights = random_weights("int4")
    with pytest.raises(ValueError, match="256"):
        svdq_linear(torch.zeros(2, 64), weights, "w4a4")
    for plan in ("w4a8", "w4a16"):
        with pytest.raises(ValueError, match="public"):
            svdq_linear(torch.zeros(2, 256), weights, plan, "public")
