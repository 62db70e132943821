"""What quantize_act and modulate_quantize share: checks, outputs, the launch of common/quantize_rows.cuh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from engine.jit import Variant, arch_of, launch
from engine.reference.quantize_act import (
    K_STEP,
    NIBBLE_FORMATS,
    ActFormat,
    ActTarget,
    QuantizedAct,
    scales_layout,
)

TILE = 8  # rows; a block owns one or several tiles
MOST_WARPS = 12
DEPTH = {1: 4}  # steps of 64 channels that are copied ahead, by tiles; else 1
STEP_BYTES = 1024  # of a warp, for each tile and step
TOLD_BYTES = 64  # of a warp, for each tile: what it tells the block of its rows
ROW_BYTES = 128  # of a block, for each tile: what all know of its rows
PLANS: dict[ActFormat, str] = {"int4": "w4a4", "uint4": "w4a4", "e4m3": "w4a8", "nvfp4": "nvfp4", "half": "w4a16"}
# Where a linear reads this format (design, section 4), and 90a, where every kernel is held to its reference.
ARCHITECTURES_OF: dict[str, tuple[str, ...]] = {
    "w4a4": ("75", "80", "86", "87", "89", "90a"),
    "w4a8": ("89", "90a", "120a", "121a"),
    "nvfp4": ("90a", "120a", "121a"),
    "w4a16": ("75", "80", "86", "87", "89", "90a", "100a", "103a", "110a", "120a", "121a"),
}


def tile_counts(arch: str) -> tuple[int, ...]:
    """How many tiles a block may own: many share the loads of factors, few keep every SM busy.

    Cards with slow memory for their arithmetic do without the largest block, which sm_75 has no shared memory for.
    """
    return (1, 4, 5) if arch in ("80", "90a", "100a", "103a", "110a") else (1, 4)


def variant(operation: str, format: ActFormat, dtype: torch.dtype, tiles: int) -> Variant:
    defines = [("H_BF16", int(dtype == torch.bfloat16)), ("TILES", tiles)]
    if operation == "quantize_act" and PLANS[format] == "w4a4":
        defines.append(("UNSIGNED", int(format == "uint4")))
    return Variant(f"{operation}.{PLANS[format]}", tuple(defines))


def variants(operation: str, arch: str) -> list[Variant]:
    """What `operation` can launch on this architecture."""
    dtypes = [torch.float16] if arch == "75" else [torch.bfloat16, torch.float16]
    formats = [format for format, plan in PLANS.items() if arch in ARCHITECTURES_OF[plan]]
    if operation == "modulate_quantize":  # no LayerNorm ends in numbers that are never negative
        formats = [format for format in formats if format != "uint4"]
    return [
        variant(operation, format, dtype, tiles)
        for format in formats
        for dtype in dtypes
        for tiles in tile_counts(arch)
    ]


@dataclass(frozen=True, eq=False)
class ArrangedTarget(ActTarget):
    """A target for kernels: with proj_down in the order that they read."""

    factors: Tensor | None = None  # (R/16, K/32, 2, 32, 8) h: A fragments of mma, 16 bytes a lane

    def __post_init__(self) -> None:
        ActTarget.__post_init__(self)
        device = self.smooth_factor.device
        for name in ("smooth_factor", "inverse_smooth", "factors"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                raise ValueError(f"ArrangedTarget: {name} is missing: arrange_target makes it")
            if tensor.device != device or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise ValueError(
                    f"ArrangedTarget: {name} must start at a multiple of 16 bytes, contiguous on {device}, got "
                    f"{tuple(tensor.shape)} with strides {tensor.stride()}, {tensor.data_ptr() % 16} bytes off, "
                    f"on {tensor.device}"
                )


@dataclass(frozen=True, slots=True)
class Launch:
    """How a shape is launched on one card. Warps, and with them the order of sums, depend on K alone."""

    variant: Variant
    blocks: int
    warps: int
    shared_bytes: int


@lru_cache(4096)
def launch_for(operation: str, format: ActFormat, dtype: torch.dtype, m: int, k: int, index: int) -> Launch:
    properties = torch.cuda.get_device_properties(index)
    arch = arch_of(properties.major, properties.minor)
    if dtype == torch.bfloat16 and arch == "75":
        raise ValueError(f"{operation}: a card of sm_75 has no bf16, x must be fp16")
    tiles = best_tiles(m, properties.multi_processor_count, tile_counts(arch))
    warps = min(MOST_WARPS, k // K_STEP)
    blocks = -(-m // (TILE * tiles))
    return Launch(variant(operation, format, dtype, tiles), blocks, warps, _bytes_of(tiles, warps))


def shared_bytes(variant: Variant) -> int:
    """The most that a launch of this variant asks for."""
    return _bytes_of(dict(variant.defines)["TILES"], MOST_WARPS)


def _bytes_of(tiles: int, warps: int) -> int:
    return tiles * (warps * (DEPTH.get(tiles, 1) * STEP_BYTES + TOLD_BYTES) + ROW_BYTES)


def best_tiles(m: int, num_sms: int, counts: tuple[int, ...]) -> int:
    """What takes least time when an SM runs one block after the other, and starting one costs as much as a tile."""

    def time(tiles: int) -> int:
        rounds = -(-m // (TILE * tiles * num_sms))
        return rounds * (tiles + 1)

    return min(counts, key=time)


def quantize_rows(operation: str, x: Tensor, modulation: tuple[Tensor, ...], target: ActTarget) -> QuantizedAct:
    """x: (M, K) h on a card; modulation: shift and scale, (K,) h each, or nothing; target: arranged."""
    m, k = _check(operation, x, modulation, target)
    assert isinstance(target, ArrangedTarget)
    codes, scales = empty_codes(target.format, m, k, x.dtype, x.device)
    low = torch.empty(m, target.rank, dtype=torch.float32, device=x.device) if target.rank else None
    if m:
        how = launch_for(operation, target.format, x.dtype, m, k, x.get_device())
        launch(
            how.variant, (how.blocks,), (32 * how.warps,),
            x, *modulation, target.inverse_smooth, target.factors, target.rank_scales,
            codes, scales, low, m, k, target.rank, float(target.shift),
            shared_bytes=how.shared_bytes,
        )  # fmt: skip
    return QuantizedAct(target.format, codes, scales, low)


def empty_codes(
    format: ActFormat, m: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Codes and scales for a kernel to fill, as `QuantizedAct` lays them out; dtype: h, of the format "half"."""
    width = k // 2 if format in NIBBLE_FORMATS else k
    codes = torch.empty(m, width, dtype=dtype if format == "half" else torch.uint8, device=device)
    layout = scales_layout(format, m, k)
    return codes, None if layout is None else torch.empty(layout[0], dtype=layout[1], device=device)


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
    if not isinstance(target, ArrangedTarget) or target.factors is None:
        raise ValueError(
            f"{operation}: the target of {k} channels and rank {target.rank} was not arranged: arrange_target"
        )
    for tensor in (x, *modulation, target.factors):
        if tensor.get_device() != x.get_device() or not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: all must be contiguous on {x.device}, got {tuple(tensor.shape)} "
                f"with strides {tensor.stride()} on {tensor.device}"
            )
        if tensor.data_ptr() % 16:
            raise ValueError(f"{operation}: {tuple(tensor.shape)} must start at a multiple of 16 bytes")
    return x.shape[0], k
