"""quantize_act: activations to few bits, and the low-rank branch's first half from the same x.

`svdq_linear.py` says in closed form what these numbers are for; `numerics` is explained there.
An `ActTarget` is what a linear wants its input to be, a `QuantizedAct` that input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from engine.reference.e2m1 import E2M1_MAX, decode_e2m1, encode_e2m1

Numerics = Literal["public", "tonfa"]
ActFormat = Literal["int4", "uint4", "e4m3", "nvfp4", "half"]
HALF_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # what h may be; fp32 on a CPU only
RANK_SLICE = 16  # ranks that share one scale
K_STEP = 64  # channels come in whole numbers of these, in every format
MAX_RANK = 1024
INT4_GROUP, NVFP4_GROUP = 64, 16
INT4_MAX, UINT4_MAX = 7.0, 15.0
E4M3_MAX = 448.0


@dataclass(frozen=True, eq=False)
class ActTarget:
    """What a quantized linear wants its input to be; made once, when a model is loaded.

    K channels, R rank (a multiple of 16, 0..1024), h the network's 16-bit type (fp32 on a CPU). Linears that share
    one input and one smooth_factor share one target, their factors side by side along R.
    On a card it is an `ArrangedTarget`, which adds the same numbers in the order that kernels read.
    Raises ValueError when shapes or dtypes do not fit together.
    """

    format: ActFormat
    smooth_factor: Tensor  # (K,) fp32, x + shift is divided by it
    proj_down: Tensor  # (K, R) h; sees x itself, neither shifted nor smoothed
    rank_scales: Tensor  # (R/16,) fp32; kernels leave the columns of `low` whose scale is 0 as they find them
    shift: float = 0.0  # added before smoothing; 11/64 behind a GELU for "uint4", else 0
    inverse_smooth: Tensor | None = None  # (K,) fp32: 1 / smooth_factor, of an ArrangedTarget

    def __post_init__(self) -> None:
        if self.format not in get_args(ActFormat):
            raise ValueError(f"ActTarget: no format {self.format!r}")
        if self.smooth_factor.ndim != 1 or self.in_features % K_STEP or not self.in_features:
            raise ValueError(
                f"ActTarget: smooth_factor must be (K,), K a multiple of {K_STEP}, "
                f"got {tuple(self.smooth_factor.shape)}"
            )
        k, rank = self.in_features, self.proj_down.shape[-1]
        if tuple(self.proj_down.shape) != (k, rank) or rank % RANK_SLICE or rank > MAX_RANK:
            raise ValueError(
                f"ActTarget: proj_down must be ({k}, R), R a multiple of {RANK_SLICE} up to {MAX_RANK}, "
                f"got {tuple(self.proj_down.shape)}"
            )
        if tuple(self.rank_scales.shape) != (rank // RANK_SLICE,):
            raise ValueError(
                f"ActTarget: rank_scales must be ({rank // RANK_SLICE},) for rank {rank}, "
                f"got {tuple(self.rank_scales.shape)}"
            )
        if self.smooth_factor.dtype != torch.float32 or self.rank_scales.dtype != torch.float32:
            raise ValueError(
                f"ActTarget: smooth_factor and rank_scales must be fp32, "
                f"got {self.smooth_factor.dtype} and {self.rank_scales.dtype}"
            )
        if self.proj_down.dtype not in HALF_TYPES:
            raise ValueError(f"ActTarget: proj_down must be one of {HALF_TYPES}, got {self.proj_down.dtype}")
        if self.shift != 0 and self.format != "uint4":
            raise ValueError(f'ActTarget: only "uint4" has a shift, got {self.shift} for "{self.format}"')

    @property
    def in_features(self) -> int:
        return self.smooth_factor.shape[0]

    @property
    def rank(self) -> int:
        return self.proj_down.shape[1]


@dataclass(frozen=True, eq=False)
class QuantizedAct:
    """The input of a quantized linear: M tokens of K channels in few bits, and their low-rank activations.

    format   codes                                         scales
    "int4"   (M, K/2) uint8, two's complement nibbles      (K/64, M) fp32
    "uint4"  (M, K/2) uint8, nibbles 0..15                 (K/64, M) fp32
    "e4m3"   (M, K) uint8, bytes of float8_e4m3fn          (M,) fp32
    "nvfp4"  (M, K/2) uint8, e2m1 nibbles                  (M, K/16) uint8, bytes of float8_e4m3fn
    "half"   (M, K) h: h(x / smooth_factor)                None

    Of two nibbles in a byte the low one is the even column. `low` is (M, R): x @ proj_down, without any strength,
    as fp32, or as int64 with 28 fractional bits where a GEMM's epilogue added it up; None for rank 0. Its rows may
    stand further apart than R where two linears share one input.
    Raises ValueError when shapes or dtypes do not fit together.
    """

    format: ActFormat
    codes: Tensor
    scales: Tensor | None
    low: Tensor | None

    def __post_init__(self) -> None:
        if self.format not in get_args(ActFormat):
            raise ValueError(f"QuantizedAct: no format {self.format!r}")
        if (
            self.codes.ndim != 2
            or self.in_features % K_STEP
            or (self.codes.dtype in HALF_TYPES) != (self.format == "half")
        ):
            raise ValueError(
                f'QuantizedAct: "{self.format}" has no codes {tuple(self.codes.shape)} {self.codes.dtype}'
            )
        expected = scales_layout(self.format, self.num_tokens, self.in_features)
        found = None if self.scales is None else (tuple(self.scales.shape), self.scales.dtype)
        if found != expected:
            raise ValueError(
                f'QuantizedAct: "{self.format}" codes {tuple(self.codes.shape)} take scales {expected}, got {found}'
            )
        if self.low is not None and (
            self.low.ndim != 2
            or self.low.shape[0] != self.num_tokens
            or self.low.shape[1] % RANK_SLICE
            or self.low.dtype not in (torch.float32, torch.int64)
        ):
            raise ValueError(
                f"QuantizedAct: low must be ({self.num_tokens}, R) fp32 or int64, R a multiple of {RANK_SLICE}, "
                f"got {tuple(self.low.shape)} {self.low.dtype}"
            )

    @property
    def num_tokens(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * (2 if self.format in NIBBLE_FORMATS else 1)


NIBBLE_FORMATS: tuple[ActFormat, ...] = ("int4", "uint4", "nvfp4")


def scales_layout(format: ActFormat, m: int, k: int) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and type of a format's scales for (m, k) codes; None for the one without."""
    match format:
        case "int4" | "uint4":
            return (k // INT4_GROUP, m), torch.float32
        case "nvfp4":
            return (m, k // NVFP4_GROUP), torch.uint8
        case "e4m3":
            return (m,), torch.float32
        case "half":
            return None


def quantize_act(x: Tensor, target: ActTarget) -> QuantizedAct:
    """x: (M, K) h. Returns what `target`'s linear reads: codes, scales, and x @ proj_down in fp32.

    Raises ValueError for an x of another width.
    """
    if x.ndim != 2 or x.shape[1] != target.in_features:
        raise ValueError(f"quantize_act: x must be (M, {target.in_features}), got {tuple(x.shape)}")
    codes: Tensor
    scales: Tensor | None
    match target.format:
        case "int4" | "uint4":
            shift = target.shift if target.format == "uint4" else None
            codes, scales = quantize_act_int4(x, target.smooth_factor, unsigned_shift=shift)
            codes, scales = pack_nibbles(codes), scales.T.contiguous()
        case "nvfp4":
            codes, scales = quantize_act_nvfp4(x, target.smooth_factor)
            codes, scales = pack_nibbles(codes), scales.view(torch.uint8)
        case "e4m3":
            codes, scales = quantize_act_e4m3(x, target.smooth_factor)
            codes = codes.view(torch.uint8)
        case "half":
            codes, scales = smooth(x, target.smooth_factor).to(x.dtype), None
    return QuantizedAct(target.format, codes, scales, project_down(x, target.proj_down) if target.rank else None)


def dequantize(act: QuantizedAct) -> Tensor:
    """(M, K) fp32: what the codes stand for, the shifted and smoothed input."""
    if act.format == "half":
        return act.codes.float()
    assert act.scales is not None
    if act.format == "e4m3":
        return act.codes.view(torch.float8_e4m3fn).float() * act.scales.unsqueeze(-1)
    codes = unpack_nibbles(act.codes)
    if act.format == "nvfp4":
        scales = act.scales.view(torch.float8_e4m3fn).float()
        return decode_e2m1(codes) * scales.repeat_interleave(NVFP4_GROUP, dim=1)
    values = codes.float() if act.format == "uint4" else ((codes ^ 8).float() - 8)
    return values * act.scales.T.repeat_interleave(INT4_GROUP, dim=1)


def saturated(act: QuantizedAct) -> Tensor:
    """How many e4m3 codes stand at an end of the grid, () int64: rows' largest, and what a fixed scale cut."""
    if act.format != "e4m3":
        raise ValueError(f'saturated: only "e4m3" saturates, got "{act.format}"')
    return ((act.codes & 0x7F) == 0x7E).sum()


def pack_nibbles(codes: Tensor) -> Tensor:
    """(M, K) int8 or uint8, the low four bits of each -> (M, K/2) uint8, even column in the low nibble."""
    nibbles = codes.view(torch.uint8) & 15
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(M, K/2) uint8 -> (M, K) uint8 0..15, even column from the low nibble."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


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
