"""A checkpoint as people have it: one safetensors file, or the older folder of two."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoints.safetensors_file import SafetensorsFile, open_safetensors, unreadable
from engine.problems import bad_file
from engine.safe_json import MAX_JSON_BYTES, parse_json

FOLDER_PARTS = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")


def open_checkpoint(path: Path | str) -> SafetensorsFile:
    """A safetensors file, or the older two-file folder read as if it were one file.

    Raises ProblemError.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return open_safetensors(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    for part in FOLDER_PARTS:
        if not (path / part).is_file():
            raise bad_file(
                f"The folder {path.name} has no {part}.",
                f"Choose a folder with {' and '.join(FOLDER_PARTS)}, or a single .safetensors file.",
                str(path),
            )
    blocks, others = (open_safetensors(path / part) for part in FOLDER_PARTS)
    for name in blocks.tensors.keys() & others.tensors.keys():
        raise blocks.fault(name, f"expected it in one file, it is in {others.path.name}, too")
    metadata = others.metadata | blocks.metadata
    for key in ("config", "comfy_config"):
        text = _read_small_text(path / f"{key}.json")
        if text is not None:
            metadata[key] = text
    return SafetensorsFile(path, metadata, blocks.tensors | others.tensors, blocks.stamps | others.stamps)


def _read_small_text(path: Path) -> str | None:
    """The JSON text of a file, checked; None where there is none."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    parse_json(text, path.name)
    return text.decode()
