"""The status bar: the state in words, and live memory. Never hidden."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QPointF, QRectF, Qt
from PySide6.QtGui import QPaintEvent
from PySide6.QtWidgets import QHBoxLayout, QLabel, QSizePolicy, QWidget

from app import theme
from app.widgets import paint
from app.widgets.sparkline import Sparkline


class StatusBar(QWidget):
    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._tone = "accent"
        self.setFixedHeight(theme.LAYOUT["status"])
        self.state, self.second = QLabel(), QLabel()
        self.sparkline = Sparkline()
        self.memory, self.load, self.heat = QLabel(), QLabel(), QLabel()
        font, strong, medium = theme.figures("small"), theme.figures("small", 600), theme.figures("small", 500)
        for label, of, tone in (
            (self.state, strong, ""),
            (self.second, font, "text2"),
            (self.memory, medium, ""),
            (self.load, font, "text2"),
            (self.heat, font, "text2"),
        ):
            label.setFont(of)
            label.setTextFormat(Qt.TextFormat.PlainText)
            if tone:
                label.setProperty("tone", tone)
        self.second.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.state.setAccessibleName("State")
        layout = QHBoxLayout(self)
        layout.setContentsMargins(32, 1, 16, 0)
        layout.setSpacing(12)
        layout.addWidget(self.state)
        layout.addWidget(self.second, 1)
        layout.addWidget(self.sparkline)
        layout.addWidget(self.memory)
        layout.addWidget(self.load)
        layout.addWidget(self.heat)

    def set_state(self, words: str, second: str, tone: str) -> None:
        """tone: the token of the dot, "accent" or "danger"."""
        self._tone = tone
        self.state.setText(words)
        self.state.setAccessibleDescription(f"{words}. {second}")
        self.second.setText(second)
        self.update()

    def set_memory(self, words: str, load: str, heat: str) -> None:
        self.memory.setText(words)
        self.load.setText(load)
        self.heat.setText(heat)
        self.load.setVisible(bool(load))
        self.heat.setVisible(bool(heat))

    def set_history(self, others: Sequence[float], used: Sequence[float], room: int) -> None:
        self.sparkline.set_values(others, used, room)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802  (Qt's name)
        painter = paint.begin(self)
        painter.fillRect(self.rect(), theme.color("rail"))
        painter.fillRect(QRectF(0, 0, self.width(), 1), theme.color("line"))
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(theme.color(self._tone))
        painter.drawEllipse(QPointF(20, self.height() / 2 + 0.5), 4, 4)
        painter.end()
