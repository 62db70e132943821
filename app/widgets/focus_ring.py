"""The focus ring: 2 px with a 2 px gap, around whatever the keyboard reached."""

from __future__ import annotations

from PySide6.QtCore import QEvent, QObject, QPoint, QRect, QRectF, Qt
from PySide6.QtGui import QFocusEvent, QPaintEvent, QPen, QRegion
from PySide6.QtWidgets import QAbstractScrollArea, QApplication, QWidget

from app import theme
from app.widgets import paint

REACH = 4  # gap and ring
BY_KEYBOARD = (
    Qt.FocusReason.TabFocusReason,
    Qt.FocusReason.BacktabFocusReason,
    Qt.FocusReason.ShortcutFocusReason,
)
MOVES = (QEvent.Type.Move, QEvent.Type.Resize, QEvent.Type.Show, QEvent.Type.Hide)


class FocusRing(QWidget):
    """One for the whole window, lying over everything. Follows the focus when a key moved it; the mouse needs none.

    Not a QFocusFrame: that lies in the parent of what it frames and is cut off where the parent fits tightly.
    """

    def __init__(self, window: QWidget) -> None:
        super().__init__(window)
        self.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        self.setAttribute(Qt.WidgetAttribute.WA_NoSystemBackground)
        self.hide()
        self._window = window
        self._target: QWidget | None = None
        self._moves_with: list[QObject] = []  # the target and everything it lies in
        self._reason = Qt.FocusReason.OtherFocusReason
        app = QApplication.instance()
        assert isinstance(app, QApplication)
        app.installEventFilter(self)
        app.focusChanged.connect(self._follow)

    def target(self) -> QWidget | None:
        return self._target

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:  # noqa: N802  (Qt's name)
        kind = event.type()
        if kind == QEvent.Type.FocusIn and isinstance(event, QFocusEvent):
            self._reason = event.reason()
        elif kind in MOVES and watched in self._moves_with:
            self._place()
        return False

    def _follow(self, old: QWidget | None, now: QWidget | None) -> None:
        wants = now is not None and now.window() is self._window and self._reason in BY_KEYBOARD
        self._target = now if wants and now is not None and not now.property("own_focus_ring") else None
        self._moves_with = []
        at = self._target
        while at is not None and at is not self._window:
            self._moves_with.append(at)
            at = at.parentWidget()
        self._place()

    def _place(self) -> None:
        target = self._target
        if target is None or not target.isVisible():
            self.hide()
            return
        area = QRect(target.mapTo(self._window, QPoint()), target.size()).adjusted(-REACH, -REACH, REACH, REACH)
        self.setGeometry(area)
        seen = self._seen(target).intersected(area).translated(-area.topLeft())
        self.setMask(QRegion(seen))
        self.setVisible(not seen.isEmpty())
        self.raise_()

    def _seen(self, target: QWidget) -> QRect:
        """The part of the window that scrolling leaves for it, the ring's reach included."""
        seen = self._window.rect()
        at = target.parentWidget()
        while at is not None and at is not self._window:
            above = at.parentWidget()
            if isinstance(above, QAbstractScrollArea) and above.viewport() is at:
                port = QRect(at.mapTo(self._window, QPoint()), at.size())
                seen = seen.intersected(port.adjusted(-REACH, -REACH, REACH, REACH))
            at = above
        return seen

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        painter.setPen(QPen(theme.color("focus"), 2))
        radius = theme.RADIUS["field"] + REACH - 1
        painter.drawRoundedRect(QRectF(self.rect()).adjusted(1, 1, -1, -1), radius, radius)
        painter.end()
