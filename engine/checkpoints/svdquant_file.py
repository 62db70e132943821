"""Reading public SVDQuant files: from the tensors under one prefix to the weights of one linear.

`svdquant_tensors.py` goes the other way. Two spellings of the same tensors are in use, and both are read:

    V1 (FLUX, SDXL)             smooth         smooth_orig           lora_down  lora_up
    V2 (Qwen-Image, Z-Image)    smooth_factor  smooth_factor_orig    proj_down  proj_up

Precision and rank come from the tensors, never from file names or metadata: those lie. Files pad N and K
to 128, the rank to 16; the padding says nothing about the true sizes, so a reader names them.
Every function that reads raises ProblemError naming the file, the tensor, what was expected and what was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.checkpoints import svdquant_layout as layout
from engine.checkpoints.safetensors_file import SafetensorsFile, TensorInfo
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import GROUP_SIZE, HALF_TYPES, Precision, SVDQuantWeights

Kind = Literal["svdquant", "w4a16"]
Names = Literal["v1", "v2"]
MAX_RANK = 1024  # of the low-rank branch; public engines end there, too
SUFFIXES: dict[Names, dict[str, str]] = {
    "v1": {"smooth": "smooth", "smooth_orig": "smooth_orig", "down": "lora_down", "up": "lora_up"},
    "v2": {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig", "down": "proj_down", "up": "proj_up"},
}
AWQ_ROWS = {64: 16, 128: 8}  # group size -> the multiple to which rows of scales are padded


def quantized_layers(file: SafetensorsFile) -> dict[str, Kind]:
    """The prefix of every 4-bit linear and how it is stored, in the order of the names.

    The dtype of `qweight` tells: int8 is SVDQuant's, int32 and int16 are weight-only (AWQ's).
    """
    kinds: dict[torch.dtype, Kind] = {torch.int8: "svdquant", torch.int32: "w4a16", torch.int16: "w4a16"}
    layers: dict[str, Kind] = {}
    for name in sorted(file.tensors):
        prefix, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            dtype = file.tensors[name].dtype
            if dtype not in kinds:
                raise file.fault(name, f"expected int8, int32 or int16, found {_short(dtype)}")
            layers[prefix] = kinds[dtype]
    return layers


@dataclass(frozen=True, slots=True)
class SVDQuantHeader:
    """One SVDQuant linear as the file's header describes it; sizes are the padded ones."""

    precision: Precision
    out_features: int
    in_features: int
    rank: int
    names: dict[str, str]  # role -> full name of the tensor; roles without one are left out


def check_svdquant_linear(
    file: SafetensorsFile, prefix: str, *, out_features: int | None = None, in_features: int | None = None
) -> SVDQuantHeader:
    """Compare names, dtypes and shapes with one another and with the network's sizes; no weight is read."""
    names = _names_in(file, prefix)
    qweight = file.info(f"{prefix}.qweight")
    if qweight.dtype != torch.int8 or len(qweight.shape) != 2:
        raise file.fault(names["qweight"], f"expected int8 of 2 dimensions, found {_found(qweight)}")
    n, k = qweight.shape[0], 2 * qweight.shape[1]
    if n == 0 or k == 0 or n % layout.TILE or k % layout.TILE:
        raise file.fault(names["qweight"], f"expected multiples of 128 x 64, found {_found(qweight)}")
    for what, stored, wanted in (("rows", n, out_features), ("columns", k, in_features)):
        if wanted is not None and stored != layout.padded(wanted, layout.TILE):
            expected = layout.padded(wanted, layout.TILE)
            raise file.fault(names["qweight"], f"expected {expected} {what} of codes, found {stored}")
    precision = _precision(file, prefix)
    _expect(file, names["wscales"], (k // GROUP_SIZE[precision], n), (file.info(names["wscales"]).dtype,))
    _expect(file, names["smooth"], (k,))
    for role, shape in (("bias", (n,)), ("wcscales", (n,))):
        if role in names:
            _expect(file, names[role], shape)
    if "wtscale" in names and file.info(names["wtscale"]).shape != ():
        _expect(file, names["wtscale"], (1,))
    rank = 0
    if "down" in names or "up" in names:
        down = file.info(names.get("down", f"{prefix}.proj_down"))
        rank = down.shape[-1] if down.shape else 0
        if rank % layout.RANK_TILE or not 0 < rank <= MAX_RANK:
            raise file.fault(names["down"], f"expected a rank of 16, 32, ... {MAX_RANK}, found {_found(down)}")
        _expect(file, names["down"], (k, rank))
        _expect(file, names.get("up", f"{prefix}.proj_up"), (n, rank))
    return SVDQuantHeader(precision, n, k, rank, names)


def read_svdquant_linear(
    file: SafetensorsFile,
    prefix: str,
    *,
    out_features: int | None = None,
    in_features: int | None = None,
    input_shift: float = 0.0,
    device: torch.device | str = "cpu",
) -> SVDQuantWeights:
    """One SVDQuant linear, unpacked on `device`.

    out_features, in_features: the true sizes, to which padding is cut; None keeps the stored ones. input_shift is
    11/64 for what follows a GELU in int4 files; the family knows, files do not say.
    """
    header = check_svdquant_linear(file, prefix, out_features=out_features, in_features=in_features)
    names, precision = header.names, header.precision
    n, k = out_features or header.out_features, in_features or header.in_features
    if k % GROUP_SIZE[precision]:
        raise file.fault(names["qweight"], f"expected a multiple of {GROUP_SIZE[precision]} in channels, not {k}")
    group = GROUP_SIZE[precision]

    def read(role: str) -> Tensor:
        return _read_finite(file, names[role], device)

    def channels(role: str, size: int) -> Tensor | None:
        return layout.unpack_channels(read(role))[:size].contiguous() if role in names else None

    packed_scales = read("wscales")
    if precision == "int4":
        wscales = layout.unpack_wscales_int4(packed_scales)
    else:
        if bool((packed_scales.view(torch.uint8) > 0x80).any()):
            raise file.fault(names["wscales"], "expected scales from 0, found negative ones")
        wscales = layout.unpack_wscales_nvfp4(packed_scales)
    smooth_factor = layout.unpack_channels(read("smooth"))[:k].contiguous()
    if bool((smooth_factor == 0).any()):
        raise file.fault(names["smooth"], "expected numbers to divide by, found 0")
    if header.rank:
        proj_down = layout.unpack_proj_down(read("down"))[:k].contiguous()
        proj_up = layout.unpack_proj_up(read("up"))[:n].contiguous()
    else:
        proj_down, proj_up = smooth_factor.new_zeros(k, 0), smooth_factor.new_zeros(n, 0)
    bias, wcscales = channels("bias", n), channels("wcscales", n)
    wtscale = read("wtscale").float().reshape(()) if "wtscale" in names else None
    # Last, when nothing can be refused any more: a refusal must not have unpacked megabytes of codes.
    qweight = file.read(names["qweight"]).to(device)
    codes = layout.unpack_qweight(qweight, signed=precision == "int4")[:n, :k].contiguous()
    return SVDQuantWeights(
        precision=precision,
        codes=codes,
        wscales=wscales[:n, : k // group].contiguous(),
        smooth_factor=smooth_factor,
        bias=bias,
        proj_down=proj_down,
        proj_up=proj_up,
        wtscale=wtscale,
        wcscales=wcscales,
        input_shift=input_shift,
    )


@dataclass(frozen=True, slots=True)
class W4A16Header:
    """One weight-only linear as the file's header describes it."""

    out_features: int
    in_features: int
    group_size: int
    names: dict[str, str]  # role -> full name of the tensor; "bias" is left out where there is none


def check_w4a16(file: SafetensorsFile, prefix: str, *, splits: int = 1) -> W4A16Header:
    """Compare names, dtypes and shapes with one another; no weight is read."""
    t5 = f"{prefix}.scales" in file.tensors
    scales, zeros, group_size = ("scales", "scaled_zeros", 128) if t5 else ("wscales", "wzeros", 64)
    names = {"qweight": f"{prefix}.qweight", "scales": f"{prefix}.{scales}", "zeros": f"{prefix}.{zeros}"}
    qweight = file.info(names["qweight"])
    width = {torch.int32: 2, torch.int16: 1}.get(qweight.dtype)
    if width is None or len(qweight.shape) != 2:
        raise file.fault(names["qweight"], f"expected int32 or int16 of 2 dimensions, found {_found(qweight)}")
    rows, k = 4 * qweight.shape[0], width * qweight.shape[1]
    if rows == 0 or k == 0 or k % group_size or rows % splits:
        raise file.fault(
            names["qweight"],
            f"expected in channels in groups of {group_size} and {splits} equal splits, found {k} and {rows} rows",
        )
    groups = k // group_size
    most = layout.padded(groups, AWQ_ROWS[group_size])
    for role in ("scales", "zeros"):
        info = file.info(names[role])
        stored = info.shape[0] if info.shape else 0
        if not groups <= stored <= most:
            raise file.fault(names[role], f"expected {groups} to {most} rows of {rows}, found {_found(info)}")
        _expect(file, names[role], (stored, rows))
    if f"{prefix}.bias" in file.tensors:
        names["bias"] = f"{prefix}.bias"
        _expect(file, names["bias"], (rows,))
    return W4A16Header(rows, k, group_size, names)


def read_w4a16(
    file: SafetensorsFile, prefix: str, *, splits: int = 1, device: torch.device | str = "cpu"
) -> W4A16Weights:
    """One weight-only 4-bit linear: a modulation of `splits` parts (put back split by split), or a linear of T5.

    A modulation's bias keeps the +1 that files add to its scale splits.
    """
    header = check_w4a16(file, prefix, splits=splits)
    names, groups = header.names, header.in_features // header.group_size
    scales, zeros = (
        _read_finite(file, names[role], device)[:groups].T.contiguous() for role in ("scales", "zeros")
    )
    bias = _read_finite(file, names["bias"], device) if "bias" in names else None
    codes = layout.unpack_awq(file.read(names["qweight"]).to(device))
    if splits > 1:
        codes, scales, zeros = (layout.deinterleave_splits(t, splits) for t in (codes, scales, zeros))
        bias = None if bias is None else layout.deinterleave_splits(bias, splits)
    return W4A16Weights(codes, scales, zeros, bias, header.group_size)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names_in(file: SafetensorsFile, prefix: str) -> dict[str, str]:
    """Role -> name of the tensor, of those that are there and those that must be."""
    names = {role: f"{prefix}.{role}" for role in ("qweight", "wscales")}
    for role in ("bias", "wtscale", "wcscales"):
        if f"{prefix}.{role}" in file.tensors:
            names[role] = f"{prefix}.{role}"
    for role in ("smooth", "down", "up"):
        spellings = [f"{prefix}.{SUFFIXES[version][role]}" for version in ("v1", "v2")]
        there = [name for name in spellings if name in file.tensors]
        if len(there) == 2:
            raise file.fault(there[0], f"expected this or {there[1]}, found both")
        if there or role == "smooth":
            names[role] = (there or spellings)[0]
    return names


def _precision(file: SafetensorsFile, prefix: str) -> Precision:
    name = f"{prefix}.wscales"
    dtype = file.info(name).dtype
    if dtype in HALF_TYPES:
        return "int4"
    if dtype == torch.float8_e4m3fn:
        return "nvfp4"
    what = " (the file is MXFP4, which Tonfa cannot read)" if dtype in (torch.uint8, torch.float8_e8m0fnu) else ""
    raise file.fault(
        name, f"expected scales of 16 bit (int4) or float8_e4m3fn (nvfp4), found {_short(dtype)}{what}"
    )


def _found(info: TensorInfo) -> str:
    return f"{_short(info.dtype)} {list(info.shape)}"


def _expect(
    file: SafetensorsFile, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = HALF_TYPES
) -> None:
    info = file.info(name)
    if info.shape != shape or info.dtype not in dtypes:
        wanted = "/".join(_short(dtype) for dtype in dtypes)
        raise file.fault(name, f"expected {wanted} {list(shape)}, found {_found(info)}")


def _read_finite(file: SafetensorsFile, name: str, device: torch.device | str) -> Tensor:
    tensor = file.read(name).to(device)
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch knows no isfinite of 8-bit floats
    if not bool(torch.isfinite(values).all()):
        raise file.fault(name, "expected finite numbers, found NaN or infinity")
    return tensor
