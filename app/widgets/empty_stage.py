"""What the stage says before the first picture: three prompts to start from."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest

from PySide6.QtCore import QPointF, QRectF, Qt, Signal
from PySide6.QtGui import QImage, QPaintEvent, QPixmap, QResizeEvent
from PySide6.QtWidgets import QAbstractButton, QLabel, QVBoxLayout, QWidget

from app import theme
from app.widgets import paint
from app.widgets.model_card import paint_cover

HEIGHT = 60


class _Suggestion(QAbstractButton):
    def __init__(self, prompt: str, picture: QImage | None, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._picture = None if picture is None else QPixmap.fromImage(picture)
        self.setText(prompt)
        self.setAccessibleName(f"Start with: {prompt}")
        self.setFixedHeight(HEIGHT)
        self.setAttribute(Qt.WidgetAttribute.WA_Hover)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setCursor(Qt.CursorShape.PointingHandCursor)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802  (Qt's name)
        painter = paint.begin(self)
        hovered = self.underMouse()
        fill = theme.color("hover" if hovered else "surface")
        paint.ground(painter, self.rect(), theme.RADIUS["card"], fill, theme.color("line"))
        paint_cover(painter, QRectF(8, 8, 44, 44), self._picture, "generate")
        area = QRectF(64, 0, self.width() - 104, HEIGHT)
        paint.text(painter, area, self.text(), theme.font("body"), theme.color("text"))
        paint.icon(painter, "chevron-right", QPointF(self.width() - 22, HEIGHT / 2), 18, "text2")
        painter.end()


class EmptyStage(QWidget):
    """The heading, and what the model suggests. Choosing one puts it into the prompt and makes it."""

    prompt_chosen = Signal(str)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._column = QWidget()
        self._column.setMaximumWidth(380)
        self._inside = QVBoxLayout(self._column)
        self._inside.setContentsMargins(0, 0, 0, 0)
        self._inside.setSpacing(8)
        title = QLabel("Your first picture will appear here")
        title.setFont(theme.font("title"))
        title.setAlignment(Qt.AlignmentFlag.AlignHCenter)
        self._second = QLabel()
        self._second.setProperty("tone", "text2")
        self._second.setWordWrap(True)
        self._second.setAlignment(Qt.AlignmentFlag.AlignHCenter)
        self._inside.addWidget(title)
        self._inside.addWidget(self._second)
        self._inside.addSpacing(12)
        self._buttons: list[_Suggestion] = []
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 8, 24, 96)
        layout.addStretch()
        row = QVBoxLayout()
        row.addWidget(self._column)
        layout.addLayout(row)
        layout.setAlignment(row, Qt.AlignmentFlag.AlignHCenter)
        layout.addStretch()
        self.set_suggestions(())

    def first(self) -> QWidget:
        """What the focus goes to."""
        return self._buttons[0] if self._buttons else self

    def set_suggestions(self, prompts: tuple[str, ...], pictures: tuple[QImage | None, ...] = ()) -> None:
        """At most three prompts; what each of them looks like, where that is known."""
        if tuple(button.text() for button in self._buttons) == prompts[:3] and self._second.text():
            return
        for button in self._buttons:
            button.hide()
            button.deleteLater()
        self._buttons = [_Suggestion(*one) for one in zip_longest(prompts[:3], pictures[: len(prompts)])]
        for button in self._buttons:
            self._inside.addWidget(button)
            button.clicked.connect(partial(self._choose, button.text()))
        more = ", or start from one of these." if prompts else "."
        self._second.setText(f"Write what you want to see{more}")

    def _choose(self, prompt: str, checked: bool = False) -> None:
        self.prompt_chosen.emit(prompt)

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802
        self._column.setFixedWidth(min(380, max(200, self.width() - 48)))
