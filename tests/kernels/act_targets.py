"""Targets and inputs for kernels that quantize activations; how far a result is from the reference's."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.kernels.quantize_act import arrange_target
from engine.reference.quantize_act import ActFormat, ActTarget, QuantizedAct, unpack_nibbles
from tests.tolerances import largest_error

GELU_SHIFT = 11 / 64


def random_target(
    format: ActFormat, k: int, rank: int, dtype: torch.dtype, device: str, *, silent: tuple[int, ...] = ()
) -> ActTarget:
    """Smoothing over three octaves, factors of a layer's size; the 16 ranks named in `silent` are at 0."""
    scales = torch.rand(rank // 16) + 0.5
    scales[list(silent)] = 0
    target = ActTarget(
        format=format,
        smooth_factor=torch.exp2(3 * torch.rand(k)).to(device),
        proj_down=(torch.randn(k, rank) / k**0.5).to(device, dtype),
        rank_scales=scales.to(device),
        shift=GELU_SHIFT if format == "uint4" else 0.0,
    )
    return arrange_target(target)


def activations(m: int, k: int, dtype: torch.dtype, device: str, *, positive: bool = False) -> Tensor:
    """Normal numbers with a few channels that are 20 times as large; `positive`: as a GELU leaves them."""
    x = torch.randn(m, k, device=device)
    x[:, ::37] *= 20
    return (torch.nn.functional.gelu(x, approximate="tanh") if positive else x).to(dtype)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written shows: fresh memory is full of NaN, codes of 0x7f."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)

    monkeypatch.setattr(torch, "empty", lambda *args, **named: poison(empty(*args, **named)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **named: poison(empty_like(*args, **named)))


class Difference(NamedTuple):
    """Between two results of one call."""

    steps: int  # the largest, between two codes
    fraction: float  # of the codes that differ
    scales: float  # the largest, relative to each scale
    low: float  # the largest, relative to the largest low-rank activation


def difference(found: QuantizedAct, expected: QuantizedAct) -> Difference:
    assert found.format == expected.format
    apart = (_ordinals(found) - _ordinals(expected)).abs()
    scales, low = 0.0, 0.0
    if found.scales is not None and expected.scales is not None:
        a, b = (_scale_values(scales) for scales in (found.scales, expected.scales))
        scales = float(((a - b).abs() / b.abs().clamp(min=1e-30)).nan_to_num(nan=9.0).max())
    if found.low is not None and expected.low is not None:
        low = largest_error(found.low.nan_to_num(nan=9e9), expected.low)
    return Difference(int(apart.max()), float((apart > 0).double().mean()), scales, low)


def fingerprint(act: QuantizedAct) -> str:
    digest = hashlib.sha256()
    for tensor in (act.codes, act.scales, act.low):
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _scale_values(scales: Tensor) -> Tensor:
    return (scales.view(torch.float8_e4m3fn) if scales.dtype == torch.uint8 else scales).double()


def _ordinals(act: QuantizedAct) -> Tensor:
    """(M, K) int32: neighbouring values of the format have neighbouring numbers; 0 and -0 the same."""
    match act.format:
        case "int4":
            return (unpack_nibbles(act.codes) ^ 8).int() - 8
        case "uint4":
            return unpack_nibbles(act.codes).int()
        case "nvfp4":
            codes, sign = unpack_nibbles(act.codes).int(), 8
        case "e4m3":
            codes, sign = act.codes.int(), 0x80
        case "half":
            codes, sign = act.codes.view(torch.int16).int() & 0xFFFF, 0x8000
    magnitude = codes & (sign - 1)
    return torch.where(codes >= sign, -magnitude, magnitude)
