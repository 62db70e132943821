"""Width and height: presets with their shape drawn, and a button that swaps the sides."""

from __future__ import annotations

from functools import partial

from PySide6.QtCore import QPoint, QPointF, QRectF, QSize, Qt, Signal
from PySide6.QtGui import QIcon, QKeyEvent, QMouseEvent, QPainter, QPaintEvent, QPen, QPixmap, QWheelEvent
from PySide6.QtWidgets import QComboBox, QHBoxLayout, QSizePolicy, QWidget

from app import theme
from app.widgets import paint
from app.widgets.button import Button
from app.widgets.menu import Menu


def paint_shape(painter: QPainter, center: QPointF, width: int, height: int, longest: float = 17) -> None:
    """The outline of a picture of width x height, its longer side `longest` pixels."""
    scale = longest / max(width, height, 1)
    area = QRectF(0, 0, max(6.0, width * scale), max(6.0, height * scale))
    area.moveCenter(center)
    painter.setBrush(Qt.BrushStyle.NoBrush)
    painter.setPen(QPen(theme.color("text2"), 1.75))
    painter.drawRoundedRect(area, 2.5, 2.5)


def words_for(name: str, width: int, height: int) -> str:
    return f"{name}  {width} × {height}".strip()


class SizeSelect(QComboBox):
    """A combo box with another face."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._choosable = True
        self.setAccessibleName("Picture size")
        self.setFixedHeight(36)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setMinimumWidth(120)
        self.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.setFont(theme.figures("label"))
        self.setIconSize(QSize(20, 20))
        self.setAttribute(Qt.WidgetAttribute.WA_Hover)

    def set_choosable(self, choosable: bool) -> None:
        """One size alone is told, not offered."""
        self._choosable = choosable
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus if choosable else Qt.FocusPolicy.NoFocus)
        self.setToolTip("" if choosable else "This model makes pictures of this size only")
        self.update()

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802  (Qt's name)
        if self._choosable:
            super().keyPressEvent(event)

    def mousePressEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        if self._choosable:
            super().mousePressEvent(event)

    def showPopup(self) -> None:  # noqa: N802
        """A menu under the field instead of a list over it."""
        menu = Menu(self)
        menu.setMinimumWidth(self.width())
        for row in range(self.count()):
            action = menu.addAction(self.itemIcon(row), self.itemText(row), partial(self._take, row))
            action.setIconVisibleInMenu(True)
            if row == self.currentIndex():
                menu.setActiveAction(action)
        menu.exec(self.mapToGlobal(QPoint(0, self.height() + 4)))

    def _take(self, row: int) -> None:
        self.setCurrentIndex(row)
        self.activated.emit(row)

    def wheelEvent(self, event: QWheelEvent) -> None:  # noqa: N802
        if self.hasFocus() and self._choosable:
            super().wheelEvent(event)
        else:
            event.ignore()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        paint.field(painter, self.rect(), self._choosable and self.underMouse())
        size = self.currentData()
        middle = self.height() / 2
        if size is not None:
            paint_shape(painter, QPointF(20, middle), *size)
        area = QRectF(39, 0, self.width() - 39 - 34, self.height())
        paint.text(painter, area, self.currentText(), self.font(), theme.color("text"))
        if self._choosable:
            paint.icon(painter, "chevron-down", QPointF(self.width() - 18, middle), 16, "text2")
        painter.end()


class SizePicker(QWidget):
    size_chosen = Signal(int, int)  # width, height in pixels

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._presets: list[tuple[str, int, int]] = []
        self._size = (0, 0)
        self.select = SizeSelect()
        self._swap = Button("", "secondary", "swap", icon_size=18, tip="Swap width and height")
        self._swap.setFixedSize(36, 36)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(8)
        layout.addWidget(self.select)
        layout.addWidget(self._swap)
        self.select.activated.connect(self._choose)
        self._swap.clicked.connect(lambda: self.size_chosen.emit(self._size[1], self._size[0]))

    def set_presets(self, presets: list[tuple[str, int, int]]) -> None:
        """(name, width, height) as the model offers them."""
        self._presets = presets
        self.set_size(*self._size)

    def set_choosable(self, choosable: bool) -> None:
        """False where the model takes one size alone: then there is nothing to swap either."""
        self.select.set_choosable(choosable)
        self._swap.setVisible(choosable)

    def set_size(self, width: int, height: int) -> None:
        self._size = (width, height)
        self.select.clear()
        rows = list(self._presets)
        if width and (width, height) not in [(w, h) for _, w, h in rows]:
            rows.append((self._name_of(width, height), width, height))
        for name, w, h in rows:
            self.select.addItem(self._icon(w, h), words_for(name, w, h), (w, h))
        if width:
            self.select.setCurrentIndex([(w, h) for _, w, h in rows].index((width, height)))
        square = width == height
        self._swap.setEnabled(not square)
        self._swap.setToolTip("Both sides are the same" if square else "Swap width and height")

    def _name_of(self, width: int, height: int) -> str:
        """A swapped preset keeps a name that tells its shape."""
        return "Square" if width == height else "Wide" if width > height else "Tall"

    def _icon(self, width: int, height: int) -> QIcon:
        ratio = self.devicePixelRatioF()
        pixmap = QPixmap(QSize(20, 20) * ratio)
        pixmap.setDevicePixelRatio(ratio)
        pixmap.fill(Qt.GlobalColor.transparent)
        painter = QPainter(pixmap)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        paint_shape(painter, QPointF(10, 10), width, height, 14)
        painter.end()
        return QIcon(pixmap)

    def _choose(self, row: int) -> None:
        width, height = self.select.itemData(row)
        self.size_chosen.emit(width, height)
