"""The seed and what becomes of it: another one each time, the same, or one up."""

from __future__ import annotations

from PySide6.QtCore import Signal
from PySide6.QtGui import QContextMenuEvent, QResizeEvent
from PySide6.QtWidgets import QWidget

from app.widgets.button import Button
from app.widgets.menu import Menu
from app.widgets.number_field import NumberField
from engine.requests import MAX_SEED

# mode -> (icon, words)
MODES = {
    "random": ("dice", "New seed for every picture"),
    "keep": ("lock", "Keep this seed"),
    "one up": ("plus", "One up for every picture"),
}


class SeedField(NumberField):
    """A number field with a mode button inside: click goes to the next mode, the menu lists them."""

    mode_chosen = Signal(str)  # "random" | "keep" | "one up"

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("Seed", 0, MAX_SEED, grouped=True, parent=parent)
        self._mode = "random"
        self.button = Button("", "quiet", "dice", height=28, icon_size=16, name="Seed mode", parent=self)
        self.button.setFixedWidth(28)
        self.button.clicked.connect(self._next)
        self.reserve_right(28)
        self.set_mode("random")

    def set_mode(self, mode: str) -> None:
        self._mode = mode
        icon, words = MODES[mode]
        self.button.set_face("", icon)
        self.button.setToolTip(f"{words}. Click to change. New seed: Ctrl+R")
        self.button.setAccessibleName(f"Seed mode: {words}")

    def _next(self) -> None:
        modes = list(MODES)
        self.mode_chosen.emit(modes[(modes.index(self._mode) + 1) % len(modes)])

    def contextMenuEvent(self, event: QContextMenuEvent) -> None:  # noqa: N802  (Qt's name)
        menu = Menu(self)
        for mode, (_, words) in MODES.items():
            action = menu.addAction(words)
            action.setCheckable(True)
            action.setChecked(mode == self._mode)
            action.triggered.connect(lambda checked=False, mode=mode: self.mode_chosen.emit(mode))
        menu.exec(event.globalPos())

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802
        super().resizeEvent(event)
        if hasattr(self, "button"):
            self.button.move(self.width() - 32, 4)
