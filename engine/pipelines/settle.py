"""Turn what was asked into what will be done: the bundle's defaults, sizes the model takes, files that exist."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.bundle import Bundle
from engine.folders import ModelCard, find_lora, named_path, next_picture
from engine.pipelines.text_to_image import Picture
from engine.problems import bad_request
from engine.requests import ImageRequest


@dataclass(frozen=True, slots=True)
class SettledLora:
    """A LoRA that was found. name: as people call it, without a folder."""

    name: str
    path: Path
    strength: float


@dataclass(frozen=True, slots=True)
class Settled:
    """Everything decided. `pictures`: one per image, seeds counted up; `notices`: what is not as it was asked."""

    pictures: tuple[Picture, ...]
    loras: tuple[SettledLora, ...]
    notices: tuple[str, ...]


def settle(request: ImageRequest, bundle: Bundle, takes_guidance: bool) -> Settled:
    """Raises ProblemError for what the model cannot do and no default can mend."""
    card = bundle.card
    if request.guidance is not None and not takes_guidance:
        raise bad_request(f"{card.name} takes no guidance number.", "Leave guidance out; cfg is what steers it.")
    notices: list[str] = []
    width = snapped_size("width", request.width, card.default_size[0], card, notices)
    height = snapped_size("height", request.height, card.default_size[1], card, notices)
    cfg = card.cfg if request.cfg is None else request.cfg
    if request.negative.strip() and cfg == 1:
        cfg = card.default_cfg
        if cfg == 1:
            notices.append(f"{card.name} ignores what is to be left out.")
        else:
            notices.append(f"Leaving something out needs two predictions: cfg {cfg:g} is used.")
    guidance = (card.guidance if request.guidance is None else request.guidance) if takes_guidance else None
    pictures = tuple(
        Picture(
            prompt=request.prompt,
            negative=request.negative,
            width=width,
            height=height,
            steps=request.steps or card.steps,
            seed=request.seed + index,
            guidance=guidance,
            cfg=float(cfg),
            noise=request.noise,
            previews=request.previews,
        )
        for index in range(request.count)
    )
    loras = tuple(_lora(choice.file, choice.strength, card) for choice in request.loras)
    return Settled(pictures, loras, tuple(notices))


def snapped_size(name: str, asked: int | None, default: int, card: ModelCard, notices: list[str]) -> int:
    """The nearest size in pixels that the model takes; what is outside its range is a problem."""
    value = default if asked is None else asked
    if not card.size_min <= value <= card.size_max:
        raise bad_request(
            f"{card.name} makes pictures of {card.size_min} to {card.size_max} pixels a side, not {value}.",
            f"Choose another {name}.",
        )
    step = card.size_step
    low, high = -(-card.size_min // step) * step, card.size_max // step * step
    snapped = min(max((value + step // 2) // step * step, low), high)
    if snapped != value:
        notices.append(f"The {name} {value} became {snapped}: {card.name} takes multiples of {step}.")
    return snapped


def _lora(file: str, strength: float, card: ModelCard) -> SettledLora:
    path = find_lora(file, card)
    brought = next((one.name for one in card.loras if Path(one.file) == path), path.stem)
    return SettledLora(brought, path, float(strength))


def check_out(out: str, count: int) -> None:
    """Refuse a place where nothing can be written before an hour is spent on pictures for it."""
    if not out:
        return
    path = named_path(out)
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.suffix.lower() != ".png":
        raise bad_request(f"Pictures are saved as PNG, not as {path.name!r}.", "Choose a name that ends in .png.")
    if not folder.is_dir():
        raise bad_request(f"There is no folder {folder}.", "Make the folder, or choose another.")
    if not os.access(folder, os.W_OK):
        raise bad_request(f"The folder {folder} cannot be written to.", "Choose another folder.")


def picture_path(out: str, seed: int, count: int) -> Path | None:
    """Where a picture goes: NNNN-seed.png in a folder, else the name; with several the seed before the suffix."""
    if not out:
        return None
    path = named_path(out)
    if path.is_dir():
        return next_picture(path, seed)
    return path if count == 1 else path.with_name(f"{path.stem}-{seed}{path.suffix}")
