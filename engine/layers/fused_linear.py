"""SVDQuant linears that run through our kernels, each with what stands around it fused into it.

Everything here takes one picture: activations are (1, L, K), or the `QuantizedAct` of its L tokens that an earlier
kernel left. CPU tensors go through the reference, so that the same code is tested without a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from engine.kernels._fused_scale import fused_gelu_scale, gelu_reach
from engine.kernels.quantize_act import arrange_target, quantize_act
from engine.kernels.svdq_linear import ArrangedLinear, arrange, source_of, svdq_linear, with_branches
from engine.layers.linear import RANK_STEP, Act, BranchedLinear, LowRankBranches
from engine.layers.svdquant_linear import LayerPlan, runnable_plan
from engine.reference.quantize_act import K_STEP, MAX_RANK, ActTarget, QuantizedAct
from engine.reference.svdq_linear import (
    GateResidual,
    Gelu,
    GeluQuantize,
    Plain,
    Precision,
    QKNormRope,
    SVDQuantWeights,
)

HEAD_DIM = 128  # of the kernels that finish q and k


@dataclass(frozen=True, eq=False)
class Layout:
    """How a linear runs with the LoRAs it carries: its own ranks first, then theirs, a scale for each 16 of them.

    Linears that read the same input may share a target; `ranks` are the columns of its low-rank activations that
    this one takes.
    """

    linear: ArrangedLinear
    target: ActTarget
    ranks: slice


class FusedLinear(BranchedLinear):
    """y = low-bit product of quantized x and the residual + bias + low-rank branches, in one kernel.

    `plan` is what really runs, see `runnable_plan`. `layout` is exchanged whole when LoRAs come or go; a new
    strength writes the one buffer of the model that all rank scales are views of.
    """

    def __init__(
        self, weights: SVDQuantWeights, plan: LayerPlan, dtype: torch.dtype, arch: str | None = None
    ) -> None:
        """arch: the card's ("90a"), which `weights` are on; None for the reference. Keeps nothing of `weights`."""
        super().__init__(weights.in_features, weights.out_features)
        self.plan: LayerPlan = runnable_plan(weights, plan)
        if arch is not None and not has_kernel(self.plan, weights.precision, arch):
            self.plan = "w4a16"
        self.precision = weights.precision
        self.rank = weights.rank
        self.dtype = dtype
        linear = arrange(weights, self.plan, dtype, arch)
        target = ActTarget(
            format=linear.format,
            smooth_factor=weights.smooth_factor.float(),
            proj_down=weights.proj_down.to(dtype),
            rank_scales=linear.rank_scales,
            shift=weights.input_shift if linear.format == "uint4" else 0.0,
        )
        self.layout = Layout(linear, arrange_target(target), slice(0, self.rank))
        self.own_layout = self.layout  # the one without LoRAs
        self._reach = gelu_reach(weights) if self.plan == "w4a8" else None
        self._gelu_scale = (0.0, 1.0)

    @property
    def target(self) -> ActTarget:
        return self.layout.target

    def forward(self, x: Act) -> Tensor:
        return self._run(x, Plain())

    def gelu(self, x: Act, reader: BranchedLinear) -> Act:
        if isinstance(reader, FusedLinear) and (reader.plan, reader.precision) == (self.plan, self.precision):
            made = svdq_linear(self.read(x), self.layout.linear, GeluQuantize(reader.target, *self._gelu_scale))
            assert isinstance(made, QuantizedAct)
            return made
        return self._run(x, Gelu())

    def feeds(self, reader: BranchedLinear | None) -> None:
        """Told once, when all is loaded: who reads this one's GELU, which decides how it is scaled under w4a8."""
        if self._reach is not None and isinstance(reader, FusedLinear) and reader.plan == self.plan:
            self._gelu_scale = fused_gelu_scale(self._reach, reader.target.smooth_factor)
        self._reach = None

    def write_qkv(self, out: Tensor, x: Act, norm_q: Tensor, norm_k: Tensor, table: tuple[Tensor, Tensor]) -> None:
        """Write q | k | v into `out` (L, 3C): q and k normed by (D,) weights, turned by `table`, (L, D/2) each."""
        svdq_linear(self.read(x), self.layout.linear, QKNormRope(norm_q, norm_k, *table, out))

    def add_gated(self, residual: Tensor, gate: Tensor, x: Act, in_place: bool) -> Tensor:
        """residual + gate * self(x). residual: (1, L, N); gate: (1, 1, N). in_place: residual may be written."""
        stream = _tokens(residual)
        out = stream if in_place else None
        y = svdq_linear(self.read(x), self.layout.linear, GateResidual(gate.flatten(), stream, out))
        assert isinstance(y, Tensor)
        return y.unsqueeze(0)

    def read(self, x: Act) -> QuantizedAct:
        """x as the kernel takes it: quantized now if it was not, with this linear's low-rank columns alone."""
        act = x if isinstance(x, QuantizedAct) else quantize_act(_tokens(x), self.target)
        ranks = self.layout.ranks
        if act.low is None or ranks == slice(0, act.low.shape[1]):
            return act
        return replace(act, low=act.low[:, ranks] if ranks.start < ranks.stop else None)

    def _run(self, x: Act, epilogue: Plain | Gelu) -> Tensor:
        y = svdq_linear(self.read(x), self.layout.linear, epilogue)
        assert isinstance(y, Tensor)
        return y.unsqueeze(0)


def fits_kernels(weights: SVDQuantWeights) -> bool:
    """Whether a layer's sizes are ones that kernels take."""
    return weights.out_features % 8 == 0 and weights.in_features % K_STEP == 0


def has_kernel(plan: LayerPlan, precision: Precision, arch: str) -> bool:
    try:
        source_of(plan, precision, arch)
    except ValueError:
        return False
    return True


def share_input(*linears: BranchedLinear) -> None:
    """Let linears that read the same input quantize it once, where all of them want the same made of it."""
    fused = [linear for linear in linears if isinstance(linear, FusedLinear)]
    if len(fused) < len(linears) or not all(_alike(fused[0].target, linear.target) for linear in fused):
        return
    steps = sum(linear.rank for linear in fused) // RANK_STEP
    scales = torch.ones(steps, device=fused[0].target.smooth_factor.device)
    for linear, layout in zip(fused, side_by_side(fused, [None] * len(fused), scales), strict=True):
        linear.layout = linear.own_layout = layout


def side_by_side(
    linears: Sequence[FusedLinear], branches: Sequence[LowRankBranches | None], scales: Tensor
) -> list[Layout]:
    """New layouts for linears that want the same made of one input, each with its LoRAs behind its own ranks.

    scales: fp32, one for each 16 ranks: the first linear's own, its LoRAs', the second one's own, and so on.
    They share a target as far as its rank goes.
    """
    arranged, downs, start = [], [], 0
    for linear, added in zip(linears, branches, strict=True):
        own = linear.own_layout
        down = own.target.proj_down[:, own.ranks]
        downs.append(down if added is None else torch.cat([down, added.proj_down], dim=1))
        stop = start + downs[-1].shape[1]
        mine = scales[start // RANK_STEP : stop // RANK_STEP]
        start = stop
        arranged.append(
            replace(own.linear, rank_scales=mine)
            if added is None
            else with_branches(own.linear, added.proj_up, mine)
        )
    target = linears[0].own_layout.target
    if start > MAX_RANK:
        return [
            Layout(one, _with_factors(target, down, one.rank_scales), slice(0, one.rank))
            for one, down in zip(arranged, downs, strict=True)
        ]
    shared = _with_factors(target, torch.cat(downs, dim=1), scales)
    stops = list(accumulate(one.rank for one in arranged))
    return [Layout(one, shared, slice(stop - one.rank, stop)) for one, stop in zip(arranged, stops, strict=True)]


def _with_factors(target: ActTarget, proj_down: Tensor, rank_scales: Tensor) -> ActTarget:
    return arrange_target(replace(target, proj_down=proj_down, rank_scales=rank_scales))


def _alike(one: ActTarget, other: ActTarget) -> bool:
    """Whether two targets make the same codes of the same input."""
    return (
        (one.format, one.shift, one.proj_down.dtype) == (other.format, other.shift, other.proj_down.dtype)
        and one.in_features == other.in_features
        and torch.equal(one.smooth_factor, other.smooth_factor)
    )


def _tokens(x: Tensor) -> Tensor:
    """(1, L, C) -> (L, C)."""
    if x.shape[0] != 1:
        raise ValueError(f"a fused linear takes one picture at a time, got a batch of {tuple(x.shape)}")
    return x[0]
