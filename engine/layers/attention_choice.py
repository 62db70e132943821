"""Which attention is fastest on this card: measured once for a size, then read from a file.

The key holds whatever a measurement depends on: card, driver, torch, our kernels, heads, tokens, type.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

import torch
from cuda.bindings import driver

from engine.jit import kernels_version
from engine.layers.attention_backend import BACKENDS, Backend, SizeClass, choices, fastest, size_class

FILE = "attention.json"
MOST_ENTRIES = 200  # newer torch, drivers and kernels leave theirs behind


def choose(
    heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device, folder: Path
) -> Backend:
    """The backend for such attentions on a CUDA device, from now on used by `attend`.

    Not inside a CUDA graph's capture. Without memory to measure in, torch decides, until the next time.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    size = size_class(index, heads, head_dim, tokens, dtype)
    if size in choices:
        return choices[size]
    key = f"{_machine(index)} | {heads} heads of {head_dim}, up to {size.most_tokens} tokens, {dtype}"
    choice = _read(folder).get(key)
    if choice is None:
        choice = _measure(size)
        if choice is None:
            return "torch"
        _write(folder, {**_read(folder), key: choice})
    choices[size] = choice
    return choice


def _machine(index: int) -> str:
    return " | ".join(
        [
            torch.cuda.get_device_name(index),
            f"driver for CUDA {driver.cuDriverGetVersion()[1]}",
            f"torch {torch.__version__}",
            f"kernels {kernels_version()}",
        ]
    )


def _measure(size: SizeClass) -> Backend | None:
    with contextlib.suppress(torch.OutOfMemoryError), torch.cuda.device(size.card), torch.inference_mode():
        return fastest(size)
    return None


def _read(folder: Path) -> dict[str, Backend]:
    """What was measured before; a damaged file counts as none."""
    try:
        content = json.loads((folder / FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if value in BACKENDS}


def _write(folder: Path, content: dict[str, Backend]) -> None:
    """Whole or not at all; a folder that cannot be written costs a measurement in each process."""
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix="new-", delete=False) as file:
            temporary = file.name
            json.dump(dict(list(content.items())[-MOST_ENTRIES:]), file, indent=1)
        os.replace(temporary, folder / FILE)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
