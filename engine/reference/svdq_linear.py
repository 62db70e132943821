"""svdq_linear: a linear whose weight is a 4-bit residual plus a 16-bit low-rank branch. What kernels are held to.

Letters: x (M, K) activations of type h (bf16, fp16, or fp32 on the CPU), h(.) rounds to it; w codes, ws wscales,
c smooth_factor, s input_shift, D proj_down, U proj_up, b bias, wt wtscale, wc wcscales; G groups of channels k,
q(.) the value of a code. b' is b with the correction for s taken out (b itself where s = 0). Sums are fp32.

numerics = "tonfa": nothing is rounded but codes, nvfp4's scales, the low-rank activations and the result.

    w4a16          y = h( wc wt sum_k (x_k / c_k) ws q(w_k)                              + b' + h(x D) U^T )
    w4a8           y = h( wc wt a sum_g ws_g sum_{k in g} q(p_k) q(w_k)                  + b' + h(x D) U^T )
                       v = x / c             a = max_k |v_k| / 448, one per row          p = e4m3(v / a)
    w4a4, int4     y = h( wc wt sum_g a_g ws_g sum_{k in g} p_k w_k                      + b  + h(x D) U^T )
                       v = (x + s) / c       a_g = max_{k in g} |v_k| / 7, G = 64        p = round(v / a) in -7..7
                       where s is not 0:     a_g = max_{k in g} |v_k| / 15               p = round(v / a) in 0..15
    w4a4, nvfp4    the same sum with q(p) q(w)
                       v = x / c             a_g = e4m3(min(max |v_k| / 6, 448)), G = 16 p = e2m1(v / a)

w4a16 takes h(x D) unrounded, since a CPU runs it as one dense product. Rounding is to nearest, ties to even.
max / 7 is max * fp32(1/7), and v / a is v * fp32(1/a), as on a GPU. The order of the fp32 sums is free, and a GPU's
reciprocal is approximate: a kernel may therefore differ by 1 in a code at a tie.

numerics = "public" (w4a4 only; the public engine has nothing else) rounds on the way, as that engine does:

    int4           v = h(h(x + s) / c)       a as above in fp32, p by it, then a := h(a)
                   acc := h(h(sum_{k in g} p_k w_k) h(a_g ws_g) + acc), group after group: the accumulator is 16-bit
    nvfp4          v = h(x / c)              a as above; p by the scale before its rounding to e4m3
                   acc = h(wt sum ...), accumulated in fp32
    both           y = h( h(wc acc + b) + h(x D) U^T )

`svdq_linear` starts from x. `svdq_linear_quantized` is what a kernel does: it starts from a `QuantizedAct`, may
carry LoRAs and ends in an epilogue. There the low-rank part is h(sigma L) U^T, L = x D in fp32 and sigma one scale
per 16 ranks; ranks whose sigma is 0 are left out. What a kernel of w4a16 multiplies is 16-bit on both sides:

    w4a16          y = wc wt sum_k h(x_k / c_k) h(ws q(w_k)) + b' + h(sigma L) U^T;  h(ws q(w)) is exact for nvfp4

Sources: the public engine's code; "SVDQuant" (Li et al. 2024) for the decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from engine.reference.e2m1 import decode_e2m1
from engine.reference.quantize_act import (
    HALF_TYPES as HALF_TYPES,
)
from engine.reference.quantize_act import (
    RANK_SLICE,
    ActFormat,
    ActTarget,
    Numerics,
    QuantizedAct,
    dequantize,
    pack_nibbles,
    project_down,
    quantize_act_e4m3,
    quantize_act_int4,
    quantize_act_nvfp4,
    smooth,
)

Precision = Literal["int4", "nvfp4"]
LinearPlan = Literal["w4a4", "w4a8", "w4a16"]
GROUP_SIZE: dict[Precision, int] = {"int4": 64, "nvfp4": 16}
RMS_EPS = 1e-6
FP16_MAX = 65504.0
LOW_FRACTION = 28  # fractional bits of low-rank activations that a GEMM's epilogue added up as integers


@dataclass(frozen=True, eq=False)
class SVDQuantWeights:
    """The weights of one quantized linear: logical order, without padding, on any device.

    N out channels, K in channels, R rank, G group size (64 for int4, 16 for nvfp4), h bf16, fp16 or fp32:

        y = wcscales * (wtscale * quantized((x + input_shift) / smooth_factor) @ (codes * wscales).T) + bias
            + (x @ proj_down) @ proj_up.T

    The low-rank branch sees x as it is: neither shifted nor smoothed. Source: the public SVDQuant file format.
    Raises ValueError when shapes or dtypes do not fit together.
    """

    precision: Precision
    codes: Tensor  # (N, K) int8 -8..7 for int4; uint8 e2m1 codes 0..15 for nvfp4
    wscales: Tensor  # (N, K/G) h for int4, float8_e4m3fn for nvfp4
    smooth_factor: Tensor  # (K,) h, x is divided by it
    bias: Tensor | None  # (N,) h as stored: with input_shift != 0 it holds the correction for that shift
    proj_down: Tensor  # (K, R) h
    proj_up: Tensor  # (N, R) h
    wtscale: Tensor | None = None  # () fp32, one scale for the whole residual
    wcscales: Tensor | None = None  # (N,) h, one scale per out channel
    input_shift: float = 0.0  # 11/64 for what follows a GELU in int4 files, else 0; the family knows

    def __post_init__(self) -> None:
        if self.precision not in GROUP_SIZE:
            raise ValueError(f"SVDQuantWeights: no precision {self.precision!r}")
        if self.codes.ndim != 2 or self.codes.shape[1] % self.group_size:
            raise ValueError(
                f"SVDQuantWeights: codes must be (N, K) with K a multiple of {self.group_size}, "
                f"got {tuple(self.codes.shape)}"
            )
        n, k, rank = self.out_features, self.in_features, self.proj_down.shape[-1]
        for name, tensor, shape in (
            ("wscales", self.wscales, (n, k // self.group_size)),
            ("smooth_factor", self.smooth_factor, (k,)),
            ("bias", self.bias, (n,)),
            ("proj_down", self.proj_down, (k, rank)),
            ("proj_up", self.proj_up, (n, rank)),
            ("wtscale", self.wtscale, ()),
            ("wcscales", self.wcscales, (n,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"SVDQuantWeights: {name} must be {shape}, got {tuple(tensor.shape)}")
        int4 = self.precision == "int4"
        code_type, scale_types = (torch.int8, HALF_TYPES) if int4 else (torch.uint8, (torch.float8_e4m3fn,))
        if self.codes.dtype != code_type or self.wscales.dtype not in scale_types:
            raise ValueError(
                f"SVDQuantWeights: {self.precision} takes {code_type} codes with scales in {scale_types}, "
                f"got {self.codes.dtype} and {self.wscales.dtype}"
            )

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def rank(self) -> int:
        return self.proj_down.shape[1]

    @property
    def group_size(self) -> int:
        return GROUP_SIZE[self.precision]

    def residual(self) -> Tensor:
        """(N, K) fp32: codes x wscales x wtscale x wcscales, acting on the shifted and smoothed input."""
        values = self.codes.float() if self.precision == "int4" else decode_e2m1(self.codes)
        groups = values.view(self.out_features, -1, self.group_size)
        residual = (groups * self.wscales.float().unsqueeze(-1)).view_as(values)
        if self.wtscale is not None:
            residual = residual * self.wtscale.float()
        if self.wcscales is not None:
            residual = residual * self.wcscales.float().unsqueeze(-1)
        return residual

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The 16-bit linear this one stands for: weight (N, K) fp32 with the low-rank branch, bias (N,) fp32.

        The bias is the one for the unshifted input: the correction for `input_shift` is taken out.
        """
        weight = self.residual() / self.smooth_factor.float()
        bias = self._unshifted_bias(weight)
        return weight.addmm_(self.proj_up.float(), self.proj_down.float().T), bias

    def unshifted_bias(self) -> Tensor | None:
        """The bias for the unshifted input, (N,) fp32: what every plan but w4a4 adds."""
        if self.input_shift == 0:
            return None if self.bias is None else self.bias.float()
        return self._unshifted_bias(self.residual() / self.smooth_factor.float())

    def _unshifted_bias(self, unsmoothed: Tensor) -> Tensor | None:
        if self.input_shift == 0:
            return None if self.bias is None else self.bias.float()
        correction = self.input_shift * unsmoothed.sum(dim=1)
        return correction if self.bias is None else self.bias.float() + correction


def svdq_linear(x: Tensor, weights: SVDQuantWeights, plan: LinearPlan, numerics: Numerics = "tonfa") -> Tensor:
    """x: (M, K) h, before shift and smoothing. Returns (M, N) h. The module's docstring has the formulas.

    Raises ValueError for an x of another width, and for "public" numerics of a plan the public engine lacks.
    """
    if x.ndim != 2 or x.shape[1] != weights.in_features:
        raise ValueError(f"svdq_linear: x must be (M, {weights.in_features}), got {tuple(x.shape)}")
    if plan == "w4a16" and numerics == "tonfa":
        weight, bias = weights.dense()
        y = x.float() @ weight.T
        return (y if bias is None else y + bias).to(x.dtype)
    low_rank = project_down(x, weights.proj_down).to(x.dtype).float() @ weights.proj_up.float().T
    if numerics == "public":
        if plan != "w4a4":
            raise ValueError(f"svdq_linear: there are no public numerics of {plan}")
        return (_public_w4a4(x, weights).float() + low_rank).to(x.dtype)
    y = _dequantized_input(x, weights, plan) @ weights.residual().T
    bias = weights.unshifted_bias() if plan == "w4a8" else weights.bias
    return ((y if bias is None else y + bias.float()) + low_rank).to(x.dtype)


def act_format(weights: SVDQuantWeights, plan: LinearPlan) -> ActFormat:
    """What the input of a linear must be under a plan."""
    if plan != "w4a4":
        return "e4m3" if plan == "w4a8" else "half"
    if weights.precision == "nvfp4":
        return "nvfp4"
    return "uint4" if weights.input_shift else "int4"


@dataclass(frozen=True, eq=False)
class Plain:
    """The result as it is. out: (M, N) h to write to, rows may stand further apart; None: a new tensor."""

    out: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Gelu:
    """GELU (tanh form) of the result. out as in `Plain`."""

    out: Tensor | None = None


@dataclass(frozen=True, eq=False)
class QKNormRope:
    """N = 3 C, rows q | k | v of heads of 128: q and k are RMS-normalized, then turned by the tokens' angles.

    out as in `Plain`: text and image write their rows into one tensor.
    """

    norm_q: Tensor  # (128,) fp32
    norm_k: Tensor  # (128,) fp32
    cos: Tensor  # (M, 64) fp32, of the rows of this call
    sin: Tensor
    out: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GateResidual:
    """residual + gate * result; fp16 stays within +-65504. out may be the residual itself; None: a new tensor."""

    gate: Tensor  # (N,) h or fp32
    residual: Tensor  # (M, N) h, rows may stand further apart
    out: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GeluQuantize:
    """GELU of the result, rounded to h; then what `quantize_act` does for the next linear.

    "e4m3" needs a scale before any row is complete: row_slope * (this linear's own row scale) + row_offset, where
    the row scale counts as 1 if its input has none. `low` comes back as int64 with LOW_FRACTION fractional bits.
    """

    target: ActTarget
    row_slope: float = 0.0
    row_offset: float = 1.0


Epilogue = Plain | Gelu | QKNormRope | GateResidual | GeluQuantize


def svdq_linear_quantized(
    act: QuantizedAct,
    weights: SVDQuantWeights,
    plan: LinearPlan,
    epilogue: Epilogue,
    *,
    dtype: torch.dtype,
    rank_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor | QuantizedAct:
    """act: (M, K) in the plan's format. Returns (M, N) h = dtype, or the next linear's input after GeluQuantize.

    rank_scales: (R/16,) fp32, 1 where None. bias: (N,) fp32 in the place of the weights' own.
    Raises ValueError for an input of another width, format or rank.
    """
    check_act(act, weights.in_features, weights.rank, act_format(weights, plan))
    residual = weights.residual()
    if plan == "w4a16":
        residual = _rounded_residual(weights, dtype)
    y = dequantize(act) @ residual.T
    if bias is None:
        bias = weights.bias if plan == "w4a4" else weights.unshifted_bias()
    y = y if bias is None else y + bias.float()
    if act.low is not None:
        y = y + _scaled_low(act.low, rank_scales, dtype) @ weights.proj_up.to(dtype).float().T
    return finish(y, act, epilogue, dtype)


def check_act(act: QuantizedAct, in_features: int, rank: int, wanted: ActFormat) -> None:
    """Raises ValueError, naming the numbers, for an input that a linear cannot take."""
    if act.format != wanted or act.in_features != in_features:
        raise ValueError(
            f'svdq_linear: takes "{wanted}" of width {in_features}, got "{act.format}" of width {act.in_features}'
        )
    found = 0 if act.low is None else act.low.shape[1]
    if found != rank:
        raise ValueError(f"svdq_linear: a linear of rank {rank} takes low of that width, got {found}")


def finish(y: Tensor, act: QuantizedAct, epilogue: Epilogue, dtype: torch.dtype) -> Tensor | QuantizedAct:
    """y: (M, N) fp32, before any rounding, of the input `act`. What a linear makes of it."""
    match epilogue:
        case Plain(out):
            return _written(y.to(dtype), out)
        case Gelu(out):
            return _written(gelu(y).to(dtype), out)
        case QKNormRope(norm_q, norm_k, cos, sin, out):
            return _written(_normed_and_turned(y, norm_q, norm_k, cos, sin).to(dtype), out)
        case GateResidual(gate, stream, out):
            y = stream.float() + gate.float() * y
            return _written((y.clamp(-FP16_MAX, FP16_MAX) if dtype == torch.float16 else y).to(dtype), out)
        case GeluQuantize(target, slope, offset):
            return _quantize_next(gelu(y).to(dtype), act, target, slope, offset)


def gelu(y: Tensor) -> Tensor:
    """y / 2 (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))), fp32."""
    return torch.nn.functional.gelu(y, approximate="tanh")


def _written(y: Tensor, out: Tensor | None) -> Tensor:
    return y if out is None else out.copy_(y)


def _rounded_residual(weights: SVDQuantWeights, dtype: torch.dtype) -> Tensor:
    """(N, K) fp32: h(ws q(w)), what w4a16 multiplies by; the outer scales are multiplied later, in fp32."""
    inner = replace(weights, wtscale=None, wcscales=None).residual().to(dtype).float()
    if weights.wtscale is not None:
        inner = inner * weights.wtscale.float()
    return inner if weights.wcscales is None else inner * weights.wcscales.float().unsqueeze(-1)


def _scaled_low(low: Tensor, rank_scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(M, R) fp32: h(low * scale), and 0 where the scale is 0, whatever low is."""
    low = low.float() * 2.0**-LOW_FRACTION if low.dtype == torch.int64 else low
    if rank_scales is None:
        return low.to(dtype).float()
    scales = rank_scales.repeat_interleave(RANK_SLICE)
    return torch.where(scales == 0, 0.0, low * scales).to(dtype).float()


def _normed_and_turned(y: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    m, n = y.shape
    heads = y.view(m, 3, -1, norm_q.shape[0])  # (M, 3, H, D)
    weight = torch.stack([norm_q, norm_k]).float().unsqueeze(1)  # (2, 1, D)
    scale = (heads[:, :2].square().mean(dim=-1, keepdim=True) + RMS_EPS).rsqrt()
    even, odd = (heads[:, :2] * scale * weight).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([turned, heads[:, 2:]], dim=1).view(m, n)


def _quantize_next(x: Tensor, act: QuantizedAct, target: ActTarget, slope: float, offset: float) -> QuantizedAct:
    """`quantize_act` of x (M, N) h, but e4m3's scales are fixed beforehand and low is added up as integers."""
    scales: Tensor | None
    match target.format:
        case "int4" | "uint4":
            shift = target.shift if target.format == "uint4" else None
            codes, scales = quantize_act_int4(x, target.smooth_factor, unsigned_shift=shift)
            codes, scales = pack_nibbles(codes), scales.T.contiguous()
        case "nvfp4":
            codes, scales = quantize_act_nvfp4(x, target.smooth_factor)
            codes, scales = pack_nibbles(codes), scales.view(torch.uint8)
        case "half":
            codes, scales = smooth(x, target.smooth_factor).to(x.dtype), None
        case "e4m3":
            own = act.scales if act.format == "e4m3" and act.scales is not None else x.new_ones(x.shape[0]).float()
            codes, scales = quantize_act_e4m3(x, target.smooth_factor, scale=own * slope + offset)
            codes = codes.view(torch.uint8)
    if not target.rank:
        return QuantizedAct(target.format, codes, scales, None)
    low = (project_down(x, target.proj_down).double() * 2.0**LOW_FRACTION).round().long()
    return QuantizedAct(target.format, codes, scales, low)


def _dequantized_input(x: Tensor, weights: SVDQuantWeights, plan: LinearPlan) -> Tensor:
    """(M, K) fp32: what the codes of x stand for, shifted and smoothed; in a sum over K that is all that counts."""
    if plan == "w4a8":
        codes, ascales = quantize_act_e4m3(x, weights.smooth_factor)
        return codes.float() * ascales.unsqueeze(-1)
    if weights.precision == "nvfp4":
        codes, ascales = quantize_act_nvfp4(x, weights.smooth_factor)
        values = decode_e2m1(codes)
    else:
        codes, ascales = quantize_act_int4(x, weights.smooth_factor, unsigned_shift=weights.input_shift or None)
        values = codes.float()
    groups = values.view(x.shape[0], -1, weights.group_size)
    return (groups * ascales.float().unsqueeze(-1)).view_as(values)


def _public_w4a4(x: Tensor, weights: SVDQuantWeights) -> Tensor:
    """(M, N) h: everything but the low-rank branch, rounded wherever the public engine rounds."""
    h = x.dtype
    if weights.precision == "nvfp4":
        codes, ascales = quantize_act_nvfp4(x, weights.smooth_factor, numerics="public")
        groups = decode_e2m1(codes).view(x.shape[0], -1, weights.group_size) * ascales.float().unsqueeze(-1)
        values = decode_e2m1(weights.codes).view(weights.out_features, -1, weights.group_size)
        y = groups.flatten(1) @ (values * weights.wscales.float().unsqueeze(-1)).flatten(1).T
        acc = (y if weights.wtscale is None else y * weights.wtscale).to(h)
    else:
        shift = weights.input_shift or None
        codes, ascales = quantize_act_int4(x, weights.smooth_factor, unsigned_shift=shift, numerics="public")
        acc = torch.zeros(x.shape[0], weights.out_features, dtype=h, device=x.device)
        wscales = weights.wscales.to(h).float()
        for g in range(wscales.shape[1]):
            channels = slice(g * weights.group_size, (g + 1) * weights.group_size)
            dot = codes[:, channels].float() @ weights.codes[:, channels].float().T  # exact: below 2^24
            scale = (ascales[:, g, None].float() * wscales[:, g]).to(h)
            acc = (dot.to(h).float() * scale.float() + acc.float()).to(h)
    if weights.wcscales is None and weights.bias is None:
        return acc
    wcscales = torch.ones((), device=x.device) if weights.wcscales is None else weights.wcscales.to(h).float()
    bias = torch.zeros((), device=x.device) if weights.bias is None else weights.bias.to(h).float()
    return (acc.float() * wcscales + bias).to(h)
