"""The two linears of the golden numerics, as weights."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.checkpoints.svdquant_file import read_svdquant_linear
from engine.reference.svdq_linear import SVDQuantWeights
from tests.golden import golden

GELU_SHIFT = 11 / 64


def golden_linear(name: str, folder: Path) -> SVDQuantWeights:
    """name: "fc1" or "fc2", which follows a GELU."""
    stored = {k.replace(".packed.", "."): t for k, t in golden("svdq_numerics_int4").items() if ".packed." in k}
    write_safetensors(folder / "linears.safetensors", stored, {})
    file = open_safetensors(folder / "linears.safetensors")
    return read_svdquant_linear(file, name, input_shift=GELU_SHIFT if name == "fc2" else 0.0)
