"""A menu with the corners of a popover."""

from __future__ import annotations

from PySide6.QtCore import QRectF, Qt
from PySide6.QtGui import QGuiApplication, QPainterPath, QRegion, QResizeEvent
from PySide6.QtWidgets import QMenu, QWidget

from app import theme


class Menu(QMenu):
    """Round corners by transparency where there surely is a compositor, else by a mask."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._masked = QGuiApplication.platformName() == "xcb"
        if not self._masked:
            self.setWindowFlag(Qt.WindowType.FramelessWindowHint)
            self.setAttribute(Qt.WidgetAttribute.WA_TranslucentBackground)

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802  (Qt's name)
        super().resizeEvent(event)
        if self._masked:
            path = QPainterPath()
            path.addRoundedRect(QRectF(self.rect()), theme.RADIUS["field"], theme.RADIUS["field"])
            self.setMask(QRegion(path.toFillPolygon().toPolygon()))
