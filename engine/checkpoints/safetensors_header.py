"""The header of a safetensors file, checked before anything of it is believed.

A header is untrusted JSON of up to 16 MiB. A general parser can turn 16 MiB of `[],[],` into a gigabyte of lists,
so this one reads only the fixed shape that a header has, from the bytes, without recursion:

    {"__metadata__": {string: string, ...},
     tensor name: {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}, ...}

Source: the safetensors format description. As there, tensors fill the data without overlap and without holes.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 32_768  # the largest public checkpoints have a few thousand
MAX_NAME_BYTES = 1024
MAX_METADATA_KEYS = 4096
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**60  # far below where torch's 64-bit strides overflow

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

_SPACE = re.compile(rb"[ \t\n\r]*+")
# Whole surrogate pairs only, so that every accepted string is text that can be shown and saved.
_STRING = re.compile(
    rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    rb'|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})))*+"'
)
_WHOLE_NUMBER = re.compile(rb"(?:0|[1-9][0-9]{0,19})(?![0-9.eE])")


class HeaderError(Exception):
    """What is wrong with a header, as half a sentence; `tensor` names the tensor at fault, if one is."""

    def __init__(self, why: str, tensor: str = "") -> None:
        super().__init__(f"tensor {shown(tensor)}: {why}" if tensor else why)
        self.tensor = tensor


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header; `start` and `end` count bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def shown(name: str) -> str:
    """A name from a file, quoted for a message: control characters escaped, long ones cut."""
    return repr(name if len(name) <= 200 else name[:200] + "...")


def parse_header(header: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Metadata and tensors of a header whose file has `data_bytes` bytes after it.

    Raises HeaderError.
    """
    _check_utf8(header)
    cursor = _Cursor(header)
    metadata: dict[bytes, bytes] | None = None
    tensors: dict[str, TensorEntry] = {}
    for key in cursor.keys_of_object("the header"):
        if len(key) > MAX_NAME_BYTES:
            raise HeaderError(f"expected names of at most {MAX_NAME_BYTES} bytes, one has {len(key)}")
        name: str = json.loads(key)
        if name == "__metadata__":
            if metadata is not None:
                raise HeaderError("'__metadata__' stands in it twice")
            metadata = _parse_metadata(cursor)
        elif name in tensors:
            raise HeaderError("it stands in the header twice", name)
        elif len(tensors) == MAX_TENSORS:
            raise HeaderError(f"expected at most {MAX_TENSORS} tensors")
        else:
            tensors[name] = _parse_tensor(cursor, name)
    cursor.expect_end()
    _check_layout(tensors, data_bytes)
    # Last, because a refusal must not have copied megabytes of text first; the strings are known to be sound.
    text = {json.loads(key): json.loads(value) for key, value in (metadata or {}).items()}
    if len(text) != len(metadata or {}):  # one key, escaped in two ways
        raise HeaderError("a key stands in '__metadata__' twice")
    return text, tensors


def _check_utf8(header: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(header), 1 << 16):  # in pieces: one wide character makes a str 4 bytes a letter
            decoder.decode(header[start : start + (1 << 16)])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise HeaderError("its header is not UTF-8 text") from None


class _Cursor:
    """Walks over the tokens of a JSON text."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0

    def take(self, token: bytes) -> bool:
        """Step over `token`, if it comes next."""
        self._skip_space()
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True

    def expect(self, token: bytes, where: str) -> None:
        if not self.take(token):
            self._refuse(repr(token.decode()), where)

    def expect_end(self) -> None:
        self._skip_space()
        if self._at != len(self._text):
            self._refuse("the end", "the header")

    def string(self, where: str) -> bytes:
        """A JSON string, still quoted and escaped."""
        return self._match(_STRING, "a string", where)

    def whole_number(self, where: str) -> int:
        return int(self._match(_WHOLE_NUMBER, "a whole number from 0", where))

    def whole_numbers(self, where: str, at_most: int) -> tuple[int, ...]:
        self.expect(b"[", where)
        if self.take(b"]"):
            return ()
        numbers = [self.whole_number(where)]
        while not self.take(b"]"):
            if len(numbers) == at_most:
                raise HeaderError(f"expected at most {at_most} numbers in {where}")
            self.expect(b",", where)
            numbers.append(self.whole_number(where))
        return tuple(numbers)

    def keys_of_object(self, where: str) -> Iterator[bytes]:
        """Yields each key, still quoted; the caller takes its value before asking for the next."""
        self.expect(b"{", where)
        if self.take(b"}"):
            return
        while True:
            key = self.string(where)
            self.expect(b":", where)
            yield key
            if self.take(b"}"):
                return
            self.expect(b",", where)

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None  # the pattern takes nothing, too
        self._at = match.end()

    def _match(self, pattern: re.Pattern[bytes], what: str, where: str) -> bytes:
        self._skip_space()
        match = pattern.match(self._text, self._at)
        if match is None:
            self._refuse(what, where)
        self._at = match.end()
        return match[0]

    def _refuse(self, what: str, where: str) -> NoReturn:
        found = self._text[self._at : self._at + 20].decode("utf-8", "replace")
        raise HeaderError(f"expected {what} in {where} at byte {self._at} of the header, found {found!r}")


def _parse_metadata(cursor: _Cursor) -> dict[bytes, bytes]:
    where = "'__metadata__'"
    metadata: dict[bytes, bytes] = {}
    for key in cursor.keys_of_object(where):
        if key in metadata:
            raise HeaderError(f"a key stands in {where} twice")
        if len(metadata) == MAX_METADATA_KEYS:
            raise HeaderError(f"expected at most {MAX_METADATA_KEYS} keys in {where}")
        metadata[key] = cursor.string(where)
    return metadata


def _parse_tensor(cursor: _Cursor, name: str) -> TensorEntry:
    where = f"tensor {shown(name)}"
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    for field in cursor.keys_of_object(where):
        if field == b'"dtype"' and dtype is None:
            spelling = json.loads(cursor.string(where))
            dtype = DTYPES.get(spelling)
            if dtype is None:
                raise HeaderError(f"expected a dtype that torch knows, found {shown(spelling)}", name)
        elif field == b'"shape"' and shape is None:
            shape = cursor.whole_numbers(where, at_most=MAX_DIMENSIONS)
        elif field == b'"data_offsets"' and offsets is None:
            offsets = cursor.whole_numbers(where, at_most=2)
        else:
            raise HeaderError(
                f"expected dtype, shape and data_offsets, each once; found {shown(str(field)[2:-1])}", name
            )
    if dtype is None or shape is None or offsets is None or len(offsets) != 2:
        raise HeaderError("expected dtype, shape and two data_offsets", name)
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise HeaderError(f"expected at most 2^60 elements, its shape is {shape}", name)
    start, end = offsets
    if start > end:
        raise HeaderError(f"expected bytes that end after they start, found {start} to {end}", name)
    expected = math.prod(shape) * dtype.itemsize
    if end - start != expected:
        raise HeaderError(f"expected {expected} bytes for {shape} of {str(dtype)[6:]}, found {end - start}", name)
    return TensorEntry(dtype, shape, start, end)


def _check_layout(tensors: dict[str, TensorEntry], data_bytes: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    filled = 0
    for name in sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].end)):
        entry = tensors[name]
        if entry.end > data_bytes:
            raise HeaderError(f"expected its bytes up to {entry.end}, but the data ends at byte {data_bytes}", name)
        if entry.start != filled:
            fault = "overlaps the tensor before it" if entry.start < filled else "leaves a hole before it"
            raise HeaderError(f"expected to start at byte {filled}, it starts at {entry.start} and {fault}", name)
        filled = entry.end
    if filled != data_bytes:
        raise HeaderError(f"expected {filled} bytes of data after the header, found {data_bytes}")
