"""Watch what a network's fused linears launch, and hold each call to the reference with the very same inputs.

Used by flux_step.py and mini_on_a_card.py: what one kernel does wrong does not count against the next.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.kernels.svdq_linear import ArrangedLinear
from engine.layers import fused_linear, modulation
from engine.layers.fused_linear import FusedLinear
from engine.reference import modulate_quantize as reference_modulate
from engine.reference import quantize_act as reference_quantize
from engine.reference.quantize_act import ActTarget, QuantizedAct
from engine.reference.svdq_linear import GateResidual, SVDQuantWeights, svdq_linear_quantized
from tests.kernels.act_targets import difference
from tests.tolerances import largest_error

T = TypeVar("T")


@dataclass(slots=True)
class Agreement:
    """Of one kind of call with the reference, over all calls."""

    calls: int = 0
    codes: float = 0.0  # the largest fraction of codes that differ in a call
    steps: int = 0  # the largest difference of a code
    low: float = 0.0  # of low-rank activations, relative to the largest
    values: float = 0.0  # of 16-bit results, relative to the largest
    worst: str = ""  # the layer with the most differing codes


@dataclass(slots=True)
class Recorder:
    """Holds every call of the layers in `weights` to the reference, on `device`; keeps the worst of each kind."""

    weights: Mapping[str, SVDQuantWeights]  # by the linear's name
    device: torch.device
    found: dict[str, Agreement] = field(default_factory=lambda: defaultdict(Agreement))

    @contextlib.contextmanager
    def watching(self, network: torch.nn.Module) -> Iterator[None]:
        """Inside, calls of `network` are checked as they happen. Slow, and not for graphs."""
        linears = {
            id(module.layout.linear): name
            for name, module in network.named_modules()
            if isinstance(module, FusedLinear) and name in self.weights
        }
        targets = {
            id(module.target): name
            for name, module in network.named_modules()
            if isinstance(module, FusedLinear) and name in self.weights
        }
        quantize, multiply, modulate = (
            fused_linear.quantize_act, fused_linear.svdq_linear, modulation.modulate_quantize,
        )  # fmt: skip

        def quantize_act(x: Tensor, target: ActTarget) -> QuantizedAct:
            made = quantize(x, target)
            if (name := targets.get(id(target))) is not None:
                self._quantized(
                    "quantize_act", name, made, lambda: reference_quantize.quantize_act(*self._here(x, target))
                )
            return made

        def modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, target: ActTarget) -> QuantizedAct:
            made = modulate(x, shift, scale, target)
            if (name := targets.get(id(target))) is not None:
                given = self._here(x, shift, scale, target)
                self._quantized(
                    "modulate_quantize", name, made, lambda: reference_modulate.modulate_quantize(*given)
                )
            return made

        def svdq_linear(act: QuantizedAct, linear: ArrangedLinear, epilogue: Any) -> Tensor | QuantizedAct:
            name = linears.get(id(linear))
            if name is None:
                return multiply(act, linear, epilogue)
            given = self._here(act, replace(epilogue, out=None) if hasattr(epilogue, "out") else epilogue)
            if isinstance(epilogue, GateResidual):  # may be written over
                given = (given[0], replace(given[1], residual=epilogue.residual.to(self.device, copy=True)))
            made = multiply(act, linear, epilogue)
            kind = f"svdq_linear, {type(epilogue).__name__}"
            expected = self._linear(name, linear, *given)
            if isinstance(made, QuantizedAct):
                self._quantized(kind, name, made, lambda: expected)
            else:
                agreement = self.found[kind]
                agreement.calls += 1
                agreement.values = max(agreement.values, largest_error(made.to(self.device), expected))
            return made

        fused_linear.quantize_act, fused_linear.svdq_linear = quantize_act, svdq_linear
        modulation.modulate_quantize = modulate_quantize
        try:
            yield
        finally:
            fused_linear.quantize_act, fused_linear.svdq_linear = quantize, multiply
            modulation.modulate_quantize = modulate

    def _linear(self, name: str, linear: ArrangedLinear, act: QuantizedAct, epilogue: Any) -> Any:
        bias = None if linear.bias is None else linear.bias.to(self.device)
        scales = linear.rank_scales.to(self.device)
        weights = moved(self.weights[name], self.device)
        return svdq_linear_quantized(
            act, weights, linear.plan, epilogue, dtype=linear.dtype, rank_scales=scales, bias=bias
        )

    def _quantized(self, kind: str, name: str, made: QuantizedAct, expected: Callable[[], QuantizedAct]) -> None:
        made, truth, agreement = moved(made, self.device), expected(), self.found[kind]
        found = difference(made, truth)
        agreement.calls += 1
        agreement.low = max(agreement.low, found.low)
        if made.format == "half":  # no codes: numbers of h
            agreement.values = max(agreement.values, largest_error(made.codes, truth.codes))
            return
        if found.fraction >= agreement.codes:
            agreement.codes, agreement.worst = found.fraction, name
        agreement.steps = max(agreement.steps, found.steps)

    def _here(self, *values: Any) -> tuple[Any, ...]:
        return tuple(moved(value, self.device) for value in values)

    def table(self) -> str:
        lines = [
            "| kernel | calls | codes that differ, most | by at most | low-rank | 16-bit results | worst layer |",
            "|---|---|---|---|---|---|---|",
        ]
        for kind, one in sorted(self.found.items()):
            codes, steps = (f"{one.codes:.3%}", str(one.steps)) if one.worst else ("", "")
            low, values = (f"{x:.1e}" if x else "" for x in (one.low, one.values))
            lines.append(f"| {kind} | {one.calls} | {codes} | {steps} | {low} | {values} | {one.worst} |")
        return "\n".join(lines)


def moved(value: T, device: torch.device) -> T:
    """A tensor, or a dataclass of tensors, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        there = {one.name: moved(getattr(value, one.name), device) for one in fields(value)}
        return type(value)(**there)
    return value
