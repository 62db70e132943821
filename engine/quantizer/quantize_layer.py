"""The linears that share one input, from 16-bit weights to SVDQuant's: smooth, split off the low rank, round.

After each step the error of the layer's output on rows that no step has seen, weights and activations quantized,
by the reference arithmetic and from the numbers as they will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantizer import smooth
from engine.quantizer.low_rank import split_low_rank
from engine.quantizer.round_weights import GRIDS, HALF, group_scales, round_gptq, round_nearest
from engine.reference.quantize_act import quantize_act_int4, quantize_act_nvfp4
from engine.reference.svdq_linear import Precision, SVDQuantWeights, svdq_linear
from engine.requests import Rounding

COARSE_ROWS, FINE_ROWS = 512, 1024  # of the search for the smooth factor
HESSIAN_ROWS = 1024  # at a time


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person chose."""

    precision: Precision
    rank: int
    rounding: Rounding
    smooth: bool


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One linear before: weight (N, K) fp32, bias (N,) fp32 or None.

    fused: matrices stacked along N (3 for q, k, v). input_shift: 11/64 for what follows a GELU in int4, else 0.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    fused: int = 1
    input_shift: float = 0.0


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs of a linear, (M, K) fp32 each. is_real: seen in the network, not made up for want of prompts."""

    calibration: Tensor
    held_out: Tensor
    is_real: bool = True


@dataclass(frozen=True, slots=True)
class StepErrors:
    """Relative Frobenius error of a layer's output on held-out rows, without the bias in the norm."""

    rtn: float  # round to nearest, nothing else
    smooth: float  # smoothed as is best without a low-rank branch, which is less than with one
    svdquant: float  # smoothed as stored, with the low-rank branch, rounded to nearest
    final: float  # the same with the chosen rounding: what is stored


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    name: str
    weights: SVDQuantWeights
    errors: StepErrors


def quantize_shared_input(
    layers: Sequence[LayerWeights], rows: Rows, settings: Settings, check: Callable[[], None] = lambda: None
) -> list[QuantizedLayer]:
    """Quantize linears that read the same input; they get one smooth_factor, so a kernel quantizes the input once.

    check is called between pieces of a second or so and may raise to stop. Raises ValueError if widths differ.
    """
    width = rows.held_out.shape[1]
    if any(layer.weight.shape[1] != width for layer in layers):
        raise ValueError(f"quantize_shared_input: all layers must be {width} wide")
    factors = _choose_smooth_factors(layers, rows, settings, check)
    return [_quantize(layer, factors, rows, settings, check) for layer in layers]


def relative_error(weights: SVDQuantWeights, layer: LayerWeights, x: Tensor) -> float:
    """|| quantized(x) - exact(x) || / || x @ weight.T || by w4a4's reference arithmetic; 0 if nothing differs."""
    exact = x @ layer.weight.T
    size = float(exact.norm())
    got = svdq_linear(x, weights, "w4a4")
    difference = float((got - exact if layer.bias is None else got - exact - layer.bias).norm())
    return difference / size if size else difference


@dataclass(frozen=True, eq=False)
class _SmoothFactors:
    """Two (K,) in HALF: best with the low-rank branch, which is stored, and best without one, to compare."""

    stored: Tensor
    alone: Tensor


def _choose_smooth_factors(
    layers: Sequence[LayerWeights], rows: Rows, settings: Settings, check: Callable[[], None]
) -> _SmoothFactors:
    weights = smooth.weight_sizes([layer.weight for layer in layers])
    if not settings.smooth or not rows.is_real:
        factor = (
            smooth.smooth_factor_from_weights(weights) if settings.smooth else torch.ones_like(weights).to(HALF)
        )
        return _SmoothFactors(factor, factor)
    x = rows.calibration
    activations = smooth.activation_sizes(x, layers[0].input_shift)

    def errors(exponents: smooth.Exponents, num_rows: int) -> tuple[float, float]:
        """Of all layers' outputs together: with the low-rank branch, which takes what is pushed into the weights,
        and without."""
        check()
        factor = smooth.smooth_factor(activations, weights, exponents)
        some = x[:: max(1, len(x) // num_rows)]
        quantized = _dequantized_input(some, factor, settings.precision, layers[0].input_shift)
        quantized = quantized - layers[0].input_shift / factor.float()  # what the stored bias takes off again
        return (
            sum(_search_error(layer, factor, some, quantized, settings, settings.rank) for layer in layers),
            sum(_search_error(layer, factor, some, quantized, settings, 0) for layer in layers),
        )

    coarse = {exponents: errors(exponents, COARSE_ROWS) for exponents in smooth.coarse_candidates()}
    best, alone = (min(coarse, key=lambda e, i=i: coarse[e][i]) for i in (0, 1))  # type: ignore[misc]
    best = min([best, *smooth.finer_candidates(best)], key=lambda e: errors(e, FINE_ROWS)[0])
    return _SmoothFactors(
        smooth.smooth_factor(activations, weights, best), smooth.smooth_factor(activations, weights, alone)
    )


def _search_error(
    layer: LayerWeights, factor: Tensor, x: Tensor, quantized: Tensor, settings: Settings, rank: int
) -> float:
    """The squared relative error of one layer's output for x (M, K), whose low-bit part sees `quantized` (M, K)."""
    exact = x @ layer.weight.T
    residual, proj_down, proj_up = _split(layer, factor, rank, exact=False)
    grid = GRIDS[settings.precision]
    scales = group_scales(residual, settings.precision, fused=layer.fused).effective
    got = quantized @ grid.dequantize(round_nearest(residual, scales, grid), scales).T
    if rank:
        got += (x @ proj_down.float()) @ proj_up.float().T
    size = float(exact.square().sum())
    return float((got - exact).square().sum()) / size if size else 0.0


def _quantize(
    layer: LayerWeights, factors: _SmoothFactors, rows: Rows, settings: Settings, check: Callable[[], None]
) -> QuantizedLayer:
    factor, x = factors.stored, rows.held_out
    check()
    rtn = relative_error(_nearest(layer, torch.ones_like(factor), settings.precision), layer, x)
    smoothed = relative_error(_nearest(layer, factors.alone, settings.precision), layer, x)
    check()
    split = _split(layer, factor, settings.rank)
    weights = _assemble(layer, factor, *split, settings.precision, None)
    svdquant = final = relative_error(weights, layer, x)
    if settings.rounding == "gptq":
        check()
        if rows.is_real:
            hessian = quantized_hessian(rows.calibration, factor, settings.precision, layer.input_shift)
        else:
            hessian = torch.eye(len(factor), device=factor.device)  # the search for scales is what is left of GPTQ
        check()
        weights = _assemble(layer, factor, *split, settings.precision, hessian)
        final = relative_error(weights, layer, x)
    return QuantizedLayer(layer.name, weights, StepErrors(rtn, smoothed, svdquant, final))


def _nearest(layer: LayerWeights, factor: Tensor, precision: Precision) -> SVDQuantWeights:
    return _assemble(layer, factor, *_split(layer, factor, 0), precision, None)


def _split(
    layer: LayerWeights, factor: Tensor, rank: int, exact: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual (N, K) fp32 of the smoothed weight, proj_down (K, R) for the raw input and proj_up (N, R), HALF.

    The factors are rounded first, so that their rounding errors, too, are in what 4 bits hold.
    """
    smoothed = layer.weight * factor.float()
    up, down, _ = split_low_rank(smoothed, rank, exact=exact)
    proj_up, proj_down = up.to(HALF), (down / factor.float()[:, None]).to(HALF)
    residual = smoothed - proj_up.float() @ (proj_down.float() * factor.float()[:, None]).T
    return residual, proj_down, proj_up


def _assemble(
    layer: LayerWeights,
    factor: Tensor,
    residual: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    precision: Precision,
    hessian: Tensor | None,
) -> SVDQuantWeights:
    """Round the residual, to nearest or with a Hessian by GPTQ, and correct the bias for the input's shift."""
    grid = GRIDS[precision]
    importance = None if hessian is None else hessian.diagonal()
    scales = group_scales(residual, precision, fused=layer.fused, importance=importance)
    if hessian is None:
        codes = round_nearest(residual, scales.effective, grid)
    else:
        codes = round_gptq(residual, scales.effective, grid, hessian)
    bias = torch.zeros_like(residual[:, 0]) if layer.bias is None else layer.bias
    if layer.input_shift:
        rounded = grid.dequantize(codes, scales.effective)
        bias = bias - layer.input_shift * (rounded / factor.float()).sum(dim=1)
    return SVDQuantWeights(
        precision=precision,
        codes=codes,
        wscales=scales.wscales,
        smooth_factor=factor,
        bias=bias.to(HALF),
        proj_down=proj_down,
        proj_up=proj_up,
        wtscale=scales.wtscale,
        wcscales=scales.wcscales,
        input_shift=layer.input_shift,
    )


def quantized_hessian(x: Tensor, factor: Tensor, precision: Precision, shift: float) -> Tensor:
    """(K, K) fp32: mean of q.T @ q over rows q of x (M, K), shifted, smoothed and quantized as w4a4 will."""
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for rows in torch.split(x, HESSIAN_ROWS):
        quantized = _dequantized_input(rows, factor, precision, shift)
        total.addmm_(quantized.T, quantized)
    return total / len(x)


def _dequantized_input(x: Tensor, factor: Tensor, precision: Precision, shift: float) -> Tensor:
    """(M, K) fp32: what the codes of x stand for, shifted and smoothed."""
    if precision == "int4":
        codes, scales = quantize_act_int4(x, factor, unsigned_shift=shift or None)
    else:
        codes, scales = quantize_act_nvfp4(x, factor)
    return GRIDS[precision].dequantize(codes, scales.float())
