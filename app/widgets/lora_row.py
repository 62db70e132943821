"""One LoRA: cover, name, what of it is used, exact value, switch, strength slider."""

from __future__ import annotations

from dataclasses import dataclass

from PySide6.QtCore import QEvent, QObject, QPointF, QRectF, Qt, Signal
from PySide6.QtGui import (
    QContextMenuEvent,
    QEnterEvent,
    QImage,
    QKeyEvent,
    QPainter,
    QPaintEvent,
    QPen,
    QPixmap,
    QResizeEvent,
)
from PySide6.QtWidgets import QToolTip, QWidget

from app import theme
from app.widgets import paint
from app.widgets.button import Button
from app.widgets.menu import Menu
from app.widgets.model_card import paint_cover
from app.widgets.number_field import NumberField
from app.widgets.strength_slider import StrengthSlider
from app.widgets.switch import Switch

HEIGHT = 84
FIELD_LIMIT = 10.0  # the field takes more than the slider shows


@dataclass(frozen=True, slots=True)
class LoraView:
    """What a row shows."""

    file: str
    name: str
    strength: float
    own_strength: float  # what double-click goes back to
    on: bool
    words: str  # "all 304 layers used"
    tone: str = "text2"  # or "warn"
    details: str = ""  # which keys are not used and why, one a line
    cover: QImage | None = None


class LoraRow(QWidget):
    strength_chosen = Signal(str, float)
    switched = Signal(str, bool)
    remove_requested = Signal(str)
    move_requested = Signal(str, int)  # -1 up, +1 down
    show_requested = Signal(str)

    def __init__(self, view: LoraView, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._view = view
        self.setFixedHeight(HEIGHT)
        self.setAttribute(Qt.WidgetAttribute.WA_Hover)
        self.more = Button("", "quiet", "more", height=24, icon_size=16, parent=self)
        self.more.setFixedWidth(24)
        self.field = NumberField("", -FIELD_LIMIT, FIELD_LIMIT, decimals=2, step=0.05, compact=True, parent=self)
        self.switch = Switch("", self)
        self.slider = StrengthSlider(self)
        for first, second in ((self.more, self.field), (self.field, self.switch), (self.switch, self.slider)):
            QWidget.setTabOrder(first, second)
        self.more.clicked.connect(self._open_menu)
        self.field.valueChanged.connect(lambda value: self.strength_chosen.emit(self._view.file, value))
        self.slider.strength_changed.connect(lambda value: self.strength_chosen.emit(self._view.file, value))
        self.slider.reset_requested.connect(self._reset)
        self.switch.toggled.connect(lambda on: self.switched.emit(self._view.file, on))
        for child in (self.more, self.field, self.switch, self.slider):
            child.installEventFilter(self)
        self.set_view(view)
        self._show_more(False)

    def set_view(self, view: LoraView) -> None:
        self._view = view
        name = view.name
        self.more.setAccessibleName(f"{name}: more")
        self.more.setToolTip(f"{name}: own strength, file, order, remove")
        self.field.setAccessibleName(f"{name} strength, exact")
        self.switch.setAccessibleName(f"{name} on")
        self.slider.set_name(name)
        self.slider.set_strength(view.strength)
        self.slider.set_active(view.on)
        self.field.set_value(view.strength)
        self.field.set_quiet(not view.on)
        blocked = self.switch.blockSignals(True)
        self.switch.setChecked(view.on)
        self.switch.blockSignals(blocked)
        self.setAccessibleName(name)
        self.setAccessibleDescription(view.words)
        self.setToolTip(view.words)
        self.update()

    def _reset(self) -> None:
        self.strength_chosen.emit(self._view.file, self._view.own_strength)

    # -- menu, keys --

    def _open_menu(self) -> None:
        self._menu().exec(self.more.mapToGlobal(self.more.rect().bottomLeft()))

    def _menu(self) -> Menu:
        menu, file = Menu(self), self._view.file
        menu.addAction(f"Own strength ({self._view.own_strength:.2f})", self._reset)
        if self._view.details:
            menu.addAction("What is not used, and why", self._show_details)
        menu.addSeparator()
        menu.addAction("Move up\tAlt+Up", lambda: self.move_requested.emit(file, -1))
        menu.addAction("Move down\tAlt+Down", lambda: self.move_requested.emit(file, 1))
        menu.addSeparator()
        menu.addAction("Show file", lambda: self.show_requested.emit(file))
        menu.addAction("Remove", lambda: self.remove_requested.emit(file))
        return menu

    def _show_details(self) -> None:
        QToolTip.showText(self.mapToGlobal(self.rect().bottomLeft()), self._view.details, self, self.rect(), 20_000)

    def contextMenuEvent(self, event: QContextMenuEvent) -> None:  # noqa: N802  (Qt's name)
        self._menu().exec(event.globalPos())

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802
        moves = {Qt.Key.Key_Up: -1, Qt.Key.Key_Down: 1}
        if event.modifiers() & Qt.KeyboardModifier.AltModifier and event.key() in moves:
            self.move_requested.emit(self._view.file, moves[Qt.Key(event.key())])
        elif event.key() == Qt.Key.Key_Delete:
            self.remove_requested.emit(self._view.file)
        else:
            super().keyPressEvent(event)

    # -- face --

    def _show_more(self, shown: bool) -> None:
        """Hidden by its icon only: it keeps its place in the Tab order."""
        self.more.set_face("", "more" if shown else "")

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:  # noqa: N802
        if event.type() in (QEvent.Type.FocusIn, QEvent.Type.FocusOut):
            within = event.type() == QEvent.Type.FocusIn or self.underMouse()
            self._show_more(within)
        return super().eventFilter(watched, event)

    def enterEvent(self, event: QEnterEvent) -> None:  # noqa: N802
        self._show_more(True)

    def leaveEvent(self, event: QEvent) -> None:  # noqa: N802
        self._show_more(any(c.hasFocus() for c in (self.more, self.field, self.switch, self.slider)))

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802
        right = self.width() - 12
        self.switch.move(right - 34, 14)
        self.field.setGeometry(right - 34 - 10 - 56, 14, 56, 28)
        self.more.move(self.field.x() - 26, 16)
        self.slider.setGeometry(8, 50, self.width() - 16, 28)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        view = self._view
        cover = None if view.cover is None else QPixmap.fromImage(view.cover)
        paint_cover(painter, QRectF(12, 12, 32, 32), cover, "sun", quiet=not view.on)
        room = self.more.x() - 54
        ink = theme.color("text" if view.on else "text2")
        paint.text(painter, QRectF(54, 10, room, 20), view.name, theme.font("label"), ink)
        tone = theme.color(view.tone if view.on else "text2")
        words = view.words if view.on or view.tone == "warn" else "off"
        paint.text(painter, QRectF(54, 29, room + 24, 16), words, theme.font("caption"), tone)
        painter.end()


class Divider(QWidget):
    """A quiet line between rows, inset as the rows are."""

    def __init__(self) -> None:
        super().__init__()
        self.setFixedHeight(1)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        painter.fillRect(QRectF(12, 0, self.width() - 24, 1), theme.color("line"))
        painter.end()


def drop_hint(painter: QPainter, area: QRectF, words: str) -> None:
    """The dashed place that says where something can be dropped."""
    pen = QPen(theme.color("accent"), 2, Qt.PenStyle.DashLine)
    painter.setPen(pen)
    painter.setBrush(theme.color("accent-soft"))
    painter.drawRoundedRect(area.adjusted(2, 2, -2, -2), 12, 12)
    middle = QPointF(area.center())
    box = QRectF(area.left(), middle.y() - 12, area.width(), 24)
    paint.text(painter, box, words, theme.font("label"), theme.color("accent-text"), Qt.AlignmentFlag.AlignHCenter)
