"""The LoRAs of the next picture, in one card."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from PySide6.QtCore import Signal
from PySide6.QtGui import QPaintEvent
from PySide6.QtWidgets import QHBoxLayout, QLabel, QVBoxLayout, QWidget

from app import theme
from app.widgets import paint
from app.widgets.button import Button
from app.widgets.lora_row import Divider, LoraRow, LoraView
from app.widgets.menu import Menu

MOST_OFFERED = 30  # more than a menu can show; the file dialog finds the others


class _Card(QWidget):
    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802  (Qt's name)
        painter = paint.begin(self)
        paint.ground(painter, self.rect(), theme.RADIUS["card"], theme.color("surface"), theme.color("line"))
        painter.end()


class LoraList(QWidget):
    """Heading with +, then a row for each LoRA, or one line where there is none."""

    strength_chosen = Signal(str, float)  # file, strength
    switched = Signal(str, bool)
    remove_requested = Signal(str)
    move_requested = Signal(str, int)
    show_requested = Signal(str)
    known_chosen = Signal(str)  # file of a LoRA that the menu of + offered
    file_requested = Signal()  # choose one from disk

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._views: tuple[LoraView, ...] = ()
        self._known: list[tuple[str, str]] = []
        self._rows: list[LoraRow] = []
        title = QLabel("LoRAs")
        title.setFont(theme.font("label"))
        self.add = Button("", "quiet", "plus", height=28, icon_size=18, tip="Add a LoRA (Ctrl+Shift+L)")
        self.add.setFixedWidth(28)
        self.add.clicked.connect(self.open_add)
        head = QHBoxLayout()
        head.setContentsMargins(0, 0, 0, 0)
        head.setSpacing(10)
        head.addWidget(title)
        head.addWidget(self.add)
        head.addStretch()
        self._card = _Card()
        self._inside = QVBoxLayout(self._card)
        self._inside.setContentsMargins(0, 0, 0, 0)
        self._inside.setSpacing(0)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addLayout(head)
        layout.addWidget(self._card)
        self._rebuild(())

    def set_known(self, known: list[tuple[str, str]]) -> None:
        """(file, name) of LoRAs that + offers without a file dialog."""
        self._known = known

    def set_loras(self, views: Sequence[LoraView]) -> None:
        if [view.file for view in views] == [view.file for view in self._views]:
            for row, view in zip(self._rows, views, strict=True):
                row.set_view(view)
            self._views = tuple(views)
        else:
            self._rebuild(tuple(views))

    def rows(self) -> list[LoraRow]:
        return list(self._rows)

    def _rebuild(self, views: tuple[LoraView, ...]) -> None:
        while (item := self._inside.takeAt(0)) is not None:
            if (widget := item.widget()) is not None:
                widget.hide()
                widget.deleteLater()
        self._views, self._rows = views, []
        for index, view in enumerate(views):
            if index:
                self._inside.addWidget(Divider())
            row = LoraRow(view)
            row.strength_chosen.connect(self.strength_chosen)
            row.switched.connect(self.switched)
            row.remove_requested.connect(self.remove_requested)
            row.move_requested.connect(self.move_requested)
            row.show_requested.connect(self.show_requested)
            self._inside.addWidget(row)
            self._rows.append(row)
        if not views:
            empty = QLabel("Drop a LoRA here, or +")
            empty.setProperty("tone", "text3")
            empty.setFont(theme.font("small"))
            empty.setContentsMargins(12, 12, 12, 12)
            self._inside.addWidget(empty)

    def open_add(self) -> None:
        offered = [(file, name) for file, name in self._known if file not in [view.file for view in self._views]]
        if not offered:
            self.file_requested.emit()
            return
        menu = Menu(self)
        for file, name in offered[:MOST_OFFERED]:
            menu.addAction(name, partial(self.known_chosen.emit, file))
        menu.addSeparator()
        menu.addAction("Choose a file…", self.file_requested.emit)
        menu.exec(self.add.mapToGlobal(self.add.rect().bottomLeft()))
