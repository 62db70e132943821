"""What went wrong, what to do, one button. Takes room above the picture, never covers it."""

from __future__ import annotations

from PySide6.QtCore import QPointF, Qt, Signal
from PySide6.QtGui import QGuiApplication, QPaintEvent
from PySide6.QtWidgets import QHBoxLayout, QLabel, QPlainTextEdit, QSizePolicy, QVBoxLayout, QWidget

from app import theme
from app.widgets import paint
from app.widgets.button import Button


class ErrorStrip(QWidget):
    """Stays until it is answered. Its button has the accent while it stands."""

    answered = Signal()  # the main button
    closed = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.what, self.todo = QLabel(), QLabel()
        for label, role, tone in ((self.what, "label", ""), (self.todo, "body", "text2")):
            label.setFont(theme.font(role))
            label.setWordWrap(True)
            label.setTextFormat(Qt.TextFormat.PlainText)
            label.setProperty("tone", tone)
            label.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Minimum)
        self.details_button = Button("Details", "quiet", height=32)
        self.details_button.setCheckable(True)
        self.main_button = Button("Try again", "main", height=32)
        self.close_button = Button("", "quiet", "close", height=28, icon_size=16, tip="Close")
        self.close_button.setFixedWidth(28)
        self.copy_button = Button("Copy", "secondary", "copy", height=28)
        self.details = QPlainTextEdit()
        self.details.setReadOnly(True)
        self.details.setAccessibleName("Details")
        self.details.setFont(theme.font("small"))
        self.details.setTabChangesFocus(True)

        top = QHBoxLayout()
        top.setSpacing(8)
        top.addWidget(self.what, 1)
        top.addWidget(self.close_button, 0, Qt.AlignmentFlag.AlignTop)
        bottom = QHBoxLayout()
        bottom.setSpacing(8)
        bottom.addWidget(self.todo, 1)
        bottom.addWidget(self.details_button)
        bottom.addWidget(self.main_button)
        self._below = QWidget()
        below = QHBoxLayout(self._below)
        below.setContentsMargins(0, 4, 0, 0)
        below.addWidget(self.details, 1)
        below.addWidget(self.copy_button, 0, Qt.AlignmentFlag.AlignTop)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(48, 6, 11, 10)
        layout.setSpacing(2)
        layout.addLayout(top)
        layout.addLayout(bottom)
        layout.addWidget(self._below)
        self.setMinimumHeight(76)
        self._below.hide()

        self.details_button.toggled.connect(self._below.setVisible)
        self.main_button.clicked.connect(self.answered)
        self.close_button.clicked.connect(self.closed)
        self.copy_button.clicked.connect(self._copy)

    def set_problem(self, what: str, todo: str, button: str, detail: str) -> None:
        """button "" shows none: then only Close answers the strip."""
        self.what.setText(what)
        self.todo.setText(todo)
        self.main_button.set_face(button, "")
        self.main_button.setVisible(bool(button))
        self.details.setPlainText(detail)
        lines = min(8, max(2, detail.count("\n") + 1))
        self.details.setFixedHeight(lines * self.details.fontMetrics().lineSpacing() + 14)
        self.details_button.setVisible(bool(detail))
        self.details_button.setChecked(False)
        self.setAccessibleName(what)
        self.setAccessibleDescription(todo)

    def _copy(self) -> None:
        text = f"{self.what.text()}\n{self.todo.text()}\n\n{self.details.toPlainText()}"
        QGuiApplication.clipboard().setText(text)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802  (Qt's name)
        painter = paint.begin(self)
        line = theme.color("danger", 0.6)
        paint.ground(painter, self.rect(), theme.RADIUS["card"], theme.color("danger-soft"), line)
        paint.icon(painter, "error", QPointF(25, 24), 20, "danger")
        painter.end()
