"""What is in the queue, what is being made, what went wrong: the values `GenerationState` holds."""

from __future__ import annotations

from dataclasses import dataclass

from PySide6.QtGui import QImage

from engine.problems import Problem, engine_stopped
from engine.requests import ImageRequest, Request


@dataclass(slots=True)
class Job:
    """A picture request in the queue, and how long it is expected to take."""

    id: int
    request: ImageRequest
    predicted_s: float | None
    stopping: bool = False


@dataclass(slots=True)
class Running:
    """The picture that is being made now, or was when it stopped."""

    job: Job
    image: int = 1
    images: int = 1
    seed: int = 0
    steps: int = 0
    step: int = 0
    width: int = 1
    height: int = 1
    elapsed_s: float = 0.0
    loading: str = ""  # what is being read before the first step
    preview: QImage | None = None

    @property
    def fraction(self) -> float:
        return self.step / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """What the strip says. `retry` is what its button asks for again; None: there is nothing to ask again."""

    problem: Problem
    retry: Request | None

    @property
    def button(self) -> str:
        if self.retry is None:
            return ""
        return "Continue" if self.problem.what == engine_stopped().what else "Try again"


@dataclass(frozen=True, slots=True)
class ModelState:
    """loading: 0..1 while the model is being read, else None."""

    words: str
    loading: float | None = None
