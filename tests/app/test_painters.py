"""Everything that paints itself, painted many times.

PySide6 6.12 under Python 3.11 drops one reference to None with every call that returns nothing; some 5,000 calls
later, seconds of painting, the process aborts. The version is pinned below it; this test is the tripwire.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import pytest
from PySide6.QtCore import QPoint, QRect
from PySide6.QtGui import QPixmap, QRegion
from PySide6.QtWidgets import QApplication, QWidget
from pytestqt.qtbot import QtBot

from app import images
from app.state.history import History
from app.theme import Theme
from app.widgets.button import Button
from app.widgets.error_strip import ErrorStrip
from app.widgets.generate_bar import GenerateBar
from app.widgets.lora_row import LoraRow, LoraView
from app.widgets.memory_bar import MemoryBar
from app.widgets.model_card import ModelCard
from app.widgets.number_field import NumberField
from app.widgets.picture_view import PictureView
from app.widgets.prompt_box import PromptBox
from app.widgets.rail import Rail
from app.widgets.size_picker import SizePicker
from app.widgets.sparkline import Sparkline
from app.widgets.status_bar import StatusBar
from app.widgets.switch import Switch
from app.widgets.timeline import NowTile, Timeline
from engine.requests import ImageRequest
from tests.app.conftest import picture

PAINTS = 1000
GIB = 2**30


def memory_bar() -> QWidget:
    bar = MemoryBar()
    bar.set_bytes(2 * GIB, 5 * GIB, 1 * GIB, 12 * GIB)
    return bar


def model_card() -> QWidget:
    card = ModelCard()
    card.set_model("Tonfa Mini", images.to_qimage(picture()))
    card.set_state("Loading, ready in about 3 s", 0.4)
    return card


def sparkline() -> QWidget:
    line = Sparkline()
    line.set_values([0.3] * 200, [0.5 + 0.001 * i for i in range(200)], 240)
    return line


def picture_view() -> QWidget:
    view = PictureView()
    view.set_picture(images.to_qimage(picture()), (256, 256), tag="Preview")
    view.set_progress(0.5)
    view.set_caption("Step 4 of 8", "3.4 steps a second")
    return view


def now_tile() -> QWidget:
    tile = NowTile()
    tile.set_progress(images.to_qimage(picture()), 12, 20, "")
    tile.setChecked(True)
    return tile


def timeline() -> QWidget:
    history = History()
    for number in range(4):
        history.add(
            images.to_qimage(picture()),
            ImageRequest("x"),
            seed=number,
            steps=8,
            seconds=1.0,
            predicted_s=None,
            file="",
        )
    it = Timeline(history)
    history.setParent(it)
    it.select(0)
    return it


def size_picker() -> QWidget:
    picker = SizePicker()
    picker.set_presets([("Square", 256, 256)])
    picker.set_size(256, 256)
    return picker


MAKERS: dict[str, Callable[[], QWidget]] = {
    "button": lambda: Button("Generate", "main", "generate", height=44, hint="Ctrl ↵"),
    "secondary button": lambda: Button("Add to queue", "secondary", "queue"),
    "error strip": ErrorStrip,
    "generate bar": GenerateBar,
    "lora row": lambda: LoraRow(LoraView("a", "3D look", -0.4, 1.0, True, "288 of 304 layers used", "warn")),
    "memory bar": memory_bar,
    "model card": model_card,
    "number field": lambda: NumberField("Count", 1, 9, stepper=True),
    "now tile": now_tile,
    "picture view": picture_view,
    "prompt box": PromptBox,
    "rail": lambda: Rail([("Generate", "generate")]),
    "size picker": size_picker,
    "sparkline": sparkline,
    "status bar": StatusBar,
    "switch": lambda: Switch("on"),
    "timeline": timeline,
}


@pytest.mark.parametrize("name", MAKERS)
def test_painting_takes_no_reference_to_none(name: str, dark: Theme, qtbot: QtBot, qapp: QApplication) -> None:
    widget = MAKERS[name]()
    qtbot.addWidget(widget)
    widget.resize(320, 260)
    canvas = QPixmap(320, 260)
    flags = QWidget.RenderFlag.DrawWindowBackground | QWidget.RenderFlag.DrawChildren

    def paint(times: int) -> None:
        for _ in range(times):
            widget.render(canvas, QPoint(), QRegion(QRect(0, 0, 320, 260)), flags)

    paint(5)  # caches fill
    gc.collect()
    before = sys.getrefcount(None)
    paint(PAINTS)
    gc.collect()
    drift = sys.getrefcount(None) - before
    assert abs(drift) < PAINTS // 4, f"None's count moved by {drift} over {PAINTS} paints"


def test_a_theme_change_repaints_without_old_colours(dark: Theme, qtbot: QtBot) -> None:
    from PySide6.QtCore import Qt

    button = Button("Generate", "main")
    qtbot.addWidget(button)
    button.resize(200, 36)
    before = button.grab().toImage().pixelColor(20, 18)
    dark.follow(Qt.ColorScheme.Light)
    assert button.grab().toImage().pixelColor(20, 18) != before
