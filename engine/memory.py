"""How many bytes each stage of a picture takes, told before anything is loaded; and whether that fits.

Stages own memory: encode, free the encoders, denoise, decode. Where everything fits together, everything stays, so
that the second picture starts at once. Pure arithmetic: sizes come from file headers, see pipelines/foresight.py.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass

from engine.events import Fits

# Resident memory of Python with torch, transformers and diffusers imported, and what a load and the first picture
# leave with the allocator. Measured on Linux with torch 2.13 for the CPU: docs/measured/engine-cpu.md.
PROCESS_BYTES = 460 * 2**20
# Tensors of (B, L, C) alive at the widest point of a block: qkv 3, MLP 4 + 4, attention's copies 5, streams 4.
LIVE_HIDDEN = 20
# Maps of the decoder's widest level alive at once: input, two convolutions, GroupNorm's copy, im2col's share.
LIVE_MAPS = 6
NO_MEMORY_WORDS = "can't allocate memory"  # of the RuntimeError that torch raises on the CPU
COMFORTABLE = 0.85  # of what is free; above it a picture is tight


def give_back_freed() -> None:
    """Return freed memory to the system: glibc keeps blocks of up to 32 MB, most of a network, for itself."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model's parts once loaded, and the widths that decide what a picture adds."""

    encoders: int
    network: int
    decoder: int
    loras: int
    hidden_size: int
    text_tokens: int
    decoder_channels: int  # of its widest full-size map
    item_bytes: int  # of the network's dtype


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: what its parts and its work take, in bytes."""

    name: str
    parts: int
    work: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The stages, whether all parts stay loaded, and the highest point in bytes."""

    stages: tuple[Stage, ...]
    keep_all: bool
    peak_bytes: int
    fits: Fits


def plan(
    sizes: ModelSizes, width: int, height: int, predictions: int, available: int, process_bytes: int = 0
) -> MemoryPlan:
    """Lay out one picture of width x height pixels; `predictions` is 2 under cfg.

    available: bytes this process may have in the memory that decides, what it has already included.
    process_bytes: taken before any part is loaded (PROCESS_BYTES on the host).
    """
    tokens = (width // 16) * (height // 16) + sizes.text_tokens
    hidden = tokens * sizes.hidden_size * sizes.item_bytes
    stages = (
        Stage("encode", sizes.encoders, 4 * sizes.text_tokens * sizes.hidden_size * 8),
        Stage("denoise", sizes.network + sizes.loras, predictions * hidden * LIVE_HIDDEN),
        Stage("decode", sizes.decoder, width * height * sizes.decoder_channels * sizes.item_bytes * LIVE_MAPS),
    )
    together = process_bytes + sum(stage.parts for stage in stages) + max(stage.work for stage in stages)
    apart = process_bytes + max(stage.parts + stage.work for stage in stages)
    if together <= COMFORTABLE * available:
        return MemoryPlan(stages, True, together, "fits")
    if together <= available:
        return MemoryPlan(stages, True, together, "tight")
    return MemoryPlan(stages, False, apart, "moves" if apart <= available else "too large")
