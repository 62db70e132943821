"""The composer's footer: whether it fits and how long it takes, the memory bar, Generate and Stop."""

from __future__ import annotations

from PySide6.QtCore import QPointF, QRectF, QSize, Qt, Signal
from PySide6.QtGui import QFontMetrics, QPaintEvent
from PySide6.QtWidgets import QHBoxLayout, QSizePolicy, QVBoxLayout, QWidget

from app import theme
from app.widgets import paint
from app.widgets.button import Button, Kind
from app.widgets.memory_bar import MemoryBar

# fits of a prediction -> icon and ink of the sentence
FACES = {"fits": ("check", "text"), "tight": ("warning", "warn"), "moves": ("warning", "warn"),
         "too large": ("error", "danger"), "": ("", "text2")}  # fmt: skip


class PredictionLine(QWidget):
    """Icon, sentence, and at the right how much memory of how much."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._fits, self._words, self._amount = "", "", ""
        self.setFixedHeight(20)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)

    def sizeHint(self) -> QSize:  # noqa: N802  (Qt's name)
        return QSize(312, 20)

    def set_prediction(self, fits: str, words: str, amount: str) -> None:
        self._fits, self._words, self._amount = fits, words, amount
        self.setAccessibleName(f"{words}. {amount}" if amount else words)
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        icon, ink = FACES.get(self._fits, FACES[""])
        left = 0.0
        if icon:
            tint = theme.color("accent-text" if self._fits == "fits" else ink)
            paint.icon(painter, icon, QPointF(8, 10), 16, tint)
            left = 22.0
        font = theme.figures("body")
        room = QFontMetrics(font).horizontalAdvance(self._amount) + (8 if self._amount else 0)
        area = QRectF(left, 0, self.width() - left - room, 20)
        paint.text(painter, area, self._words, theme.font("label" if icon else "body"), theme.color(ink))
        right = QRectF(self.width() - room, 0, room - 2, 20)
        paint.text(painter, right, self._amount, font, theme.color("text2"), Qt.AlignmentFlag.AlignRight)
        painter.end()


class GenerateBar(QWidget):
    generate_requested = Signal()
    stop_requested = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.line = PredictionLine()
        self.bar = MemoryBar()
        self.generate = Button("Generate", "main", "generate", height=44, icon_size=18, hint="Ctrl ↵")
        font = theme.font("label")
        font.setPixelSize(15)
        self.generate.setFont(font)
        self.generate.setToolTip("Make the picture (Ctrl+Enter)")
        self.stop = Button("", "secondary", "stop", height=44, icon_size=18, tip="Stop this one (Ctrl+.)")
        self.stop.setFixedWidth(44)
        self.stop.hide()
        buttons = QHBoxLayout()
        buttons.setContentsMargins(0, 4, 0, 0)
        buttons.setSpacing(8)
        buttons.addWidget(self.generate, 1)
        buttons.addWidget(self.stop)
        self._layout = layout = QVBoxLayout(self)
        layout.setContentsMargins(16, 12, 16, 16)
        layout.setSpacing(8)
        layout.addWidget(self.line)
        layout.addWidget(self.bar)
        layout.addLayout(buttons)
        self.generate.clicked.connect(self.generate_requested)
        self.stop.clicked.connect(self.stop_requested)

    def set_button(self, words: str, icon: str, main: bool) -> None:
        """main is False while an error strip holds the accent."""
        kind: Kind = "main" if main else "secondary"
        self.generate.set_kind(kind)
        self.generate.set_face(words, icon)

    def set_stoppable(self, stoppable: bool) -> None:
        self.stop.setVisible(stoppable)

    def set_margin(self, margin: int) -> None:
        """The pixel at the right is the line between composer and stage."""
        self._layout.setContentsMargins(margin, 12, margin - 1, margin)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        painter.fillRect(0, 0, self.width(), 1, theme.color("line"))
        painter.end()
