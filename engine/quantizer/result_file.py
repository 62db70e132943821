"""The file a conversion writes. Knows no torch: a mistake in a name is answered at once."""

from __future__ import annotations

from pathlib import Path

from engine.folders import check_writable, named_path
from engine.problems import bad_request


def result_file(wanted: str) -> Path:
    """The absolute path of a file that can be written. Raises ProblemError."""
    out = named_path(wanted)
    if out.suffix != ".safetensors" or out.is_dir():
        raise bad_request(
            f"The result cannot be written as {out.name!r}.", "Choose a name that ends in .safetensors."
        )
    check_writable(out.parent)
    return out.absolute()
