"""On and off: a checkbox with another face. Position and fill both change."""

from __future__ import annotations

from PySide6.QtCore import QPoint, QPointF, QRectF, QSize, Qt
from PySide6.QtGui import QPaintEvent, QPen
from PySide6.QtWidgets import QCheckBox, QWidget

from app import theme
from app.widgets import paint

WIDTH, HEIGHT = 34, 20


class Switch(QCheckBox):
    """34 x 20, 28 high to hit."""

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setAccessibleName(name)
        self.setFixedSize(WIDTH, 28)
        self.setCursor(Qt.CursorShape.PointingHandCursor)

    def sizeHint(self) -> QSize:  # noqa: N802  (Qt's name)
        return QSize(WIDTH, 28)

    def hitButton(self, pos: QPoint) -> bool:  # noqa: N802
        return self.rect().contains(pos)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        track = QRectF(0, (self.height() - HEIGHT) / 2, WIDTH, HEIGHT)
        middle = track.center().y()
        if self.isChecked():
            paint.ground(painter, track, HEIGHT / 2, theme.color("accent"))
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(theme.color("on-accent"))
            painter.drawEllipse(QPointF(track.right() - HEIGHT / 2, middle), 7, 7)
        else:
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.setPen(QPen(theme.color("control"), 1.5))
            painter.drawRoundedRect(track.adjusted(0.75, 0.75, -0.75, -0.75), 9.25, 9.25)
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(theme.color("control"))
            painter.drawEllipse(QPointF(track.left() + HEIGHT / 2, middle), 6, 6)
        painter.end()
