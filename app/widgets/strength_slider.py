"""How strongly a LoRA acts: -2 to 2, filled from zero, to the left in violet."""

from __future__ import annotations

from PySide6.QtCore import QPointF, QRectF, QSize, Qt, Signal
from PySide6.QtGui import QKeyEvent, QMouseEvent, QPaintEvent, QPen, QWheelEvent
from PySide6.QtWidgets import QSlider, QWidget

from app import theme
from app.widgets import paint

LIMIT = 2.0
SCALE = 100  # slider units a whole number: QSlider counts in integers
SNAP = 0.03  # this near to a whole number a drag stops on it
MARGIN = 8  # half a handle and its ring
HANDLE = 15


class StrengthSlider(QSlider):
    """A QSlider in hundredths, so that role, keys and value reach assistive technology by themselves."""

    strength_changed = Signal(float)  # by the user
    drag_ended = Signal()
    reset_requested = Signal()  # back to the file's own strength

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(Qt.Orientation.Horizontal, parent)
        self.setRange(round(-LIMIT * SCALE), round(LIMIT * SCALE))
        self.setFixedHeight(28)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setAttribute(Qt.WidgetAttribute.WA_Hover)
        self._name = ""
        self._active = True
        self._dragging = False
        self.valueChanged.connect(lambda value: self._describe())

    def set_name(self, name: str) -> None:
        self._name = name
        self.setAccessibleName(f"{name} strength")
        self._describe()

    def _describe(self) -> None:
        self.setAccessibleDescription(f"{self.strength():.2f}, from minus 2 to 2")

    def strength(self) -> float:
        return self.value() / SCALE

    def set_strength(self, strength: float) -> None:
        """From outside: moves the handle, says nothing. Beyond the ends it stays at the end."""
        self.setValue(round(min(LIMIT, max(-LIMIT, strength)) * SCALE))

    def set_active(self, active: bool) -> None:
        """An inactive slider is quiet; it still moves."""
        self._active = active
        self.update()

    def sizeHint(self) -> QSize:  # noqa: N802  (Qt's name)
        return QSize(200, 28)

    def _move_to(self, strength: float) -> None:
        value = round(min(LIMIT, max(-LIMIT, strength)) * SCALE)
        if value != self.value():
            self.setValue(value)
            self.strength_changed.emit(self.strength())

    # -- keys and wheel --

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802
        fine = bool(event.modifiers() & Qt.KeyboardModifier.ShiftModifier)
        if event.modifiers() & (Qt.KeyboardModifier.AltModifier | Qt.KeyboardModifier.ControlModifier):
            event.ignore()
            return
        step = 0.01 if fine else 0.05
        keys = Qt.Key
        match event.key():
            case keys.Key_Left | keys.Key_Down:
                self._move_to(self.strength() - step)
            case keys.Key_Right | keys.Key_Up:
                self._move_to(self.strength() + step)
            case keys.Key_PageDown:
                self._move_to(self.strength() - 0.25)
            case keys.Key_PageUp:
                self._move_to(self.strength() + 0.25)
            case keys.Key_Home:
                self._move_to(-LIMIT)
            case keys.Key_End:
                self._move_to(LIMIT)
            case keys.Key_0:
                self._move_to(0.0)
            case keys.Key_Backspace:
                self.reset_requested.emit()
            case _:
                event.ignore()
                return
        event.accept()

    def wheelEvent(self, event: QWheelEvent) -> None:  # noqa: N802
        if not self.hasFocus():  # a page that is being scrolled must not change values
            event.ignore()
            return
        fine = bool(event.modifiers() & Qt.KeyboardModifier.ShiftModifier)
        turned = event.angleDelta().y() or event.angleDelta().x()
        self._move_to(self.strength() + (0.01 if fine else 0.05) * turned / 120)
        event.accept()

    # -- mouse --

    def _strength_at(self, x: float) -> float:
        width = max(1, self.width() - 2 * MARGIN)
        return ((x - MARGIN) / width * 2 - 1) * LIMIT

    def _drag(self, event: QMouseEvent) -> None:
        strength = self._strength_at(event.position().x())
        whole = round(strength)
        if abs(strength - whole) <= SNAP and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier:
            strength = whole
        self._move_to(strength)

    def mousePressEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        if event.button() != Qt.MouseButton.LeftButton:
            event.ignore()
            return
        self._dragging = True
        if abs(event.position().x() - self._handle_x()) > HANDLE / 2 + 2:
            self._drag(event)
        self.update()

    def mouseMoveEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        if self._dragging:
            self._drag(event)

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        if self._dragging and event.button() == Qt.MouseButton.LeftButton:
            self._dragging = False
            self.drag_ended.emit()
            self.update()

    def mouseDoubleClickEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        if event.button() == Qt.MouseButton.LeftButton:
            self._dragging = False
            self.reset_requested.emit()

    # -- face --

    def _x_of(self, strength: float) -> float:
        width = self.width() - 2 * MARGIN
        return MARGIN + width * (strength / LIMIT + 1) / 2

    def _handle_x(self) -> float:
        return self._x_of(self.strength())

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        middle = self.height() / 2
        zero, here = self._x_of(0), self._handle_x()
        control = theme.color("control")
        tint = theme.color("accent" if self.strength() >= 0 else "violet") if self._active else control
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(theme.color("control", 0.55))
        painter.drawRoundedRect(QRectF(MARGIN, middle - 2, self.width() - 2 * MARGIN, 4), 2, 2)
        if self._active:
            painter.setBrush(tint)
            painter.drawRect(QRectF(min(zero, here), middle - 2, abs(here - zero), 4))
        for whole in (-2, -1, 1, 2):
            x = min(self.width() - MARGIN - 2.0, max(MARGIN + 1.0, self._x_of(whole) - 1))
            painter.fillRect(QRectF(round(x), middle + 6, 2, 3), control)
        painter.fillRect(QRectF(round(zero) - 1, middle - 7, 2, 14), control)
        if self._dragging or (self.underMouse() and self._active):
            painter.setBrush(theme.color("accent" if self.strength() >= 0 else "violet", 0.3))
            painter.drawEllipse(QPointF(here, middle), HANDLE / 2 + 3, HANDLE / 2 + 3)
        knob = theme.color("text" if theme.scheme() == "dark" else "surface")
        painter.setBrush(knob)
        painter.setPen(QPen(tint, 2))
        painter.drawEllipse(QPointF(here, middle), HANDLE / 2 - 1, HANDLE / 2 - 1)
        painter.end()
