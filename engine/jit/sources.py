"""CUDA sources: where they are, and everything they include."""

from __future__ import annotations

import hashlib
import re
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# What NVRTC is asked for: "a" targets where they exist, because block-scaled mma and wgmma have no other.
ARCHITECTURES = ("75", "80", "86", "87", "89", "90a", "100a", "103a", "110a", "120a", "121a")
KERNELS = Path(__file__).resolve().parents[2] / "kernels_cu"
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^">\n]+)[">]', re.MULTILINE)


class KernelError(RuntimeError):
    """A kernel does not compile, load or run. Says which, and with which numbers."""


class Variant(NamedTuple):  # hashed at every launch: a tuple does that fastest
    """One way to compile a source.

    source: "quantize_act.w4a4" is kernels_cu/quantize_act.w4a4.cu; its entry point is named by the stem before the
    first dot, `extern "C" __global__ void quantize_act(...)`; it takes pointers, `int` and `float`.
    defines: -DNAME=VALUE each.
    """

    source: str
    defines: tuple[tuple[str, int], ...] = ()

    @property
    def entry(self) -> str:
        return self.source.partition(".")[0]

    def __str__(self) -> str:
        return " ".join([self.source, *(f"{name}={value}" for name, value in self.defines)])


def arch_of(major: int, minor: int) -> str:
    """The architecture to compile for on a card of this compute capability: (9, 0) -> "90a"."""
    number = f"{major}{minor}"
    return f"{number}a" if f"{number}a" in ARCHITECTURES else number


def source_of(variant: Variant) -> tuple[str, dict[str, str]]:
    """The text of a variant's source, and of every header it includes by the name it is included by.

    Our own headers come from kernels_cu, NVIDIA's from the packages beside torch. A name found in neither is left
    out: NVRTC has some itself, and headers name others that only a host compiler would read.
    """
    try:
        text = (KERNELS / f"{variant.source}.cu").read_text("utf-8")
    except OSError as error:
        raise KernelError(f"There is no kernel source {variant.source}.cu: {error}") from None
    headers: dict[str, str] = {}
    waiting = list(_included(text))
    while waiting:
        name = waiting.pop()
        if name not in headers and (header := _header(name)) is not None:
            headers[name] = header
            waiting += _included(header)
    return text, dict(sorted(headers.items()))


@lru_cache(256)
def _included(text: str) -> tuple[str, ...]:
    return tuple(INCLUDE.findall(text))


def kernels_version() -> str:
    """Changes with any file of kernels_cu: a recipe says by which kernels its picture was made."""
    digest = hashlib.sha256()
    for file in sorted(path for path in KERNELS.rglob("*") if path.suffix in {".cu", ".cuh"}):
        digest.update(file.relative_to(KERNELS).as_posix().encode() + b"\0")
        digest.update(file.read_text("utf-8").encode() + b"\0")
    return digest.hexdigest()[:12]


def _header(name: str) -> str | None:
    own = KERNELS / name
    return own.read_text("utf-8") if own.is_file() else _cuda_header(name)


@cache
def _cuda_header(name: str) -> str | None:
    for folder in _cuda_folders():
        if (folder / name).is_file():
            return (folder / name).read_text("utf-8", errors="replace")
    return None


@cache
def _cuda_folders() -> tuple[Path, ...]:
    """Folders with cuda_fp16.h and its kin, best first."""
    from cuda import pathfinder

    found = [pathfinder.find_nvidia_header_directory("cudart")]
    if (packages := find_spec("nvidia")) is not None:
        for root in packages.submodule_search_locations or ():
            found += [f"{root}/cu13/include", f"{root}/cuda_runtime/include"]
    return tuple(Path(folder) for folder in found if folder and Path(folder).is_dir())
