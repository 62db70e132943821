"""A number with its label: click to type, drag sideways, arrows, wheel when focused, simple sums."""

from __future__ import annotations

import re

from PySide6.QtCore import QEvent, QLocale, QObject, QPoint, QPointF, QRectF, QSize, Qt
from PySide6.QtGui import (
    QFocusEvent,
    QFontMetrics,
    QKeyEvent,
    QMouseEvent,
    QPaintEvent,
    QPen,
    QResizeEvent,
    QValidator,
    QWheelEvent,
)
from PySide6.QtWidgets import QAbstractSpinBox, QDoubleSpinBox, QToolTip, QWidget

from app import theme
from app.widgets import paint

PIXELS_PER_STEP = 6  # of sideways dragging
THIN_SPACE = "\u202f"
_TERM = re.compile(r"\s*([+-]?)\s*(\d+(?:[.,]\d*)?|[.,]\d+)\s*")


def parse(words: str) -> float | None:
    """A number or a sum of numbers ("0.6+0.1", "41 830 592"), or None. Never evaluates code."""
    words = re.sub(r"(?<=\d)[\s\u202f\u00a0]+(?=\d)", "", words.replace("\u2212", "-")).strip()
    if not words or len(words) > 64:
        return None
    total, at = 0.0, 0
    while at < len(words):
        term = _TERM.match(words, at)
        if term is None or (at and not term[1]):
            return None
        total += float(term[2].replace(",", ".")) * (-1 if term[1] == "-" else 1)
        at = term.end()
    return total


class NumberField(QDoubleSpinBox):
    """A spin box without buttons, painted as label left, value right. `valueChanged` is the user's doing only."""

    def __init__(
        self,
        label: str,
        low: float,
        high: float,
        *,
        decimals: int = 0,
        step: float = 1,
        grouped: bool = False,
        stepper: bool = False,
        name: str = "",
        compact: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._label, self._grouped, self._stepper, self._compact = label, grouped, stepper, compact
        self._right_room = 0
        self._quiet = False
        self._pressed_at: QPoint | None = None
        self._scrubbed = 0.0
        self.setButtonSymbols(QAbstractSpinBox.ButtonSymbols.NoButtons)
        self.setFrame(False)
        self.setKeyboardTracking(False)
        self.setLocale(QLocale.c())
        self.setDecimals(decimals)
        self.setRange(low, high)
        self.setSingleStep(step)
        self.setAccessibleName(name or label)
        self.setFixedHeight(28 if compact else 36)
        self.setFont(theme.figures("label"))
        self.setAttribute(Qt.WidgetAttribute.WA_Hover)
        align = Qt.AlignmentFlag.AlignCenter if compact or stepper else Qt.AlignmentFlag.AlignRight
        self.setAlignment(align | Qt.AlignmentFlag.AlignVCenter)
        edit = self.lineEdit()
        edit.installEventFilter(self)
        edit.setAcceptDrops(False)  # files that are dropped here belong to the composer
        edit.setCursor(Qt.CursorShape.SizeHorCursor)
        edit.setAttribute(Qt.WidgetAttribute.WA_MacShowFocusRect, False)
        self.setContextMenuPolicy(Qt.ContextMenuPolicy.NoContextMenu)

    def reserve_right(self, pixels: int) -> None:
        """Room at the right for a button that somebody else puts there."""
        self._right_room = pixels
        self._place_edit()

    def set_quiet(self, quiet: bool) -> None:
        """Second-rank ink, for a value that is kept and not used now."""
        self._quiet = quiet
        self._place_edit()

    def set_value(self, value: float) -> None:
        """From outside: says nothing."""
        blocked = self.blockSignals(True)
        self.setValue(value)
        self.blockSignals(blocked)

    # -- words --

    def textFromValue(self, value: float) -> str:  # noqa: N802  (Qt's name)
        words = f"{value:.{self.decimals()}f}"
        if self._grouped:
            words = f"{int(value):,}".replace(",", THIN_SPACE)
        return words.replace("-", "\u2212")

    def valueFromText(self, text: str) -> float:  # noqa: N802
        value = parse(text)
        return self.value() if value is None else min(self.maximum(), max(self.minimum(), value))

    def validate(self, text: str, pos: int) -> tuple[QValidator.State, str, int]:
        good = parse(text) is not None
        return (QValidator.State.Acceptable if good else QValidator.State.Intermediate), text, pos

    def fixup(self, text: str) -> str:
        """Bad text goes back to the last value and the limits are said; nothing shakes."""
        self._say_limits()
        return self.textFromValue(self.value())

    def _say_limits(self) -> None:
        low, high = self.textFromValue(self.minimum()), self.textFromValue(self.maximum())
        QToolTip.showText(self.mapToGlobal(QPoint(0, self.height())), f"A number from {low} to {high}.", self)

    # -- hands --

    def stepBy(self, steps: int) -> None:  # noqa: N802
        super().stepBy(steps)
        self.lineEdit().deselect()

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802
        if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and event.modifiers():
            event.ignore()  # Ctrl+Enter belongs to Generate
            self.interpretText()
            return
        fine = event.modifiers() == Qt.KeyboardModifier.ShiftModifier
        if fine and event.key() in (Qt.Key.Key_Up, Qt.Key.Key_Down) and self.decimals():
            sign = 1 if event.key() == Qt.Key.Key_Up else -1
            self.setValue(self.value() + sign * 10.0 ** -self.decimals())
            return
        super().keyPressEvent(event)

    def wheelEvent(self, event: QWheelEvent) -> None:  # noqa: N802
        if self.hasFocus():
            super().wheelEvent(event)
        else:
            event.ignore()

    def focusInEvent(self, event: QFocusEvent) -> None:  # noqa: N802
        super().focusInEvent(event)
        self.update()

    def focusOutEvent(self, event: QFocusEvent) -> None:  # noqa: N802
        super().focusOutEvent(event)
        self.lineEdit().deselect()
        self.update()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:  # noqa: N802
        if watched is self.lineEdit() and isinstance(event, QMouseEvent):
            return self._scrub(event)
        return super().eventFilter(watched, event)

    def _scrub(self, event: QMouseEvent) -> bool:
        """Sideways dragging changes the value; a click without dragging begins to type."""
        kind = event.type()
        if kind == QEvent.Type.MouseButtonPress and event.button() == Qt.MouseButton.LeftButton:
            if self.hasFocus() and self.lineEdit().hasSelectedText():
                return False  # being edited: the mouse places the caret
            self._pressed_at = event.globalPosition().toPoint()
            self._scrubbed = 0.0
            return True
        if kind == QEvent.Type.MouseMove and self._pressed_at is not None:
            moved = event.globalPosition().toPoint().x() - self._pressed_at.x()
            fine = event.modifiers() & Qt.KeyboardModifier.ShiftModifier
            wanted = moved / (PIXELS_PER_STEP * (4 if fine else 1))
            whole = int(wanted - self._scrubbed)
            if whole:
                self._scrubbed += whole
                self.setValue(self.value() + whole * self.singleStep())
            return True
        if kind == QEvent.Type.MouseButtonRelease and self._pressed_at is not None:
            self._pressed_at = None
            if not self._scrubbed:
                self.setFocus(Qt.FocusReason.MouseFocusReason)
                self.selectAll()
            return True
        return False

    # -- face --

    def _buttons(self) -> tuple[QRectF, QRectF]:
        """Minus and plus of a stepper."""
        right, high = self.width() - 4, self.height() - 4
        return QRectF(right - 80, 2, 28, high), QRectF(right - 28, 2, 28, high)

    def mousePressEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        minus, plus = self._buttons()
        if self._stepper and minus.contains(event.position()):
            self.stepBy(-1)
        elif self._stepper and plus.contains(event.position()):
            self.stepBy(1)
        else:
            super().mousePressEvent(event)

    def sizeHint(self) -> QSize:  # noqa: N802
        return QSize(56, self.height())

    def minimumSizeHint(self) -> QSize:  # noqa: N802
        return QSize(56, self.height())

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802
        super().resizeEvent(event)
        self._place_edit()

    def changeEvent(self, event: QEvent) -> None:  # noqa: N802
        super().changeEvent(event)
        if event.type() in (QEvent.Type.StyleChange, QEvent.Type.PaletteChange, QEvent.Type.FontChange):
            self._place_edit()

    def _place_edit(self) -> None:
        edit = self.lineEdit()
        if edit is None:  # while QDoubleSpinBox is still being made
            return
        palette = edit.palette()
        ink = theme.color("text2" if self._quiet else "text")
        if palette.color(palette.ColorRole.Text) != ink or palette.color(palette.ColorRole.Base).alpha():
            palette.setColor(palette.ColorRole.Text, ink)
            palette.setColor(palette.ColorRole.Base, Qt.GlobalColor.transparent)
            edit.setPalette(palette)
        if self._stepper:
            minus, plus = self._buttons()
            edit.setGeometry(int(minus.right()), 1, int(plus.left() - minus.right()), self.height() - 2)
            return
        left = 4 if self._compact else 14 + QFontMetrics(theme.font("body")).horizontalAdvance(self._label)
        right = 4 if self._compact else 10 + self._right_room
        edit.setGeometry(left, 1, max(20, self.width() - left - right), self.height() - 2)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        paint.field(painter, self.rect(), self.underMouse() and self.isEnabled(), on_card=self._compact)
        if self._label and not self._compact:
            area = QRectF(12, 0, self.width() - 24, self.height())
            paint.text(painter, area, self._label, theme.font("body"), theme.color("text2"))
        if self._stepper:
            for area, icon, able in zip(
                self._buttons(),
                ("minus", "plus"),
                (self.value() > self.minimum(), self.value() < self.maximum()),
                strict=True,
            ):
                tint = theme.color("text2" if able else "control")
                if icon == "plus":
                    paint.icon(painter, "plus", area.center(), 18, tint)
                else:  # the set has no minus: the same stroke as its plus
                    painter.setPen(QPen(tint, 1.3, Qt.PenStyle.SolidLine, Qt.PenCapStyle.RoundCap))
                    middle = QPointF(area.center().x(), round(area.center().y()) - 0.5)
                    painter.drawLine(middle - QPointF(5.25, 0), middle + QPointF(5.25, 0))
        painter.end()
