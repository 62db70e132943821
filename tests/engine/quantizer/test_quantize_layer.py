"""One linear, step by step: every step brings the output nearer, and what is stored is what was measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quantizer.quantize_layer import (
    LayerWeights,
    Rows,
    Settings,
    quantize_shared_input,
    relative_error,
)
from engine.reference.svdq_linear import svdq_linear

N, K = 256, 256


def inputs(m: int, seed: int, outlier: float = 30.0) -> Tensor:
    """Correlated rows with a few channels far larger than the others, in every row: what breaks plain W4A4."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(K, K, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1.5, K)[:, None]
    x = torch.randn(m, K, generator=generator) @ mixing / 4
    x[:, ::50] *= outlier
    return x


def layer(seed: int = 2, name: str = "layer", fused: int = 1, shift: float = 0.0) -> LayerWeights:
    """Weights with some strong directions, as trained ones have, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(N, 8, generator=generator) @ torch.randn(8, K, generator=generator) * 0.02
    weight = strong + torch.randn(N, K, generator=generator) * 0.03
    return LayerWeights(name, weight, torch.randn(N, generator=generator), fused, shift)


ROWS = Rows(inputs(512, seed=3), inputs(256, seed=4))


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_with_strong_outliers_every_step_is_better_than_the_one_before(precision):
    """The order the SVDQuant paper reports, on rows no step has seen."""
    (made,) = quantize_shared_input([layer()], ROWS, Settings(precision, 32, "gptq", smooth=True))
    errors = made.errors
    assert errors.rtn > 1.5 * errors.smooth
    assert errors.smooth > 1.05 * errors.svdquant
    assert errors.svdquant > 1.05 * errors.final


def test_the_last_error_is_the_error_of_what_is_stored():
    (made,) = quantize_shared_input([layer()], ROWS, Settings("int4", 16, "gptq", smooth=True))
    exact = ROWS.held_out @ layer().weight.T
    got = svdq_linear(ROWS.held_out, made.weights, "w4a4") - layer().bias
    assert made.errors.final == pytest.approx(float((got - exact).norm() / exact.norm()), rel=1e-6)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_the_dense_form_is_near_the_weight_it_came_from(precision):
    """Without quantized activations hardly any error is left: what a machine without a GPU runs."""
    before = layer()
    (made,) = quantize_shared_input([before], ROWS, Settings(precision, 32, "gptq", smooth=True))
    weight, bias = made.weights.dense()
    exact = ROWS.held_out @ before.weight.T
    error = float((ROWS.held_out @ weight.T - exact).norm() / exact.norm())
    assert error < 0.6 * made.errors.final
    assert (bias - before.bias).abs().max() < 0.02


def test_linears_that_read_one_input_share_one_smooth_factor():
    made = quantize_shared_input(
        [layer(2, "qkv", fused=2), layer(5, "fc1")], ROWS, Settings("int4", 16, "nearest", smooth=True)
    )
    assert [one.name for one in made] == ["qkv", "fc1"]
    assert torch.equal(made[0].weights.smooth_factor, made[1].weights.smooth_factor)
    assert not torch.equal(made[0].weights.smooth_factor.float(), torch.ones(K))


def test_behind_a_gelu_the_shift_buys_a_level_and_the_bias_pays_it_back():
    x = torch.nn.functional.gelu(
        torch.randn(1536, K, generator=torch.Generator().manual_seed(8)), approximate="tanh"
    )
    rows = Rows(x[:1024], x[1024:])
    settings = Settings("int4", 16, "gptq", smooth=True)
    errors = {}
    for shift in (0.0, 11 / 64):
        (made,) = quantize_shared_input([layer(shift=shift)], rows, settings)
        assert made.weights.input_shift == shift
        errors[shift] = made.errors.final
        unshifted = made.weights.dense()[1]
        assert (unshifted - layer().bias).abs().max() < 0.05  # bf16 of bias and correction together
    assert errors[11 / 64] < 0.8 * errors[0.0]


def test_rank_zero_and_no_smoothing_is_plain_rounding():
    (made,) = quantize_shared_input([layer()], ROWS, Settings("int4", 0, "nearest", smooth=False))
    assert made.weights.rank == 0
    assert torch.equal(made.weights.smooth_factor.float(), torch.ones(K))
    assert made.errors.rtn == made.errors.smooth == made.errors.svdquant == made.errors.final


def test_a_layer_without_a_bias_gets_zeros():
    before = layer()
    (made,) = quantize_shared_input(
        [LayerWeights("out", before.weight, None)], ROWS, Settings("int4", 16, "nearest", smooth=False)
    )
    assert made.weights.bias is not None
    assert not made.weights.bias.any()


def test_a_layer_of_zeros_stays_one():
    before = LayerWeights("zeros", torch.zeros(N, K), torch.zeros(N))
    for precision in ("int4", "nvfp4"):
        (made,) = quantize_shared_input([before], ROWS, Settings(precision, 16, "gptq", smooth=True))
        assert made.errors.final == 0
        assert not made.weights.dense()[0].any()


def test_without_real_rows_smoothing_looks_at_weights_alone():
    rows = Rows(torch.zeros(8, K), ROWS.held_out, is_real=False)
    (made,) = quantize_shared_input([layer()], rows, Settings("int4", 32, "gptq", smooth=True))
    assert made.errors.final <= made.errors.svdquant
    assert relative_error(made.weights, layer(), ROWS.held_out) == pytest.approx(made.errors.final)


def test_widths_must_agree():
    with pytest.raises(ValueError, match="256"):
        quantize_shared_input(
            [LayerWeights("x", torch.zeros(N, 64), None)], ROWS, Settings("int4", 0, "nearest", smooth=False)
        )


def test_the_check_between_pieces_stops_the_work():
    class Stop(Exception):  # noqa: N818
        pass

    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stop

    with pytest.raises(Stop):
        quantize_shared_input([layer()], ROWS, Settings("int4", 16, "gptq", smooth=True), check)
