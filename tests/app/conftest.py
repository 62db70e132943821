"""What the window's tests share: a dressed QApplication, a model's card, an engine that only notes what it is told.

State is driven by real event values; the engine's process itself runs in test_end_to_end.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication

from app.state.composer import ComposerState
from app.state.generation import GenerationState
from app.state.history import History
from app.theme import Theme
from engine.events import Pixels
from engine.folders import LoraCard, ModelCard
from engine.requests import ImageRequest, Request


@pytest.fixture(scope="session")
def theme(qapp: QApplication) -> Theme:
    return Theme(qapp)


@pytest.fixture
def dark(theme: Theme) -> Iterator[Theme]:
    theme.follow(Qt.ColorScheme.Dark)
    yield theme
    theme.follow(Qt.ColorScheme.Dark)


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(
        "tonfa-mini",
        "Tonfa Mini",
        "/nowhere/tonfa-mini",
        family="flux",
        default_size=(256, 256),
        presets=(("Square", 256, 256), ("Wide", 320, 192)),
        size_step=16,
        size_min=128,
        size_max=384,
        steps=8,
        guidance=4.5,
        loras=(LoraCard("3D look", "/nowhere/lora-3d.safetensors", 0.8),),
        suggestions=("a red fox", "a sailboat"),
    )


class NotingEngine:
    """Notes what `GenerationState` asks for and gives job ids, as `EngineThread` does."""

    def __init__(self) -> None:
        self.submitted: list[tuple[int, Request, bool]] = []
        self.cancelled: list[int] = []
        self.plans: list[ImageRequest] = []
        self.held = False
        self.went_on = 0

    def submit(self, request: Request, first: bool = False) -> int:
        self.submitted.append((len(self.submitted) + 1, request, first))
        return len(self.submitted)

    def cancel(self, job: int) -> None:
        self.cancelled.append(job)

    def plan(self, request: ImageRequest) -> None:
        self.plans.append(request)

    def go_on(self) -> None:
        self.held = False
        self.went_on += 1


@pytest.fixture
def engine() -> NotingEngine:
    return NotingEngine()


@pytest.fixture
def composer(qapp: QApplication, card: ModelCard) -> ComposerState:
    state = ComposerState()
    state.set_model(card)
    return state


@pytest.fixture
def history(qapp: QApplication) -> History:
    return History()


@pytest.fixture
def generation(engine: NotingEngine, composer: ComposerState, history: History) -> GenerationState:
    return GenerationState(engine, composer, history)


def picture(height: int = 32, width: int = 32, value: int = 200) -> Pixels:
    """(H, W, 3) uint8, a ramp, so that a flip or a swap of channels shows."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    pixels[..., 2] = value
    return pixels
