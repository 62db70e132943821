"""What a file is that is not a safetensors file, by its first bytes. Knows no torch."""

from __future__ import annotations

import codecs
import re

START_BYTES = 512  # of a file: as many as are looked at
_MAGICS = (
    (rb"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (rb"\xff\xd8\xff", "a JPEG picture"),
    (rb"GIF8[79]a", "a GIF picture"),
    (rb"RIFF....WEBP", "a WebP picture"),
    (rb"(?:II\*\0|MM\0\*)", "a TIFF picture"),
    (rb"....ftyp", "a video, or a picture of a phone"),
    (rb"%PDF-", "a PDF document"),
    (rb"GGUF", "a GGUF file"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (rb"(?:7z\xbc\xaf\x27\x1c|Rar!|\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd)", "a compressed archive"),
    (rb"(?:MZ|\x7fELF)", "a program"),
    (rb"version https://git-lfs", "only a pointer to a file kept by Git LFS"),
    (rb"(?:\xef\xbb\xbf)?\s*(?i:<!doctype html|<html)", "a web page"),
    (rb"(?:\xef\xbb\xbf)?\s*<", "a web page or an XML text"),
)
_MAGIC = [(re.compile(pattern, re.DOTALL), what) for pattern, what in _MAGICS]
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")


def foreign_kind(start: bytes) -> str | None:
    """What people call it ("a PNG picture"), from its first START_BYTES bytes; None for what is not known."""
    for pattern, what in _MAGIC:
        if pattern.match(start) and not _may_be_safetensors(start):
            return what
    return "a text file" if start and _is_text(start) else None


def _may_be_safetensors(start: bytes) -> bool:
    """A length below 16 MiB and a header: nothing else looks like it."""
    return start[4:8] == bytes(4) and start[8:9] == b"{"


def _is_text(start: bytes) -> bool:
    if _CONTROL.search(start):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # incremental: the last letter may be cut
    except UnicodeDecodeError:
        return False
    return True
