"""Pictures of today that an earlier start of the window made: read from their files, recipe and all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, QRunnable, QThreadPool, Signal
from PySide6.QtGui import QImage

from app import images
from engine import folders
from engine.problems import ProblemError
from engine.requests import ImageRequest, LoraChoice

MOST = 300  # of a day; older ones are in their folder
RECIPE = "tonfa"  # what the recipe is called in a PNG
MAX_RECIPE_CHARACTERS = 2**20


@dataclass(frozen=True, slots=True)
class Earlier:
    """A picture's file and how it was made. The LoRAs of its request go by their names."""

    file: str
    request: ImageRequest
    width: int
    height: int
    thumbnail: QImage


def request_of(recipe: str) -> ImageRequest | None:
    """The request that a recipe's JSON text comes from; None for what is none of ours. It may be damaged."""
    try:
        told: Any = json.loads(recipe[:MAX_RECIPE_CHARACTERS])
        return ImageRequest(
            prompt=told["prompt"],
            negative=told["negative"],
            model=told["model"],
            loras=tuple(LoraChoice(one["name"], one["strength"]) for one in told["loras"]),
            width=told["width"],
            height=told["height"],
            steps=told["steps"],
            seed=told["seed"],
            guidance=told["guidance"],
            cfg=told["cfg"],
        )
    except (ProblemError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read(path: Path, side: int) -> Earlier | None:
    """One picture; None where there is no picture with a recipe."""
    image = images.load(path)
    request = request_of(image.text(RECIPE)) if image is not None else None
    if image is None or request is None:
        return None
    return Earlier(str(path), request, image.width(), image.height(), images.thumbnail(image, side))


class _Read(QRunnable):
    class Found(QObject):
        found = Signal(list)  # of Earlier, newest first

    def __init__(self, folder: Path, side: int) -> None:
        super().__init__()
        self._folder, self._side = folder, side
        self.told = _Read.Found()

    def run(self) -> None:
        try:
            files = sorted(self._folder.glob("[0-9]*.png"), reverse=True)[:MOST]
        except OSError:
            files = []
        read_ones = (read(file, self._side) for file in files)
        self.told.found.emit([one for one in read_ones if one is not None])


def read_todays(side: int, take: Callable[[list[Earlier]], None]) -> None:
    """Gives today's pictures to `take`, a slot of a QObject; thumbnails are `side` device pixels square."""
    task = _Read(folders.pictures() / date.today().isoformat(), side)
    task.told.found.connect(take)
    QThreadPool.globalInstance().start(task)
