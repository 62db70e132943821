"""What several painted widgets share: rounded grounds, icons in a rectangle, elided text."""

from __future__ import annotations

from PySide6.QtCore import QPointF, QRect, QRectF, Qt
from PySide6.QtGui import QColor, QFont, QFontMetricsF, QPainter, QPainterPath, QPen, QPixmap
from PySide6.QtWidgets import QWidget

from app import theme


def begin(widget: QWidget) -> QPainter:
    painter = QPainter(widget)
    painter.setRenderHints(QPainter.RenderHint.Antialiasing | QPainter.RenderHint.SmoothPixmapTransform)
    return painter


def ground(painter: QPainter, rect: QRect | QRectF, radius: float, fill: QColor, line: QColor | None = None,
           width: float = 1.0) -> None:  # fmt: skip
    """A rounded ground; the line lies inside the rectangle, so that it stays one crisp pixel."""
    area = QRectF(rect)
    if line is not None:
        half = width / 2
        area.adjust(half, half, -half, -half)
        radius = max(0.0, radius - half)
    painter.setPen(Qt.PenStyle.NoPen if line is None else QPen(line, width))
    painter.setBrush(fill)
    painter.drawRoundedRect(area, radius, radius)


def field(painter: QPainter, rect: QRect, hovered: bool = False, on_card: bool = False) -> None:
    """The ground of a field or a select."""
    fill = theme.color("raised" if on_card else "surface")
    if on_card and theme.scheme() == "light":
        fill = theme.color("window")
    ground(painter, rect, theme.RADIUS["field"], fill, theme.color("control" if hovered else "line"))


def icon(painter: QPainter, name: str, center: QPointF, size: int, tint: QColor | str) -> None:
    ratio = painter.device().devicePixelRatioF()
    pixmap = theme.icon(name, size, tint, ratio)
    painter.drawPixmap(QPointF(round(center.x() - size / 2), round(center.y() - size / 2)), pixmap)


def text(painter: QPainter, rect: QRect | QRectF, words: str, font: QFont, tint: QColor,
         align: Qt.AlignmentFlag = Qt.AlignmentFlag.AlignLeft) -> None:  # fmt: skip
    """One line in a rectangle, vertically centred, elided at the end when it does not fit."""
    area = QRectF(rect)
    painter.setFont(font)
    painter.setPen(tint)
    shown = QFontMetricsF(font).elidedText(words, Qt.TextElideMode.ElideRight, area.width() + 0.5)
    painter.drawText(area, int(align | Qt.AlignmentFlag.AlignVCenter), shown)


def rounded_pixmap(painter: QPainter, rect: QRect | QRectF, pixmap: QPixmap, radius: float) -> None:
    path = QPainterPath()
    path.addRoundedRect(QRectF(rect), radius, radius)
    painter.save()
    painter.setClipPath(path)
    painter.drawPixmap(QRectF(rect), pixmap, QRectF(pixmap.rect()))
    painter.restore()
