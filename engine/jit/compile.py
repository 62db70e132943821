"""NVRTC behind a cache on disk. Needs no card, no driver, no toolkit.

An entry is found by the hash of all that decides its bytes, and carries its own checksum: a damaged, cut or foreign
one is made again. Where the folder cannot be written, compiled kernels live as long as the process. What newer
sources, compilers or cards left unread for months goes when something new was compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

from engine.jit.sources import KernelError, Variant, source_of

OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v")
MOST_THREADS = 8  # NVRTC works in all of them at once
ERROR_LINES = 12
CHECKSUM_BYTES = 32
DAY_S = 24 * 3600
KEPT_S = 90 * DAY_S  # after it was last read


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin and what ptxas said about it."""

    cubin: bytes = field(repr=False)
    log: str

    def _number(self, pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, self.log)), default=0)

    @property
    def registers(self) -> int:
        """Of one thread."""
        return self._number(r"Used (\d+) registers")

    @property
    def shared_bytes(self) -> int:
        """Of one block, without what a launch adds."""
        return self._number(r"(\d+) bytes smem")

    @property
    def spilled_bytes(self) -> int:
        """Of one thread, in local memory. For sm_100 and newer ptxas calls them a stack frame, and spills 0."""
        return self._number(r"(\d+) bytes (?:stack frame|spill)")


def compile_cubin(variant: Variant, arch: str) -> bytes:
    return compiled(variant, arch).cubin


def compiled(variant: Variant, arch: str) -> Compiled:
    """The variant for an architecture ("89", "90a"), from the cache if it is there."""
    text, headers = source_of(variant)
    key = _key(variant, arch, text, headers)
    found = _read(key)
    if found is None:
        found = _compile(variant, arch, text, headers)
        _write(key, found)
    return found


def prepare(variants: Iterable[Variant], arch: str) -> Iterator[tuple[int, int]]:
    """Compile what the cache lacks, several at once; yields (done, total) of these, nothing if nothing is missing.

    Closing the generator ends it after the kernels that are being compiled.
    """
    missing = [variant for variant in dict.fromkeys(variants) if not _is_cached(variant, arch)]
    workers = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "jit")
    try:
        waiting = [workers.submit(compiled, variant, arch) for variant in missing]
        for done, one in enumerate(as_completed(waiting), 1):
            one.result()
            yield done, len(missing)
        if missing:
            _forget_old()
    finally:
        workers.shutdown(cancel_futures=True)


def _is_cached(variant: Variant, arch: str) -> bool:
    return _read(_key(variant, arch, *source_of(variant))) is not None


def _key(variant: Variant, arch: str, text: str, headers: dict[str, str]) -> str:
    parts = [text, *chain.from_iterable(headers.items()), *_options(variant, arch), _nvrtc_version()]
    return hashlib.sha256(b"".join(_digest(part) for part in parts)).hexdigest()


@lru_cache(256)  # headers are large, and every variant has the same
def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _options(variant: Variant, arch: str) -> list[str]:
    defines = [f"-D{name}={value}" for name, value in variant.defines]
    return [f"--gpu-architecture=sm_{arch}", *OPTIONS, *defines]


@cache
def _nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # cuda-python is not there, or finds no library
        raise KernelError(f"NVRTC, which compiles kernels, is not installed: {error}") from error
    return f"{major}.{minor}"


def _compile(variant: Variant, arch: str, text: str, headers: dict[str, str]) -> Compiled:
    from cuda.bindings import nvrtc

    names = [name.encode() for name in headers]
    bodies = [body.encode() for body in headers.values()]
    options = [option.encode() for option in _options(variant, arch)]
    error, program = nvrtc.nvrtcCreateProgram(
        text.encode(), f"{variant.source}.cu".encode(), len(names), bodies, names
    )
    if error:
        raise KernelError(f"{variant} for sm_{arch}: NVRTC says {error.name}")
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        words = log.decode("utf-8", errors="replace").replace("\0", "").strip()
        if error:
            lines = "\n".join(words.splitlines()[:ERROR_LINES])
            raise KernelError(f"{variant} does not compile for sm_{arch} ({error.name}):\n{lines}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(bytes(cubin), words)


# -------------------------------------------------------------------------------------------------------- cache


_folder: Path | None = None
_unwritten: dict[str, Compiled] = {}  # by key: what could not be put on disk


def set_cache_folder(folder: str | os.PathLike[str]) -> None:
    """Where compiled kernels are kept from now on; made when the first is written."""
    global _folder
    _folder = Path(folder)


def cache_folder() -> Path:
    """What was set; else TONFA_KERNEL_CACHE; else below TONFA_HOME; else in the user's cache folder."""
    if _folder is not None:
        return _folder
    if named := os.environ.get("TONFA_KERNEL_CACHE"):
        return Path(named)
    if home := os.environ.get("TONFA_HOME"):
        return Path(home).expanduser() / "cache" / "kernels"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
        return Path(base).expanduser() / "Tonfa" / "Cache" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "Tonfa" / "kernels"


def _checksum(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()


def _read(key: str) -> Compiled | None:
    """An entry is its checksum, the length of the log, the log, the cubin. Its file is as old as its last use."""
    file = cache_folder() / f"{key}.cubin"
    try:
        entry = file.read_bytes()
    except OSError:
        return _unwritten.get(key)
    content = entry[CHECKSUM_BYTES:]
    if entry[:CHECKSUM_BYTES] != _checksum(key, content):
        return _unwritten.get(key)
    with contextlib.suppress(OSError):  # a folder that is only read
        if abs(_age_s(file)) > DAY_S:
            os.utime(file)
    end = 4 + int.from_bytes(content[:4], "little")
    return Compiled(content[end:], content[4:end].decode())


def _write(key: str, one: Compiled) -> None:
    log = one.log.encode()
    content = len(log).to_bytes(4, "little") + log + one.cubin
    folder = cache_folder()
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="new-", suffix=".cubin", delete=False) as file:
            temporary = file.name
            file.write(_checksum(key, content) + content)
        os.replace(temporary, folder / f"{key}.cubin")
    except OSError:
        _unwritten[key] = one
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _age_s(file: Path) -> float:
    return time.time() - file.stat().st_mtime


def _forget_old() -> None:
    """Whoever still wants one makes it again; two programs may do this at once."""
    with contextlib.suppress(OSError):
        for file in cache_folder().glob("*.cubin"):
            with contextlib.suppress(OSError):
                if _age_s(file) > KEPT_S:
                    file.unlink()
