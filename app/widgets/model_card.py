"""Which model, and how it is: cover, name, words about its state, a thin bar while it loads."""

from __future__ import annotations

from PySide6.QtCore import QPointF, QRectF, QSize, Qt, Signal
from PySide6.QtGui import QImage, QPainter, QPaintEvent, QPixmap
from PySide6.QtWidgets import QAbstractButton, QSizePolicy, QWidget

from app import theme
from app.widgets import paint
from app.widgets.menu import Menu

HEIGHT = 56


def paint_cover(painter: QPainter, area: QRectF, cover: QPixmap | None, icon: str, quiet: bool = False) -> None:
    """A cover picture, or the drawing of what it is where there is none."""
    radius = 8.0 if area.width() > 32 else 6.0
    if cover is not None:
        painter.setOpacity(0.5 if quiet else 1.0)
        paint.rounded_pixmap(painter, area, cover, radius)
        painter.setOpacity(1.0)
        return
    paint.ground(painter, area, radius, theme.color("accent-soft"))
    paint.icon(painter, icon, area.center(), 18, theme.color("text3" if quiet else "accent-text"))


class ModelCard(QAbstractButton):
    """A button where there is something to choose from, a plain card where there is one model."""

    model_chosen = Signal(str)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._name, self._words = "", ""
        self._cover: QPixmap | None = None
        self._fraction: float | None = None
        self._choices: list[tuple[str, str, str]] = []
        self.setFixedHeight(HEIGHT)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setAttribute(Qt.WidgetAttribute.WA_Hover)
        self.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.clicked.connect(self._open)

    def sizeHint(self) -> QSize:  # noqa: N802  (Qt's name)
        return QSize(312, HEIGHT)

    def set_model(self, name: str, cover: QImage | None) -> None:
        self._name = name
        self._cover = None if cover is None else QPixmap.fromImage(cover)
        self._describe()

    def set_state(self, words: str, fraction: float | None) -> None:
        """words: what it is doing or where it is; fraction 0..1 while it loads, else None."""
        self._words, self._fraction = words, fraction
        self._describe()

    def set_choices(self, choices: list[tuple[str, str, str]]) -> None:
        """(model, name, reason why not): what can be chosen; one with a reason is shown with it and cannot be."""
        self._choices = choices
        several = len(choices) > 1
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus if several else Qt.FocusPolicy.NoFocus)
        self.setCursor(Qt.CursorShape.PointingHandCursor if several else Qt.CursorShape.ArrowCursor)
        self.update()

    def _describe(self) -> None:
        self.setAccessibleName(f"Model: {self._name}")
        self.setAccessibleDescription(self._words)
        self.update()

    def _open(self) -> None:
        if len(self._choices) < 2:
            return
        menu = Menu(self)
        for model, name, reason in self._choices:
            action = menu.addAction(f"{name}: {reason}" if reason else name)
            action.setEnabled(not reason)
            action.setCheckable(True)
            action.setChecked(name == self._name)
            action.triggered.connect(lambda checked=False, model=model: self.model_chosen.emit(model))
        menu.exec(self.mapToGlobal(self.rect().bottomLeft()))

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        several = len(self._choices) > 1
        line = "control" if several and self.underMouse() else "line"
        paint.ground(painter, self.rect(), theme.RADIUS["card"], theme.color("surface"), theme.color(line))
        paint_cover(painter, QRectF(10, 10, 36, 36), self._cover, "models")
        right = self.width() - (40 if several else 14)
        paint.text(painter, QRectF(58, 9, right - 58, 20), self._name, theme.font("label"), theme.color("text"))
        low = 26 if self._fraction is not None else 28
        paint.text(painter, QRectF(58, low, right - 58, 17), self._words, theme.font("small"), theme.color("text2"))
        if self._fraction is not None:
            track = QRectF(58, 45, right - 58, 3)
            paint.ground(painter, track, 1.5, theme.color("line"))
            track.setWidth(track.width() * min(1.0, max(0.02, self._fraction)))
            paint.ground(painter, track, 1.5, theme.color("accent"))
        if several:
            paint.icon(painter, "chevron-down", QPointF(self.width() - 22, HEIGHT / 2), 18, "text2")
        painter.end()
