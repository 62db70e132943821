"""safetensors files: opened with every word of the header checked, read one tensor at a time, written in one piece.

Tensors are read by plain reads, not through a memory map: when a mapped file shrinks or its drive goes away while
it is used, the process is killed, where a short read is an error that can be told. On Windows a map would also keep
people from replacing the file.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.checkpoints.foreign import START_BYTES, foreign_kind
from engine.checkpoints.safetensors_header import DTYPES, MAX_HEADER_BYTES, HeaderError, parse_header, shown
from engine.folders import discard, unfinished
from engine.problems import Problem, ProblemError, ProblemKind, bad_file, machine_cannot
from engine.safe_json import parse_json

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
GET_AGAIN = "Download it again from where it came from."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a tensor is and where it lies: `offset` counts bytes from the start of the file `path`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


class SafetensorsFile:
    """A checked safetensors file, or several read as one. Holds no open file and no weights."""

    def __init__(
        self,
        path: Path,
        metadata: dict[str, str],
        tensors: dict[str, TensorInfo],
        stamps: dict[Path, tuple[int, int]],
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self.stamps = stamps  # size in bytes and time of change in ns, of each file, when it was checked

    def read(self, name: str) -> Tensor:
        """A fresh tensor on the CPU. Raises ProblemError if there is no such tensor or the file has changed."""
        info = self.info(name)
        try:
            data = torch.empty(info.num_bytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            raise ProblemError(_no_memory(info, name)) from None
        try:
            with open(info.path, "rb", buffering=0) as file:
                changed = _stamp(file) != self.stamps[info.path]
                file.seek(info.offset)
                if changed or not _read_all(file, memoryview(data.numpy().data)):
                    raise bad_file(
                        f"{info.path.name} was changed while it was being read: tensor {shown(name)}.",
                        "Wait until its download or copy is complete, then load it again.",
                        str(info.path),
                    )
        except OSError as error:
            raise unreadable(info.path, error) from error
        return data.view(info.dtype).view(info.shape)

    def info(self, name: str) -> TensorInfo:
        """Raises ProblemError if there is no such tensor."""
        if name not in self.tensors:
            raise self.fault(name, "expected this tensor, it is missing")
        return self.tensors[name]

    def read_config(self, key: str = "config") -> Any:
        """The JSON text that the metadata has under `key`, parsed; None if it has none.

        Raises ProblemError.
        """
        text = self.metadata.get(key)
        return None if text is None else parse_json(text, f"{self.path.name} ({key} in its metadata)")

    def fault(self, name: str, why: str) -> ProblemError:
        """A problem with one tensor of this file; `why` says what was expected and what was found."""
        return bad_file(
            f"{self.path.name} cannot be used: tensor {shown(name)}: {why}.", GET_AGAIN, detail=str(self.path)
        )


def open_safetensors(path: Path | str) -> SafetensorsFile:
    """Check a file's header and return it, with no weights read.

    Raises ProblemError when it is missing, unreadable, damaged, a pickle, or something else altogether.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise bad_file(f"{path.name} is not a file.", "Choose a .safetensors file.", str(path))
        _refuse_pickle(path, path.suffix.lower() in PICKLE_SUFFIXES)
        with open(path, "rb", buffering=0) as file:
            stamp = _stamp(file)
            header = _read_header(file, path, stamp[0])
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be one
        raise unreadable(path, error) from error
    data_start = 8 + len(header)
    try:
        metadata, entries = parse_header(header, stamp[0] - data_start)
    except HeaderError as error:
        raise damaged(path, str(error)) from None
    tensors = {
        name: TensorInfo(entry.dtype, entry.shape, path, data_start + entry.start, entry.end - entry.start)
        for name, entry in entries.items()
    }
    return SafetensorsFile(path, metadata, tensors, {path: stamp})


def damaged(path: Path, why: str) -> ProblemError:
    return bad_file(f"{path.name} is damaged or incomplete: {why}.", GET_AGAIN, str(path))


def unreadable(path: Path, error: Exception) -> ProblemError:
    if isinstance(error, FileNotFoundError):
        return bad_file(f"There is no file {shown(str(path))}.", "Check the name and the folder.", str(path))
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return bad_file(
        f"{shown(str(path))} cannot be read: {reason}.", "Check the file and its permissions.", repr(error)
    )


def _no_memory(info: TensorInfo, name: str) -> Problem:
    return Problem(
        ProblemKind.MEMORY,
        what=f"Tensor {shown(name)} of {info.path.name} needs {info.num_bytes / 2**30:.1f} GB of memory.",
        todo="Close other programs, or choose a smaller model.",
        detail=str(info.path),
    )


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _read_all(file: BinaryIO, into: memoryview) -> bool:
    """Fill `into`; False if the file ends before."""
    while len(into):
        count = file.readinto(into)  # type: ignore[attr-defined]
        if not count:
            return False
        into = into[count:]
    return True


def _read_header(file: BinaryIO, path: Path, file_bytes: int) -> bytes:
    start = bytearray(min(START_BYTES, file_bytes))
    _read_all(file, memoryview(start))
    # A header of 1152 bytes begins with a pickle's first two as well: what follows the length tells them apart.
    _refuse_pickle(path, start.startswith(PICKLE_MAGICS) and start[8:9] != b"{")
    what = foreign_kind(bytes(start))
    if what is not None:
        raise bad_file(f"{path.name} is {what}, not a safetensors file.", "Choose a .safetensors file.", str(path))
    if file_bytes < 10:
        raise damaged(path, f"expected at least 10 bytes, found {file_bytes}")
    (num_bytes,) = struct.unpack("<Q", start[:8])
    if num_bytes > MAX_HEADER_BYTES:
        raise damaged(
            path, f"expected a header of at most {MAX_HEADER_BYTES} bytes, its first 8 bytes say {num_bytes}"
        )
    if num_bytes > file_bytes - 8:
        raise damaged(path, f"expected a header of {num_bytes} bytes, the file ends after {file_bytes - 8}")
    file.seek(8)
    header = file.read(num_bytes)
    if len(header) != num_bytes:
        raise damaged(path, f"expected a header of {num_bytes} bytes, found {len(header)}")
    return header


def _refuse_pickle(path: Path, is_pickle: bool) -> None:
    if is_pickle:
        raise bad_file(
            f"{path.name} is a pickle. Opening a pickle runs whatever program is inside it, so Tonfa never does.",
            "Look for the same model as a .safetensors file.",
            str(path),
        )


def write_safetensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole file; the same tensors and metadata give the same bytes.

    Raises ProblemError when it cannot be written; then nothing is left behind.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class SafetensorsWriter:
    """Writes a file tensor by tensor, in any order, so that a large model need not be in memory at once.

    Used as a context manager: at its end the file appears under its name; if anything went wrong, nothing does.
    `layout` says dtype and shape of every tensor that will be written.
    """

    def __init__(
        self,
        path: Path | str,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self._path = Path(path)
        self._temporary = unfinished(self._path)
        self._layout = dict(layout)
        self._header, self._offsets = _build_header(self._layout, metadata)
        self._missing = set(self._layout)

    def __enter__(self) -> SafetensorsWriter:
        try:
            self._file = open(self._temporary, "wb")
            self._file.write(self._header)
        except OSError as error:
            self._discard()
            raise self._unwritable(error) from error
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ProblemError if the disk is full; ValueError if the tensor is not the one announced."""
        if (tensor.dtype, tuple(tensor.shape)) != self._layout[name] or name not in self._missing:
            raise ValueError(
                f"SafetensorsWriter: {name} is {self._layout[name]}, once; got {tensor.dtype, tensor.shape}"
            )
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        try:
            self._file.seek(self._offsets[name])
            self._file.write(data.data)
        except OSError as error:
            raise self._unwritable(error) from error
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
            return
        if self._missing:
            self._discard()
            raise ValueError(f"SafetensorsWriter: {len(self._missing)} tensors were not written")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
            discard(self._temporary)
        except OSError as failure:
            self._discard()
            raise self._unwritable(failure) from failure

    def _discard(self) -> None:
        file: BinaryIO | None = getattr(self, "_file", None)
        try:
            if file is not None:
                file.close()
        except OSError:
            pass  # a full disk is told by the write that met it
        discard(self._temporary)

    def _unwritable(self, error: OSError) -> ProblemError:
        return machine_cannot(
            f"{self._path.name} cannot be written: {error.strerror or error}.",
            "Check the free space and the permissions of the folder.",
            f"{self._path}: {error!r}",
        )


def _build_header(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, and the byte of the file at which each tensor starts."""
    spelling = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    starts: dict[str, int] = {}
    filled = 0
    # Wide dtypes first keeps every tensor aligned to its own size, as the public library does.
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        starts[name] = filled
        filled += dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": spelling[dtype], "shape": list(shape), "data_offsets": [starts[name], filled]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    return prefix, {name: len(prefix) + start for name, start in starts.items()}
