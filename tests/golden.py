"""Golden data: facts made by public packers and converters; tests/data/golden/README.md says which and how."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "data" / "golden"


@cache
def golden(name: str) -> dict[str, Tensor]:
    """All tensors of tests/data/golden/<name>.safetensors, read by the public library. Not to be written to."""
    return load_file(GOLDEN / f"{name}.safetensors")
