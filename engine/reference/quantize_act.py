"""quantize_act: activations to few bits, and the low-rank branch's first half from the same x.

`svdq_linear.py` says in closed form what these numbers are for; `numerics` is explained there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.reference.e2m1 import E2M1_MAX, encode_e2m1

Numerics = Literal["public", "tonfa"]
INT4_GROUP, NVFP4_GROUP = 64, 16
INT4_MAX, UINT4_MAX = 7.0, 15.0
E4M3_MAX = 448.0


def smooth(x: Tensor, smooth_factor: Tensor, *, shift: float = 0.0, numerics: Numerics = "tonfa") -> Tensor:
    """(x + shift) / smooth_factor, (M, K) fp32. "public" rounds to x's type after each of the two operations."""
    if x.ndim != 2 or smooth_factor.shape != x.shape[1:]:
        raise ValueError(
            f"smooth: x must be (M, K), smooth_factor (K,), got {tuple(x.shape)}, {smooth_factor.shape}"
        )
    if numerics == "tonfa":
        return (x.float() + shift) / smooth_factor.float()
    shifted = (x.float() + shift).to(x.dtype)
    return (shifted.float() / smooth_factor.float()).to(x.dtype).float()


def quantize_act_int4(
    x: Tensor, smooth_factor: Tensor, *, unsigned_shift: float | None = None, numerics: Numerics = "tonfa"
) -> tuple[Tensor, Tensor]:
    """Quantize to 4-bit integers, one scale per row and group of 64 channels.

    x: (M, K) h, K a multiple of 64; smooth_factor: (K,). With `unsigned_shift` (11/64 behind a GELU, which is then
    never negative) x + unsigned_shift is quantized to 0..15.
    Returns codes (M, K), int8 -7..7 or uint8 0..15, and ascales (M, K/64): fp32, or h for "public".
    A group of zeros has scale 0.
    """
    unsigned = unsigned_shift is not None
    v = smooth(x, smooth_factor, shift=unsigned_shift or 0.0, numerics=numerics)
    groups = _groups(v, INT4_GROUP)
    low, high = (0.0, UINT4_MAX) if unsigned else (-INT4_MAX - 1, INT4_MAX)
    scales = groups.abs().amax(dim=-1, keepdim=True) * (1 / high)
    codes = (groups * _reciprocal(scales)).round().clamp(low, high)
    codes = codes.view_as(v).to(torch.uint8 if unsigned else torch.int8)
    scales = scales.squeeze(-1)
    return codes, scales.to(x.dtype) if numerics == "public" else scales


def quantize_act_nvfp4(x: Tensor, smooth_factor: Tensor, *, numerics: Numerics = "tonfa") -> tuple[Tensor, Tensor]:
    """Quantize to e2m1, one e4m3 scale per row and group of 16 channels.

    x: (M, K) h, K a multiple of 16; smooth_factor: (K,).
    Returns codes (M, K) uint8 0..15 and ascales (M, K/16) float8_e4m3fn.
    """
    v = smooth(x, smooth_factor, numerics=numerics)
    groups = _groups(v, NVFP4_GROUP)
    exact = (groups.abs().amax(dim=-1, keepdim=True) * (1 / E2M1_MAX)).clamp(max=E4M3_MAX)
    stored = exact.to(torch.float8_e4m3fn)
    # What is multiplied later is the stored scale. "tonfa" takes it here too, so that every code is the nearest:
    # 9.53 % rms error on normal numbers instead of 9.79 %.
    inverse = _reciprocal(exact if numerics == "public" else stored.float())
    return encode_e2m1(groups * inverse).view(v.shape), stored.squeeze(-1)


def quantize_act_e4m3(x: Tensor, smooth_factor: Tensor, *, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize to e4m3, one scale per row.

    x: (M, K) h; smooth_factor: (K,). `scale`, () or (M,) fp32, fixes the scales beforehand, as a GELU fused into
    the GEMM before must; what does not fit then saturates at 448 scales.
    Returns codes (M, K) float8_e4m3fn and ascales (M,) fp32.
    """
    v = smooth(x, smooth_factor)
    scales = v.abs().amax(dim=-1) * (1 / E4M3_MAX) if scale is None else scale.float().expand(v.shape[0])
    codes = (v * _reciprocal(scales).unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)  # torch's cast overflows to NaN
    return codes.to(torch.float8_e4m3fn), scales


def project_down(x: Tensor, proj_down: Tensor) -> Tensor:
    """x (M, K) h, neither smoothed nor shifted, @ proj_down (K, R): (M, R) fp32, the low-rank activations."""
    return x.float() @ proj_down.float()


def _groups(v: Tensor, size: int) -> Tensor:
    m, k = v.shape
    if k % size:
        raise ValueError(f"quantize_act: K must be a multiple of {size}, got x {m, k}")
    return v.view(m, k // size, size)


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / scales, and 0 for what is too small to divide by: such a group has codes 0."""
    return torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, 1 / scales)
