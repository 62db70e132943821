"""The picture in the middle: fitted, on neutral ground, progress under it, a caption below."""

from __future__ import annotations

from PySide6.QtCore import QMimeData, QPoint, QPointF, QRect, QRectF, QSize, Qt, QUrl, Signal
from PySide6.QtGui import (
    QColor,
    QDrag,
    QFontMetrics,
    QImage,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPixmap,
    QResizeEvent,
)
from PySide6.QtWidgets import QApplication, QLabel, QSizePolicy, QWidget

from app import theme
from app.widgets import paint

BELOW = 44  # progress and caption
SIDE = 24
ABOVE = 8


class PictureView(QWidget):
    """One widget that paints; the scaled pixmap is kept at device pixels for the current fit."""

    step_requested = Signal(int)  # -1 previous, +1 next picture

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._image: QImage | None = None
        self._scaled: QPixmap | None = None
        self._shape = (1, 1)
        self._tag = ""
        self._fraction: float | None = None
        self._stopped = False
        self._file = ""
        self._pressed_at: QPoint | None = None
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        self.setMinimumSize(QSize(160, 160))
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.left, self.right = QLabel(self), QLabel(self)
        for label in (self.left, self.right):
            label.setFont(theme.figures("body"))
            label.setProperty("tone", "text2")
            label.setTextFormat(Qt.TextFormat.PlainText)
        self.right.setAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
        self._captions = ("", "")

    # -- what is shown --

    def set_picture(self, image: QImage | None, shape: tuple[int, int], *, tag: str = "", file: str = "") -> None:
        """image: finished or a small preview; shape: (width, height) of the finished picture, which it is drawn in.

        Without an image the place of a picture that is only beginning is drawn.
        """
        relayout = shape != self._shape
        self._image, self._shape, self._tag, self._file = image, shape, tag, file
        self._scaled = None
        if relayout:
            self._place_caption()
        self.update()

    def set_progress(self, fraction: float | None) -> None:
        """0..1 while making, None when there is nothing to wait for."""
        if fraction != self._fraction:
            self._fraction = fraction
            self._place_caption()
            self.update()

    def set_caption(self, left: str, right: str, short: str = "") -> None:
        """short: what stands at the left where `left` has no room."""
        self._captions = (left, short or left)
        self.right.setText(right)
        self._place_caption()

    def set_description(self, prompt: str) -> None:
        """Pictures are named by their prompt."""
        self.setAccessibleName(prompt)

    def picture_rect(self) -> QRect:
        """Where the picture lies: as large as fits, never deformed."""
        room = QRectF(SIDE, ABOVE, self.width() - 2 * SIDE, self.height() - ABOVE - BELOW)
        if room.width() <= 0 or room.height() <= 0:
            return QRect()
        scale = min(room.width() / self._shape[0], room.height() / self._shape[1])
        size = QSize(max(1, round(self._shape[0] * scale)), max(1, round(self._shape[1] * scale)))
        left = room.left() + (room.width() - size.width()) / 2
        top = room.top() + (room.height() - size.height()) / 2
        return QRect(QPoint(round(left), round(top)), size)

    # -- places --

    def _place_caption(self) -> None:
        area = self.picture_rect()
        top = area.bottom() + (17 if self._fraction is not None else 13)
        left, width = area.left(), area.width()
        if width < 320:  # a narrow picture: its words may be wider than itself
            left, width = SIDE, self.width() - 2 * SIDE
        right = min(width, self.right.sizeHint().width())
        self.right.setGeometry(left + width - right, top, right, 22)
        room = max(0, width - right - 12)
        long, short = self._captions
        metrics = QFontMetrics(self.left.font())
        words = long if metrics.horizontalAdvance(long) <= room else short
        self.left.setText(metrics.elidedText(words, Qt.TextElideMode.ElideRight, room))
        self.left.setGeometry(left, top, room, 22)

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802  (Qt's name)
        self._scaled = None
        self._place_caption()

    # -- hands --

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802
        steps = {Qt.Key.Key_Left: -1, Qt.Key.Key_Right: 1}
        if event.key() in steps and not event.modifiers():
            self.step_requested.emit(steps[Qt.Key(event.key())])
        else:
            super().keyPressEvent(event)

    def mousePressEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        self.setFocus(Qt.FocusReason.MouseFocusReason)
        inside = self.picture_rect().contains(event.position().toPoint())
        self._pressed_at = event.position().toPoint() if inside and self._file else None

    def mouseMoveEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        """Dragging the picture out gives its file, recipe included."""
        if self._pressed_at is None or self._image is None:
            return
        if (event.position().toPoint() - self._pressed_at).manhattanLength() < QApplication.startDragDistance():
            return
        self._pressed_at = None
        data = QMimeData()
        data.setUrls([QUrl.fromLocalFile(self._file)])
        drag = QDrag(self)
        drag.setMimeData(data)
        drag.setPixmap(QPixmap.fromImage(self._image.scaledToHeight(96)))
        drag.exec(Qt.DropAction.CopyAction)

    # -- face --

    def _pixmap(self, area: QRect) -> QPixmap | None:
        if self._image is None:
            return None
        if self._scaled is None:
            ratio = self.devicePixelRatioF()
            size = QSize(round(area.width() * ratio), round(area.height() * ratio))
            image = self._image
            while image.width() * 4 < size.width():  # doubling blurs a little each time: no grid in a tiny preview
                image = image.scaled(
                    image.size() * 2,
                    Qt.AspectRatioMode.IgnoreAspectRatio,
                    Qt.TransformationMode.SmoothTransformation,
                )
            scaled = image.scaled(
                size, Qt.AspectRatioMode.IgnoreAspectRatio, Qt.TransformationMode.SmoothTransformation
            )
            self._scaled = QPixmap.fromImage(scaled)
            self._scaled.setDevicePixelRatio(ratio)
        return self._scaled

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        area = self.picture_rect()
        if (pixmap := self._pixmap(area)) is not None:
            self._paint_shadow(painter, area)
            painter.drawPixmap(area.topLeft(), pixmap)
        else:
            paint.ground(painter, area, 3, theme.color("surface", 0.6))
        if self._tag:
            self._paint_tag(painter, area)
        if self._fraction is not None:
            track = QRectF(area.left(), area.bottom() + 9, area.width(), 4)
            paint.ground(painter, track, 2, theme.color("line"))
            track.setWidth(track.width() * min(1.0, max(0.0, self._fraction)))
            paint.ground(painter, track, 2, theme.color("accent"))
        painter.end()

    def _paint_shadow(self, painter: QPainter, area: QRect) -> None:
        painter.setPen(Qt.PenStyle.NoPen)
        for reach, alpha in ((6, 8), (4, 12), (2, 18), (1, 24)):
            painter.setBrush(QColor(0, 0, 0, alpha))
            painter.drawRoundedRect(area.adjusted(-reach, -reach + 2, reach, reach + 2), 3 + reach, 3 + reach)

    def _paint_tag(self, painter: QPainter, area: QRect) -> None:
        font = theme.font("small", 600)
        width = QFontMetrics(font).horizontalAdvance(self._tag) + 42
        pill = QRectF(area.left() + 12, area.top() + 12, width, 26)
        paint.ground(painter, pill, 13, theme.color("scrim"))
        ink = theme.color("on-picture")
        paint.icon(painter, "eye", QPointF(pill.left() + 17, pill.center().y()), 14, ink)
        paint.text(painter, pill.adjusted(28, 0, -8, 0), self._tag, font, ink)
