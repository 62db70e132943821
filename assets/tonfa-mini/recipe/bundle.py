"""bundle.json: what the program reads first. Written last, since it names the hash of every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from recipe.tokens import LENGTH, PAD_ID

VERSION = "0.1"
ABOUT = (
    "A small FLUX trained by this project on emoji drawings: single things, colours, simple places, small counts."
)


def _file(folder: Path, name: str, **more: int) -> dict[str, Any]:
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return {"path": name, "sha256": digest, **more}


def write_bundle(folder: Path) -> None:
    """Hash the files of a finished model and write bundle.json beside them. preview.json is taken in."""
    tokenizer = _file(folder, "tokenizer.json", length=LENGTH, pad_id=PAD_ID)
    weights = {role: _file(folder, f"{role}.safetensors") for role in ("transformer", "t5", "clip", "vae")}
    lora = _file(folder, "lora-3d.safetensors")
    content = {
        "format": 1,
        "name": "Tonfa Mini",
        "family": "flux",
        "version": VERSION,
        "licence": "Apache-2.0; the drawings it learned from: MIT and Apache-2.0, see LICENSES",
        "about": ABOUT,
        "parts": {
            **weights,
            "t5_tokenizer": tokenizer,
            "clip_tokenizer": tokenizer,
            "vocabulary": _file(folder, "vocabulary.json"),
        },
        "sizes": {"default": [256, 256], "presets": [["Square", 256, 256]], "step": 16, "min": 256, "max": 256},
        "defaults": {"steps": 8, "guidance": 3.0, "cfg": 1.0, "default_cfg": 2.5, "shift": 3.0},
        "preview": json.loads((folder / "preview.json").read_text()),
        "loras": [{"name": "3D look", **lora, "strength": 0.9, "words": []}],
    }
    (folder / "bundle.json").write_text(json.dumps(content, indent=1) + "\n")
