"""A bundle: the folder with a bundle.json that makes a whole model of several weight files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.folders import TOKEN_PIXELS, JsonFields, ModelCard, bundle_fields, part_path, read_card, sha256
from engine.problems import bad_file

WEIGHTS = ("transformer", "t5", "clip", "vae")
TOKENIZERS = ("t5_tokenizer", "clip_tokenizer")
PREVIEW_CHANNELS = 3
LARGEST_MU = 10.0  # the shift is exp(mu): 22,000 is more than any model has, and far from overflow


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a bundle. sha256: what the bundle says it is, "" where it says nothing."""

    role: str
    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenizerPart:
    """A tokenizer.json, and how long a prompt is for its encoder."""

    part: Part
    length: int  # tokens, the special ones included
    pad_id: int


@dataclass(frozen=True, slots=True)
class PreviewMatrix:
    """latents (C, h, w) -> RGB in -1 .. 1: rows (C, 3) and a bias (3,)."""

    rows: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle.json. `shift` is a number, or the four of a shift that depends on the size."""

    card: ModelCard
    weights: Mapping[str, Part]  # by role, see WEIGHTS
    tokenizers: Mapping[str, TokenizerPart]
    shift: float | Mapping[str, float]
    preview: PreviewMatrix | None

    def part_hash(self, role: str, check: Callable[[], None] = lambda: None) -> str:
        """The file's SHA-256 in hex. Raises ProblemError when it is not the file the bundle names."""
        part = self.weights[role] if role in self.weights else self.tokenizers[role].part
        return self._checked_hash(part.path, part.sha256, check)

    def lora_hash(self, path: Path, check: Callable[[], None] = lambda: None) -> str:
        """The same of a LoRA, which may be one that the bundle brings or any other."""
        told = next((lora.sha256 for lora in self.card.loras if Path(lora.file) == path), "")
        return self._checked_hash(path, told, check)

    def _checked_hash(self, path: Path, told: str, check: Callable[[], None]) -> str:
        found = sha256(path, check)
        if told and told != found:
            raise bad_file(
                f"{path.name} is not the file that the model {self.card.name} was made of.",
                "Download the model again, or correct the sha256 in its bundle.json.",
                f"{path}: expected {told}, found {found}",
            )
        return found


def read_bundle(folder: Path) -> Bundle:
    """Read and check `folder`/bundle.json. Raises ProblemError naming the field, or the file that is missing."""
    card = read_card(folder)
    fields = bundle_fields(folder)
    parts = fields.inner("parts")
    defaults = fields.inner("defaults")
    missing = [role for role in (*WEIGHTS, *TOKENIZERS) if role not in parts.content]
    if missing:
        raise bad_file(f"{fields.file} names no {missing[0]}.", "Use a complete model.")
    return Bundle(
        card=card,
        weights={role: _part(folder, parts, role) for role in WEIGHTS},
        tokenizers={role: _tokenizer(folder, parts, role) for role in TOKENIZERS},
        shift=_shift(defaults, card),
        preview=_preview(fields) if "preview" in fields.content else None,
    )


def _part(folder: Path, parts: JsonFields, role: str) -> Part:
    fields = parts.inner(role)
    return Part(role, part_path(folder, fields.text("path"), fields.file), fields.text("sha256", "").lower())


def _tokenizer(folder: Path, parts: JsonFields, role: str) -> TokenizerPart:
    fields = parts.inner(role)
    return TokenizerPart(
        _part(folder, parts, role), fields.whole("length", 2, 4096), fields.whole("pad_id", 0, 2**20, 0)
    )


def _shift(defaults: JsonFields, card: ModelCard) -> float | Mapping[str, float]:
    if not isinstance(defaults.content.get("shift"), dict):
        return defaults.number("shift", 0.01, 100, 1.0)
    fields = defaults.inner("shift")
    first = fields.whole("base_tokens", 1, 2**24)
    low = fields.number("base", -LARGEST_MU, LARGEST_MU)
    last = fields.whole("max_tokens", first + 1, 2**25)
    high = fields.number("max", -LARGEST_MU, LARGEST_MU)
    for side in (card.size_min, card.size_max):  # mu is a line: between these two it stays within them
        mu = low + (high - low) / (last - first) * ((side // TOKEN_PIXELS) ** 2 - first)
        if abs(mu) > LARGEST_MU:
            raise fields.wrong("max", f"one that keeps mu within {LARGEST_MU:g} at {side} x {side} pixels")
    return {"base_tokens": first, "base": low, "max_tokens": last, "max": high}


def _preview(fields: JsonFields) -> PreviewMatrix:
    preview = fields.inner("preview")
    rows = preview.items("matrix")
    every = [*rows, preview.items("bias")]
    if not rows or not all(
        isinstance(row, list)
        and len(row) == PREVIEW_CHANNELS
        and all(type(x) in (int, float) and abs(x) < 1e6 for x in row)
        for row in every
    ):
        raise bad_file(
            f"{fields.file} is damaged: the preview matrix should be rows of three numbers.",
            "Download the model again.",
        )
    return PreviewMatrix(tuple(tuple(map(float, row)) for row in rows), tuple(map(float, every[-1])))
