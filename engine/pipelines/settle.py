"""Turn what was asked into what will be done: the bundle's defaults, sizes the model takes, files that exist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.bundle import Bundle
from engine.folders import named_path, next_picture
from engine.pipelines.text_to_image import Picture
from engine.pipelines.wishes import SettledLora, settled_loras, settled_size
from engine.problems import bad_request
from engine.requests import ImageRequest


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
    width, height = settled_size(request, card, notices)
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
    return Settled(pictures, settled_loras(request, card), tuple(notices))


def picture_path(out: str, seed: int, count: int) -> Path | None:
    """Where a picture goes: NNNN-seed.png in a folder, else the name; with several the seed before the suffix."""
    if not out:
        return None
    path = named_path(out)
    if path.is_dir():
        return next_picture(path, seed)
    return path if count == 1 else path.with_name(f"{path.stem}-{seed}{path.suffix}")
