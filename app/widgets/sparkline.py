"""The last two minutes of memory, small."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QPointF, QRectF, QSize, Qt
from PySide6.QtGui import QPaintEvent, QPen, QPolygonF
from PySide6.QtWidgets import QWidget

from app import theme
from app.widgets import paint


class Sparkline(QWidget):
    """104 x 16. Values are shares of the whole, 0..1; the newest is at the right edge."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._used: Sequence[float] = ()
        self._others: Sequence[float] = ()
        self._room = 240
        self.setFixedSize(104, 16)

    def sizeHint(self) -> QSize:  # noqa: N802  (Qt's name)
        return QSize(104, 16)

    def set_values(self, others: Sequence[float], used: Sequence[float], room: int) -> None:
        """others and used (others and Tonfa together), oldest first; `room` samples fill the width."""
        self._others, self._used, self._room = others, used, max(2, room)
        self.update()

    def _points(self, values: Sequence[float]) -> list[QPointF]:
        step = self.width() / (self._room - 1)
        start = self.width() - step * (len(values) - 1)
        return [
            QPointF(start + i * step, 1 + (self.height() - 2) * (1 - min(1, max(0, v))))
            for i, v in enumerate(values)
        ]

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        ground = theme.color("surface" if theme.scheme() == "dark" else "line")
        paint.ground(painter, self.rect(), 3, ground)
        for values, name in ((self._used, "mem-ours"), (self._others, "mem-others")):
            points = self._points(values)
            if len(points) < 2:
                continue
            floor = [QPointF(points[-1].x(), self.height()), QPointF(points[0].x(), self.height())]
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(theme.color(name, 0.4 if name == "mem-ours" else 0.9))
            painter.drawPolygon(QPolygonF([*points, *floor]))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.setPen(QPen(theme.color(name), 1.25))
            painter.drawPolyline(QPolygonF(points))
        painter.setPen(QPen(theme.color("line"), 1))
        painter.setBrush(Qt.BrushStyle.NoBrush)
        painter.drawRoundedRect(QRectF(self.rect()).adjusted(0.5, 0.5, -0.5, -0.5), 3, 3)
        painter.end()
