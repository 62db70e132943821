"""The focus ring: 2 px with a 2 px gap, around whatever the keyboard reached."""

from __future__ import annotations

from PySide6.QtCore import QEvent, QObject, QRectF, Qt
from PySide6.QtGui import QFocusEvent, QPaintEvent, QPen
from PySide6.QtWidgets import QApplication, QFocusFrame, QProxyStyle, QStyle, QStyleOption, QWidget

from app import theme
from app.widgets import paint

REACH = 4  # gap and ring
BY_KEYBOARD = (
    Qt.FocusReason.TabFocusReason,
    Qt.FocusReason.BacktabFocusReason,
    Qt.FocusReason.ShortcutFocusReason,
)


class _Margins(QProxyStyle):
    """Makes a QFocusFrame reach beyond the widget; a style sheet's outline cannot leave its rectangle."""

    def pixelMetric(  # noqa: N802  (Qt's name)
        self, metric: QStyle.PixelMetric, option: QStyleOption | None = None, widget: QWidget | None = None
    ) -> int:
        if metric in (QStyle.PixelMetric.PM_FocusFrameHMargin, QStyle.PixelMetric.PM_FocusFrameVMargin):
            return REACH
        return super().pixelMetric(metric, option, widget)


class FocusRing(QFocusFrame):
    """One for the whole window. Follows the focus when a key moved it; the mouse needs no ring."""

    def __init__(self, app: QApplication) -> None:
        super().__init__()
        self._margins = _Margins("Fusion")
        self._margins.setParent(self)
        self.setStyle(self._margins)
        self._reason = Qt.FocusReason.OtherFocusReason
        app.installEventFilter(self)
        app.focusChanged.connect(self._follow)

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:  # noqa: N802
        if event.type() == QEvent.Type.FocusIn and isinstance(event, QFocusEvent):
            self._reason = event.reason()
        return super().eventFilter(watched, event)

    def _follow(self, old: QWidget | None, now: QWidget | None) -> None:
        wants = now is not None and self._reason in BY_KEYBOARD and not now.property("own_focus_ring")
        target = now if wants else None
        if target is not None and isinstance(target.focusProxy(), QWidget):
            target = target.focusProxy()
        if target is not self.widget():
            self.setWidget(target)  # type: ignore[arg-type]  # None takes the ring away

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        painter.setPen(QPen(theme.color("focus"), 2))
        radius = theme.RADIUS["field"] + REACH - 1
        painter.drawRoundedRect(QRectF(self.rect()).adjusted(1, 1, -1, -1), radius, radius)
        painter.end()
