"""svdq_linear: a quantized linear with its low-rank branches and what follows it, in one kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from engine.jit import ARCHITECTURES, Strided, Variant, launch
from engine.kernels import _arrange, _arrange_nvfp4, _arrange_w4a8
from engine.kernels._quantize_rows import ArrangedTarget, empty_codes
from engine.reference import svdq_linear as reference
from engine.reference.quantize_act import RANK_SLICE, ActFormat, QuantizedAct
from engine.reference.svdq_linear import (
    Epilogue,
    GateResidual,
    Gelu,
    GeluQuantize,
    LinearPlan,
    Plain,
    Precision,
    QKNormRope,
    SVDQuantWeights,
    act_format,
    check_act,
)

BLOCK_ROWS = TILE_COLUMNS = HEAD_DIM = 128
THREADS = 128
MAX_RANK = 1024
# As the .cu files number them.
EPILOGUES: dict[type[Epilogue], int] = {Plain: 0, QKNormRope: 1, GateResidual: 2, GeluQuantize: 3, Gelu: 4}
FORMATS: dict[ActFormat, int] = {"int4": 0, "uint4": 1, "e4m3": 2, "nvfp4": 3, "half": 4}
WEIGHTS: dict[Precision, int] = {"int4": 0, "nvfp4": 1}
# Where each source has instructions of its own or runs right all the same.
E4M3_ARCHITECTURES = ("89", "90a", "120a", "121a")
ARCHITECTURES_OF = {
    "svdq_linear.w4a4": ("75", "80", "86", "87", "89", "90a"),
    "svdq_linear.w4a8": E4M3_ARCHITECTURES,
    "svdq_linear.w4a8_sm90": ("90a",),
    "svdq_linear.nvfp4": ("120a", "121a"),
    "svdq_linear.w4a16": ARCHITECTURES,
}


@dataclass(frozen=True, eq=False)
class ArrangedLinear:
    """A linear as its kernel reads it. Made by `arrange`, or by `with_branches` from another.

    N out, K in channels, R rank, h = dtype. On a CPU `weights` is all there is; on a card there are the others.
    A LoRA's bias and a live strength come by dataclasses.replace(linear, bias=..., rank_scales=...).
    Raises ValueError for a bias or strengths that are not what the kernel reads.
    """

    plan: LinearPlan
    precision: Precision
    format: ActFormat  # of its input
    dtype: torch.dtype
    in_features: int
    out_features: int
    rank: int
    rank_scales: Tensor  # (R/16,) fp32: strength of each 16 ranks, read when the kernel runs; 0 leaves them out
    bias: Tensor | None  # (N,) fp32, the one for this plan
    weights: SVDQuantWeights | None = None  # logical, for the reference
    source: str = ""
    defines: tuple[tuple[str, int], ...] = ()
    qweight: Tensor | None = None  # records of codes and group scales, uint8
    outer: Tensor | None = None  # (N to 128,) fp32, one more scale per out channel
    proj_up: Tensor | None = None  # (N/128, R/16, 8, 32, 8) h

    def __post_init__(self) -> None:
        device = (self.rank_scales if self.qweight is None else self.qweight).device
        for name, vector, size, aligned in (
            ("rank_scales", self.rank_scales, self.rank // RANK_SLICE, 4),
            ("bias", self.bias, self.out_features, 16),
        ):
            if vector is not None and (
                vector.shape != (size,)
                or vector.dtype != torch.float32
                or vector.device != device
                or vector.data_ptr() % aligned
            ):
                raise ValueError(
                    f"svdq_linear: N {self.out_features} and rank {self.rank} take {name} ({size},) fp32 on "
                    f"{device} from a multiple of {aligned} bytes, got {tuple(vector.shape)} {vector.dtype} on "
                    f"{vector.device}, {vector.data_ptr() % aligned} bytes off"
                )

    @property
    def num_bytes(self) -> int:
        """What the linear takes on its device."""
        tensors = (self.rank_scales, self.bias, self.qweight, self.outer, self.proj_up)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def source_of(plan: LinearPlan, precision: Precision, arch: str) -> str:
    """Which source runs a plan on an architecture ("89", "90a"). Raises ValueError where none can."""
    if plan == "w4a16":
        return "svdq_linear.w4a16"
    if plan == "w4a8":
        source = "svdq_linear.w4a8_sm90" if arch == "90a" else "svdq_linear.w4a8"
    else:
        source = "svdq_linear.w4a4" if precision == "int4" else "svdq_linear.nvfp4"
    if arch not in ARCHITECTURES_OF[source] or (plan, precision) == ("w4a8", "nvfp4"):
        raise ValueError(f"svdq_linear: {plan} of {precision} has no kernel for sm_{arch}")
    return source


def arrange(
    weights: SVDQuantWeights, plan: LinearPlan, dtype: torch.dtype, arch: str | None, source: str | None = None
) -> ArrangedLinear:
    """Bring weights into the order that a plan's kernel reads, on the device they are on.

    dtype: the network's h. arch: of the card, None for the CPU's reference. source: another kernel of the same
    plan, to compare. Raises ValueError where plan and weights do not fit each other, the card or the kernel.
    """
    n, k, rank = weights.out_features, weights.in_features, weights.rank
    if rank % RANK_SLICE or rank > MAX_RANK or n % 8 or k % 64:
        raise ValueError(
            f"svdq_linear: N must be a multiple of 8, K of 64, rank of {RANK_SLICE} up to {MAX_RANK}; "
            f"got N {n}, K {k}, rank {rank}"
        )
    bias = weights.bias if plan == "w4a4" else weights.unshifted_bias()
    linear = ArrangedLinear(
        plan=plan,
        precision=weights.precision,
        format=act_format(weights, plan),
        dtype=dtype,
        in_features=k,
        out_features=n,
        rank=rank,
        rank_scales=torch.ones(rank // RANK_SLICE, device=weights.codes.device),
        bias=None if bias is None else bias.float(),
    )
    if arch is None:
        return replace(linear, weights=weights)
    if dtype not in (torch.bfloat16, torch.float16) or (arch == "75" and dtype != torch.float16):
        raise ValueError(f"svdq_linear: sm_{arch} has no kernel for {dtype}")
    source = source or source_of(plan, weights.precision, arch)
    qweight, outer, defines = _pack(source, weights, dtype)
    return replace(
        linear,
        source=source,
        defines=defines,
        qweight=qweight,
        outer=outer,
        proj_up=_arrange.pack_proj_up(weights.proj_up, dtype) if rank else None,
    )


def with_branches(linear: ArrangedLinear, proj_up: Tensor, rank_scales: Tensor) -> ArrangedLinear:
    """The same linear with LoRAs behind its own ranks; the tensors of the base are shared, not copied, but proj_up.

    proj_up: (N, R') of the LoRAs alone, R' a multiple of 16; rank_scales: ((R + R') / 16,) fp32 for all.
    """
    extra, rank = proj_up.shape[-1], linear.rank + proj_up.shape[-1]
    if proj_up.ndim != 2 or proj_up.shape[0] != linear.out_features or extra % RANK_SLICE or rank > MAX_RANK:
        raise ValueError(
            f"svdq_linear: branches of {linear.out_features} rows and rank {linear.rank} must be (N, R), "
            f"R a multiple of {RANK_SLICE}, {MAX_RANK} in all; got {tuple(proj_up.shape)}"
        )
    linear = replace(linear, rank=rank, rank_scales=rank_scales)
    if linear.weights is not None:
        old = linear.weights
        down = torch.cat([old.proj_down, old.proj_down.new_zeros(linear.in_features, extra)], dim=1)  # not read
        up = torch.cat([old.proj_up, proj_up.to(old.proj_up.dtype)], dim=1)
        return replace(linear, weights=replace(old, proj_down=down, proj_up=up))
    if not extra:
        return linear
    packed = _arrange.pack_proj_up(proj_up, linear.dtype)
    return replace(linear, proj_up=packed if linear.proj_up is None else torch.cat([linear.proj_up, packed], dim=1))


def svdq_linear(act: QuantizedAct, linear: ArrangedLinear, epilogue: Epilogue) -> Tensor | QuantizedAct:
    """act: (M, K) in linear.format. Returns (M, N) h; after GeluQuantize the next linear's `QuantizedAct`.

    The low-rank activations' rows may stand apart, so may those of `out` and `residual`; both may be one tensor.
    CPU tensors go to the reference, so every model also runs, slowly, without a GPU.
    Raises ValueError, before anything is launched, for what does not fit together.
    """
    check_act(act, linear.in_features, linear.rank, linear.format)
    if linear.weights is not None:
        return reference.svdq_linear_quantized(
            act,
            linear.weights,
            linear.plan,
            epilogue,
            dtype=linear.dtype,
            rank_scales=linear.rank_scales,
            bias=linear.bias,
        )
    m, n, low = act.num_tokens, linear.out_features, act.low
    low_fixed, low_stride = _check_read(act, linear)
    result, out_format, arguments = _finish(act, linear, epilogue)
    variant = _variant(
        linear.source, linear.defines, linear.dtype, EPILOGUES[type(epilogue)], low_fixed, out_format
    )
    if not m:
        return result
    grid, threads = _geometry(linear, m)
    launch(
        variant,
        grid,
        (threads,),
        act.codes,
        act.scales,
        linear.qweight,
        linear.outer,
        linear.in_features,
        linear.bias,
        None if low is None else Strided(low),
        linear.proj_up,
        linear.rank_scales,
        low_stride,
        linear.rank,
        m,
        n,
        *arguments,
        shared_bytes=shared_bytes(variant),
    )
    return result


def variants(arch: str) -> list[Variant]:
    """What a model can launch on an architecture: every plan it has, every type of scales, every end behind it."""
    dtypes = [torch.float16] if arch == "75" else [torch.bfloat16, torch.float16]
    found: list[Variant] = []
    for source in (source for source, architectures in ARCHITECTURES_OF.items() if arch in architectures):
        for defines, dtype in product(_DEFINES[source], dtypes):
            # (epilogue, low as fixed point, format): qkv, out and fc2 by either road, fc1
            ends = [(0, 0, -1), (2, 0, -1), (2, 1, -1)]
            if ("ACT_UNSIGNED", 1) not in defines:
                ends += [(1, 0, -1), (4, 0, -1), *((3, 0, FORMATS[format]) for format in _NEXT_FORMATS[source])]
            found += [_variant(source, defines, dtype, *end) for end in ends]
    return found


_SCALE_TYPES: list[tuple[tuple[str, int], ...]] = [
    (("SCALE_TYPE", number),) for number in _arrange_w4a8.SCALE_TYPES.values()
]
_DEFINES: dict[str, list[tuple[tuple[str, int], ...]]] = {
    "svdq_linear.w4a4": [(("ACT_UNSIGNED", 0),), (("ACT_UNSIGNED", 1),)],
    "svdq_linear.w4a8": _SCALE_TYPES,
    "svdq_linear.w4a8_sm90": _SCALE_TYPES,
    "svdq_linear.nvfp4": [()],
    "svdq_linear.w4a16": [(("WEIGHTS", 0),), (("WEIGHTS", 1),)],
}
_NEXT_FORMATS: dict[str, list[ActFormat]] = {
    "svdq_linear.w4a4": ["uint4", "int4"],  # of an fc2 with a shift, and without
    "svdq_linear.w4a8": ["e4m3"],
    "svdq_linear.w4a8_sm90": ["e4m3"],
    "svdq_linear.nvfp4": ["nvfp4"],
    "svdq_linear.w4a16": ["half"],
}


@cache
def _variant(
    source: str, defines: tuple[tuple[str, int], ...], dtype: torch.dtype, epilogue: int, fixed: int, format: int
) -> Variant:
    """format: of the codes that GELU_QUANTIZE writes, -1 for the other ends."""
    choices = [("H_BF16", int(dtype == torch.bfloat16)), ("EPILOGUE", epilogue), ("LOW_FIXED", fixed)]
    if format >= 0:
        choices.append(("OUT_FORMAT", format))
    return Variant(source, (*choices, *defines))


def _pack(
    source: str, weights: SVDQuantWeights, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, tuple[tuple[str, int], ...]]:
    """qweight, outer, and the defines that these weights ask for."""
    match source:
        case "svdq_linear.w4a4":
            if weights.precision != "int4":
                raise ValueError(f"svdq_linear.w4a4 takes int4 weights, got {weights.precision}")
            return *_arrange.pack_w4a4(weights, dtype), (("ACT_UNSIGNED", int(weights.input_shift != 0)),)
        case "svdq_linear.w4a16":
            return *_arrange.pack_w4a16(weights, dtype), (("WEIGHTS", WEIGHTS[weights.precision]),)
        case "svdq_linear.nvfp4":
            packed = _arrange_nvfp4.pack_nvfp4(weights)
            return packed["qweight"], packed["outer"], ()
        case "svdq_linear.w4a8" | "svdq_linear.w4a8_sm90":
            pack = _arrange_w4a8.pack_w4a8 if source == "svdq_linear.w4a8" else _arrange_w4a8.pack_w4a8_sm90
            packed = pack(weights)
            return packed["qweight"], packed["outer"], (("SCALE_TYPE", _arrange_w4a8.scale_type(weights)),)
    raise ValueError(f"svdq_linear: there is no source {source!r}")


@cache
def shared_bytes(variant: Variant) -> int:
    """Dynamic shared memory of a block."""
    match variant.source:
        case "svdq_linear.w4a8_sm90":
            return _arrange_w4a8.sm90_shared_bytes(dict(variant.defines)["SCALE_TYPE"])
        case "svdq_linear.w4a8":
            return _arrange_w4a8.w4a8_shared_bytes(dict(variant.defines)["SCALE_TYPE"])
        case "svdq_linear.nvfp4":
            return _arrange_nvfp4.nvfp4_shared_bytes()
    return 0


def _geometry(linear: ArrangedLinear, m: int) -> tuple[tuple[int, ...], int]:
    """Grid, and threads of a block."""
    rows, columns = -(-m // BLOCK_ROWS), -(-linear.out_features // TILE_COLUMNS)
    if linear.source == "svdq_linear.w4a8_sm90":
        return (min(rows * columns, _multiprocessors(linear.rank_scales.get_device())),), 384
    return (rows, columns), THREADS


@cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _check_read(act: QuantizedAct, linear: ArrangedLinear) -> tuple[int, int]:
    """Whether low is in fixed point, 0 or 1, and how far its rows stand apart.

    Raises ValueError for what the kernel would take for other numbers, or read where no number begins.
    """
    codes, low = act.codes, act.low
    wanted = linear.dtype if linear.format == "half" else torch.uint8
    if codes.dtype != wanted or codes.data_ptr() % 16:
        raise ValueError(
            f"svdq_linear: codes must be {wanted} from a multiple of 16 bytes, "
            f"got {tuple(codes.shape)} {codes.dtype} from byte {codes.data_ptr() % 16}"
        )
    if low is None:
        return 0, 0
    rows, columns = low.stride()
    if columns != 1 or rows % 4 or low.data_ptr() % 16 or low.get_device() != linear.rank_scales.get_device():
        raise ValueError(
            f"svdq_linear: low must be on {linear.rank_scales.device}, its columns neighbours, its rows from "
            f"multiples of 16 bytes; got {tuple(low.shape)} on {low.device} with strides {rows, columns} from "
            f"byte {low.data_ptr() % 16}"
        )
    return int(low.dtype == torch.int64), rows


def _finish(
    act: QuantizedAct, linear: ArrangedLinear, epilogue: Epilogue
) -> tuple[Tensor | QuantizedAct, int, tuple[Tensor | Strided | int | float | None, ...]]:
    """What is returned, the format it is quantized to (-1: none), and the epilogue's own kernel arguments."""
    m, n = act.num_tokens, linear.out_features
    if isinstance(epilogue, GeluQuantize):
        made, arguments = _finish_quantized(act, linear, epilogue)
        return made, FORMATS[epilogue.target.format], arguments
    if epilogue.out is None:
        out = torch.empty(m, n, dtype=linear.dtype, device=act.codes.device)
    else:
        out = epilogue.out
        _check_rows("out", out, m, linear)
    place = (Strided(out), out.stride(0))
    if isinstance(epilogue, QKNormRope):
        if n % (3 * HEAD_DIM):
            raise ValueError(f"svdq_linear: q, k and v of heads of {HEAD_DIM} have no place in {n} rows")
        for name, tensor, shape in (
            ("norm_q", epilogue.norm_q, (HEAD_DIM,)),
            ("norm_k", epilogue.norm_k, (HEAD_DIM,)),
            ("cos", epilogue.cos, (m, HEAD_DIM // 2)),
            ("sin", epilogue.sin, (m, HEAD_DIM // 2)),
        ):
            if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.data_ptr() % 16:
                raise ValueError(
                    f"svdq_linear: {name} must be {shape} fp32, got {tuple(tensor.shape)} {tensor.dtype}, "
                    f"{tensor.data_ptr() % 16} bytes off a multiple of 16"
                )
        return out, -1, (*place, epilogue.norm_q, epilogue.norm_k, epilogue.cos, epilogue.sin)
    if isinstance(epilogue, GateResidual):
        gate, residual = epilogue.gate, epilogue.residual
        _check_rows("residual", residual, m, linear)
        if gate.shape != (n,) or gate.dtype not in (torch.float32, linear.dtype) or gate.data_ptr() % 16:
            raise ValueError(
                f"svdq_linear: gate must be ({n},) fp32 or {linear.dtype}, got {tuple(gate.shape)} {gate.dtype}, "
                f"{gate.data_ptr() % 16} bytes off a multiple of 16"
            )
        is_float = int(gate.dtype == torch.float32)
        return out, -1, (*place, Strided(residual), gate, residual.stride(0), is_float)
    return out, -1, place


def _check_rows(name: str, rows: Tensor, m: int, linear: ArrangedLinear) -> None:
    """A matrix that the kernel reads or writes 16 bytes at a time."""
    shape, strides = (m, linear.out_features), rows.stride()
    if (
        rows.shape != shape
        or rows.dtype != linear.dtype
        or strides[1] != 1
        or strides[0] % 8
        or rows.data_ptr() % 16
        or rows.get_device() != linear.rank_scales.get_device()
    ):
        raise ValueError(
            f"svdq_linear: {name} must be {shape} {linear.dtype} on {linear.rank_scales.device}, rows contiguous "
            f"from multiples of 16 bytes; got {tuple(rows.shape)} {rows.dtype} on {rows.device} with strides "
            f"{strides}"
        )


def _finish_quantized(
    act: QuantizedAct, linear: ArrangedLinear, epilogue: GeluQuantize
) -> tuple[QuantizedAct, tuple[Tensor | Strided | int | float | None, ...]]:
    target, m, n, device = epilogue.target, act.num_tokens, linear.out_features, act.codes.device
    if target.in_features != n or not isinstance(target, ArrangedTarget):
        raise ValueError(
            f"svdq_linear: the next linear's target must be an arranged one of width {n}, "
            f"got width {target.in_features}{'' if isinstance(target, ArrangedTarget) else ', not arranged'}"
        )
    if target.proj_down.dtype != linear.dtype:
        raise ValueError(f"svdq_linear: the next proj_down must be {linear.dtype}, got {target.proj_down.dtype}")
    codes, scales = empty_codes(target.format, m, n, linear.dtype, device)
    low = torch.zeros(m, target.rank, dtype=torch.int64, device=device) if target.rank else None
    row_scales = act.scales if act.format == "e4m3" and target.format == "e4m3" else None
    arguments = (
        codes,
        scales,
        target.smooth_factor,
        target.inverse_smooth,
        target.factors,
        target.rank_scales,
        low,
        row_scales,
        target.rank,
        float(target.shift),
        float(epilogue.row_slope),
        float(epilogue.row_offset),
    )
    return QuantizedAct(target.format, codes, scales, low), arguments
