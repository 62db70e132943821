"""Button: main, secondary, soft, quiet, link and icon-only faces of one QPushButton."""

from __future__ import annotations

from typing import Literal

from PySide6.QtCore import QPointF, QRectF, QSize, Qt
from PySide6.QtGui import QColor, QFontMetrics, QPainter, QPaintEvent
from PySide6.QtWidgets import QPushButton, QSizePolicy, QWidget

from app import theme
from app.widgets import paint

Kind = Literal["main", "secondary", "soft", "quiet", "link"]
ICON_GAP = 8


class Button(QPushButton):
    """Paints itself from the tokens. Icon left, a hint (its shortcut) at the right if there is room."""

    def __init__(
        self,
        words: str = "",
        kind: Kind = "secondary",
        icon: str = "",
        *,
        height: int = 36,
        icon_size: int = 16,
        hint: str = "",
        name: str = "",
        tip: str = "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(words, parent)
        self._kind, self._icon, self._icon_size, self._hint = kind, icon, icon_size, hint
        self.setFont(theme.font("label"))
        self.setFixedHeight(height)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)
        self.setAttribute(Qt.WidgetAttribute.WA_Hover)
        self.setAutoDefault(False)
        if name or not words:
            self.setAccessibleName(name or tip)
        if tip:
            self.setToolTip(tip)

    def set_kind(self, kind: Kind) -> None:
        self._kind = kind
        self.update()

    def set_face(self, words: str, icon: str) -> None:
        """New words and icon, for a button that says the truth about what it does now."""
        self._icon = icon
        self.setText(words)
        self.updateGeometry()
        self.update()

    def icon_name(self) -> str:
        return self._icon

    def sizeHint(self) -> QSize:  # noqa: N802  (Qt's name)
        height = self.height() if self.minimumHeight() == self.maximumHeight() else 36
        if not self.text():
            return QSize(max(height, 28), height)
        width = QFontMetrics(self.font()).horizontalAdvance(self.text())
        if self._icon:
            width += self._icon_size + ICON_GAP
        return QSize(width + (4 if self._kind == "link" else 28 if height > 28 else 20), height)

    def minimumSizeHint(self) -> QSize:  # noqa: N802
        return QSize(28, self.sizeHint().height())

    def _ink(self) -> QColor:
        if not self.isEnabled():
            return theme.color("text3")
        match self._kind:
            case "main":
                return theme.color("on-accent")
            case "link":
                return theme.color("accent-text")
            case "quiet" | "soft":
                return theme.color("text" if self.underMouse() else "text2")
            case _:
                return theme.color("text")

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        hovered, pressed = self.underMouse() and self.isEnabled(), self.isDown()
        radius = theme.RADIUS["field"] + (2 if self.height() >= 44 else 0)
        match self._kind:
            case "main":
                fill = "accent-press" if pressed else "accent-hover" if hovered else "accent"
                paint.ground(painter, self.rect(), radius, theme.color(fill if self.isEnabled() else "line"))
            case "secondary":
                fill = "hover" if pressed or hovered else "surface"
                paint.ground(painter, self.rect(), radius, theme.color(fill), theme.color("line"))
            case "soft":
                rest = "raised" if theme.scheme() == "dark" else "hover"
                fill = "accent-soft" if self.isChecked() else "hover" if hovered else rest
                paint.ground(painter, self.rect(), radius, theme.color(fill))
            case "quiet" if hovered or pressed or self.isChecked():
                paint.ground(painter, self.rect(), radius, theme.color("hover"))
        self._paint_words(painter)
        painter.end()

    def _paint_words(self, painter: QPainter) -> None:
        ink = self._ink()
        metrics = QFontMetrics(self.font())
        words = metrics.horizontalAdvance(self.text())
        icon = self._icon_size if self._icon else 0
        gap = ICON_GAP if icon and words else 0
        hint_font = theme.font("small")
        hint = QFontMetrics(hint_font).horizontalAdvance(self._hint) if self._hint else 0
        room = self.width() - 16
        total = min(room, icon + gap + words)
        left = (self.width() - total) / 2
        if hint and left + total + 12 + hint + 16 > self.width():
            hint = 0
        middle = self.height() / 2
        if icon:
            paint.icon(painter, self._icon, QPointF(left + icon / 2, middle), icon, ink)
        if words:
            area = QRectF(left + icon + gap, 0, total - icon - gap, self.height())
            paint.text(painter, area, self.text(), self.font(), ink)
        if hint:
            faint = QColor(ink)
            faint.setAlphaF(0.8)
            area = QRectF(self.width() - hint - 16, 0, hint + 2, self.height())
            paint.text(painter, area, self._hint, hint_font, faint)
