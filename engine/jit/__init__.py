"""Kernels are compiled on the person's machine (NVRTC, no toolkit), kept in a cache, and launched from Python.

A `Variant` names a source in kernels_cu and its defines; `prepare` compiles a model's variants with progress,
`load` brings them onto the card, `launch` runs one on torch's current stream.
"""

from __future__ import annotations

from engine.jit.compile import Compiled, compile_cubin, compiled, prepare, set_cache_folder
from engine.jit.launch import Strided, card_failure, current_arch, launch, load, noted, synchronize
from engine.jit.sources import ARCHITECTURES, KernelError, Variant, arch_of, kernels_version

__all__ = [
    "ARCHITECTURES",
    "Compiled",
    "KernelError",
    "Strided",
    "Variant",
    "arch_of",
    "card_failure",
    "compile_cubin",
    "compiled",
    "current_arch",
    "kernels_version",
    "launch",
    "load",
    "noted",
    "prepare",
    "set_cache_folder",
    "synchronize",
]
