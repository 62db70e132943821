"""The rail: the pages that exist, icon over label."""

from __future__ import annotations

from PySide6.QtCore import QPointF, QRectF, QSize, Qt, Signal
from PySide6.QtGui import QPaintEvent
from PySide6.QtWidgets import QAbstractButton, QButtonGroup, QVBoxLayout, QWidget

from app import theme
from app.widgets import paint


class RailItem(QAbstractButton):
    def __init__(self, words: str, icon: str, tip: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setText(words)
        self._icon = icon
        self.setCheckable(True)
        self.setToolTip(tip)
        self.setAccessibleName(words)
        self.setFixedSize(64, 56)
        self.setFocusPolicy(Qt.FocusPolicy.TabFocus)
        self.setAttribute(Qt.WidgetAttribute.WA_Hover)

    def sizeHint(self) -> QSize:  # noqa: N802  (Qt's name)
        return QSize(64, 56)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        if self.isChecked():
            paint.ground(painter, self.rect(), theme.RADIUS["card"], theme.color("accent-soft"))
        elif self.underMouse():
            paint.ground(painter, self.rect(), theme.RADIUS["card"], theme.color("hover"))
        tint = theme.color("accent-text" if self.isChecked() else "text2")
        paint.icon(painter, self._icon, QPointF(self.width() / 2, 20), theme.TOKENS["icon"]["rail"], tint)
        font = theme.font("caption", 600)
        area = QRectF(0, 34, self.width(), 16)
        ink = theme.color("text" if self.isChecked() else "text2")
        paint.text(painter, area, self.text(), font, ink, Qt.AlignmentFlag.AlignHCenter)
        painter.end()


class Rail(QWidget):
    """72 wide. Only pages that exist have an item."""

    page_requested = Signal(int)

    def __init__(self, pages: list[tuple[str, str]], parent: QWidget | None = None) -> None:
        """pages: (label, icon) from top to bottom."""
        super().__init__(parent)
        self.setFixedWidth(theme.LAYOUT["rail"])
        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 60, 3, 12)
        layout.setSpacing(4)
        group = QButtonGroup(self)
        for index, (words, icon) in enumerate(pages):
            item = RailItem(words, icon, f"{words} (Ctrl+{index + 1})")
            group.addButton(item, index)
            layout.addWidget(item)
        layout.addStretch()
        group.button(0).setChecked(True)
        group.idClicked.connect(self.page_requested)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        painter.fillRect(self.rect(), theme.color("rail"))
        painter.fillRect(self.width() - 1, 0, 1, self.height(), theme.color("line"))
        paint.icon(painter, "app-icon", QPointF(self.width() / 2, 30), 32, "text")
        painter.end()
