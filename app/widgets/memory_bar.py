"""Memory as one bar: others, Tonfa, what the next picture adds (hatched), free."""

from __future__ import annotations

from PySide6.QtCore import QPointF, QRectF, QSize, Qt
from PySide6.QtGui import QPainter, QPainterPath, QPaintEvent, QPen
from PySide6.QtWidgets import QSizePolicy, QWidget

from app import theme
from app.widgets import paint

HEIGHT = 8
GIB = 2**30


class MemoryBar(QWidget):
    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._others = self._ours = self._adds = 0
        self._total = 0
        self.setFixedHeight(HEIGHT)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setAccessibleName("Memory")

    def sizeHint(self) -> QSize:  # noqa: N802  (Qt's name)
        return QSize(312, HEIGHT)

    def set_bytes(self, others: int, ours: int, adds: int, total: int) -> None:
        self._others, self._ours, self._adds, self._total = others, ours, adds, total
        words = (
            f"{others / GIB:.1f} GB other programs, {ours / GIB:.1f} GB Tonfa, "
            f"{adds / GIB:.1f} GB more for this picture, of {total / GIB:.1f} GB"
        )
        self.setAccessibleDescription(words)
        self.setToolTip(words)
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        shape = QPainterPath()
        shape.addRoundedRect(QRectF(self.rect()), HEIGHT / 2, HEIGHT / 2)
        painter.setClipPath(shape)
        painter.fillRect(self.rect(), theme.color("hover" if theme.scheme() == "dark" else "line"))
        if self._total > 0:
            over = self._others + self._ours + self._adds > self._total
            left = 0.0
            for amount, name in ((self._others, "mem-others"), (self._ours, "mem-ours"), (self._adds, "")):
                width = self.width() * amount / self._total
                if width <= 0:
                    continue
                area = QRectF(left, 0, min(width, self.width() - left), HEIGHT)
                if name:
                    painter.fillRect(area, theme.color(name))
                else:
                    self._hatch(painter, area, "danger" if over else "mem-ours")
                left += width
                painter.fillRect(QRectF(left - 0.75, 0, 1.5, HEIGHT), theme.color("window"))
        painter.end()

    def _hatch(self, painter: QPainter, area: QRectF, name: str) -> None:
        painter.save()
        painter.setClipRect(area, Qt.ClipOperation.IntersectClip)
        painter.fillRect(area, theme.color(name, 0.25))
        painter.setPen(QPen(theme.color(name), 2))
        x = area.left() - HEIGHT
        while x < area.right() + HEIGHT:
            painter.drawLine(QPointF(x, HEIGHT + 1), QPointF(x + HEIGHT + 2, -1))
            x += 6
        painter.restore()
