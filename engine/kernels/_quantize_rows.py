"""What quantize_act and modulate_quantize share: checks, outputs, the launch of common/quantize_rows.cuh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from engine.jit import Variant, arch_of, launch
from engine.reference.quantize_act import (
    INT4_GROUP,
    K_STEP,
    NVFP4_GROUP,
    ActFormat,
    ActTarget,
    QuantizedAct,
)

ROWS = 16  # of a block
MOST_WARPS = 8
STEP_BYTES = 2048  # of x, that a warp holds for each step of 64 channels
EXCHANGE_BYTES = 2048  # of a warp, for numbers that warps tell each other
DEPTH = 2  # steps on their way; sm_75 cannot copy ahead
RESERVED_BYTES = 1024  # of shared memory, in every block, by the driver
SHARED_KIB = {"75": 64, "80": 164, "86": 100, "87": 164, "89": 100, "120a": 100, "121a": 100}  # of an SM; else 228
PLANS: dict[ActFormat, str] = {"int4": "w4a4", "uint4": "w4a4", "e4m3": "w4a8", "nvfp4": "nvfp4", "half": "w4a16"}
# Where a linear reads this format (design, section 4), and 90a, where every kernel is held to its reference.
ARCHITECTURES_OF: dict[str, tuple[str, ...]] = {
    "w4a4": ("75", "80", "86", "87", "89", "90a"),
    "w4a8": ("89", "90a", "120a", "121a"),
    "nvfp4": ("90a", "120a", "121a"),
    "w4a16": ("75", "80", "86", "87", "89", "90a", "100a", "103a", "110a", "120a", "121a"),
}


def variant(operation: str, format: ActFormat, dtype: torch.dtype) -> Variant:
    defines = [("H_BF16", int(dtype == torch.bfloat16))]
    if operation == "quantize_act" and PLANS[format] == "w4a4":
        defines.append(("UNSIGNED", int(format == "uint4")))
    return Variant(f"{operation}.{PLANS[format]}", tuple(defines))


def variants(operation: str, arch: str) -> list[Variant]:
    """What `operation` can launch on this architecture."""
    dtypes = [torch.float16] if arch == "75" else [torch.bfloat16, torch.float16]
    formats = [format for format, plan in PLANS.items() if arch in ARCHITECTURES_OF[plan]]
    if operation == "modulate_quantize":  # no LayerNorm ends in numbers that are never negative
        formats = [format for format in formats if format != "uint4"]
    return [variant(operation, format, dtype) for format in formats for dtype in dtypes]


@dataclass(frozen=True, slots=True)
class Launch:
    """How one width is launched on one card. The number of rows has no say: a row's result never depends on it."""

    variant: Variant
    warps: int
    keep: int  # 1: all of x stays in shared memory between passes
    shared_bytes: int


@cache
def launch_for(operation: str, format: ActFormat, dtype: torch.dtype, k: int, index: int) -> Launch:
    arch = arch_of(*torch.cuda.get_device_capability(index))
    if dtype == torch.bfloat16 and arch == "75":
        raise ValueError(f"{operation}: a card of sm_75 has no bf16, x must be fp16")
    steps = k // K_STEP
    warps = min(MOST_WARPS, steps)
    ring, whole = 1 if arch == "75" else DEPTH, -(-steps // warps)
    bytes_of = [warps * (slots * STEP_BYTES + EXCHANGE_BYTES) for slots in (ring, whole)]
    several_passes = operation == "modulate_quantize" or format == "e4m3"
    keep = several_passes and 2 * (bytes_of[1] + RESERVED_BYTES) <= 1024 * SHARED_KIB.get(arch, 228)
    return Launch(variant(operation, format, dtype), warps, int(keep), bytes_of[keep])


def quantize_rows(operation: str, x: Tensor, modulation: tuple[Tensor, ...], target: ActTarget) -> QuantizedAct:
    """x: (M, K) h on a card; modulation: shift and scale, (K,) h each, or nothing; target: arranged."""
    m, k = _check(operation, x, modulation, target)
    how = launch_for(operation, target.format, x.dtype, k, x.get_device())
    codes, scales = _empty_codes(target.format, m, k, x)
    low = torch.empty(m, target.rank, dtype=torch.float32, device=x.device) if target.rank else None
    if m:
        launch(
            how.variant, (-(-m // ROWS),), (32 * how.warps,),
            x, *modulation, target.smooth_factor, target.inverse_smooth, target.packed_down, target.rank_scales,
            codes, scales, low, m, k, target.rank, how.keep, float(target.shift),
            shared_bytes=how.shared_bytes,
        )  # fmt: skip
    return QuantizedAct(target.format, codes, scales, low)


def _empty_codes(format: ActFormat, m: int, k: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    device = x.device
    match format:
        case "int4" | "uint4":
            scales = torch.empty(k // INT4_GROUP, m, dtype=torch.float32, device=device)
            return torch.empty(m, k // 2, dtype=torch.uint8, device=device), scales
        case "nvfp4":
            scales = torch.empty(m, k // NVFP4_GROUP, dtype=torch.uint8, device=device)
            return torch.empty(m, k // 2, dtype=torch.uint8, device=device), scales
        case "e4m3":
            scales = torch.empty(m, dtype=torch.float32, device=device)
            return torch.empty(m, k, dtype=torch.uint8, device=device), scales
        case "half":
            return torch.empty_like(x), None


def _check(operation: str, x: Tensor, modulation: tuple[Tensor, ...], target: ActTarget) -> tuple[int, int]:
    k = target.in_features
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"{operation}: x must be (M, {k}), got {tuple(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float16) or target.proj_down.dtype != x.dtype:
        raise ValueError(
            f"{operation}: x must be bf16 or fp16 like proj_down, got {x.dtype} and {target.proj_down.dtype}"
        )
    for tensor in modulation:
        if tensor.shape != (k,) or tensor.dtype != x.dtype:
            raise ValueError(
                f"{operation}: shift and scale must be ({k},) {x.dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    if target.inverse_smooth is None or target.packed_down is None:
        raise ValueError(
            f"{operation}: the target of {k} channels and rank {target.rank} was not arranged: arrange_target"
        )
    for tensor in (x, *modulation, target.smooth_factor, target.packed_down):
        if tensor.get_device() != x.get_device() or not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: all must be contiguous on {x.device}, got {tuple(tensor.shape)} "
                f"with strides {tensor.stride()} on {tensor.device}"
            )
        if tensor.data_ptr() % 16:
            raise ValueError(f"{operation}: {tuple(tensor.shape)} must start at a multiple of 16 bytes")
    return x.shape[0], k
