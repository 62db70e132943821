"""The prompt, and what to leave out. Says what was asked; decides nothing."""

from __future__ import annotations

from math import ceil

from PySide6.QtCore import QEvent, QMimeData, QObject, Qt, Signal
from PySide6.QtGui import QKeyEvent, QPaintEvent, QPalette, QResizeEvent, QTextBlockFormat, QTextCursor, QTextOption
from PySide6.QtWidgets import QFrame, QHBoxLayout, QLabel, QSizePolicy, QTextEdit, QVBoxLayout, QWidget

from app import theme
from app.widgets import paint
from app.widgets.button import Button

LINE_PX = 22
MOST_LINES = 10


class TextArea(QTextEdit):
    """Plain text that grows with what is in it. Enter is a new line; Ctrl+Enter and Tab belong to the window.

    Not a QPlainTextEdit, which has no line height.
    """

    def __init__(self, name: str, placeholder: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._least = 2
        self.setFont(theme.font("prompt"))
        self.setAcceptRichText(False)
        self.setAccessibleName(name)
        self.setPlaceholderText(placeholder)
        self.setTabChangesFocus(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setWordWrapMode(QTextOption.WrapMode.WrapAtWordBoundaryOrAnywhere)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setProperty("own_focus_ring", True)
        self.document().setDocumentMargin(0)
        self.setCursorWidth(2)
        self.setUndoRedoEnabled(False)
        lines = QTextBlockFormat()
        own = self.fontMetrics().height()  # distance, not height: the placeholder then stands where the text will
        lines.setLineHeight(LINE_PX - own, QTextBlockFormat.LineHeightTypes.LineDistanceHeight.value)
        self.textCursor().setBlockFormat(lines)  # later lines take it from the first
        self.setUndoRedoEnabled(True)
        self.textChanged.connect(self.fit)

    def set_words(self, words: str) -> None:
        """From outside; one step of the field's own undo."""
        if words != self.toPlainText():
            cursor = self.textCursor()
            cursor.select(QTextCursor.SelectionType.Document)
            cursor.insertText(words)

    def set_least_lines(self, lines: int) -> None:
        self._least = lines
        self.fit()

    def fit(self) -> None:
        """As high as the text, between the least and ten lines."""
        lines = ceil(self.document().size().height() / LINE_PX)
        self.setFixedHeight(min(MOST_LINES, max(self._least, lines)) * LINE_PX + 2)
        more = Qt.ScrollBarPolicy.ScrollBarAsNeeded if lines > MOST_LINES else Qt.ScrollBarPolicy.ScrollBarAlwaysOff
        self.setVerticalScrollBarPolicy(more)

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802  (Qt's name)
        super().resizeEvent(event)
        self.fit()

    def canInsertFromMimeData(self, source: QMimeData) -> bool:  # noqa: N802
        """Files that are dropped here belong to the composer."""
        return not source.hasUrls() and super().canInsertFromMimeData(source)

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802
        if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and event.modifiers() & ~(
            Qt.KeyboardModifier.ShiftModifier | Qt.KeyboardModifier.KeypadModifier
        ):
            event.ignore()
            return
        super().keyPressEvent(event)


class PromptBox(QWidget):
    """One card: the prompt, below it on demand what to leave out, and a footer."""

    prompt_changed = Signal(str)
    negative_changed = Signal(str)
    surprise_requested = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.prompt = TextArea("Prompt", "What would you like to see?")
        self.negative = TextArea("Leave out", "What should not be in the picture?")
        self.negative.set_least_lines(1)
        self._negative_label = QLabel("Leave out")
        self._negative_label.setFont(theme.font("caption"))
        self._negative_label.setProperty("tone", "text3")
        self._leave_out = Button(
            "Leave out", "soft", "leave-out", height=28, tip="What should not be in the picture (negative prompt)"
        )
        self._leave_out.setFont(theme.font("small", 600))
        self._leave_out.setCheckable(True)
        self._surprise = Button("", "quiet", "dice", height=28, icon_size=18, tip="Surprise me: another prompt")

        footer = QHBoxLayout()
        footer.setContentsMargins(10, 2, 10, 10)
        footer.setSpacing(4)
        footer.addWidget(self._leave_out)
        footer.addStretch()
        footer.addWidget(self._surprise)
        text = QVBoxLayout()
        text.setContentsMargins(14, 8, 12, 6)
        text.setSpacing(4)
        text.addWidget(self.prompt)
        text.addWidget(self._negative_label)
        text.addWidget(self.negative)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(text)
        layout.addLayout(footer)

        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)  # as high as its words need
        self._show_negative(False)
        self._surprise.hide()
        self._leave_out.toggled.connect(self._show_negative)
        self._surprise.clicked.connect(self.surprise_requested)
        self.prompt.textChanged.connect(lambda: self.prompt_changed.emit(self.prompt.toPlainText()))
        self.negative.textChanged.connect(self._say_negative)
        for area in (self.prompt, self.negative):
            area.installEventFilter(self)
        self.setFocusProxy(self.prompt)

    def set_prompt(self, words: str) -> None:
        self.prompt.set_words(words)

    def set_negative(self, words: str) -> None:
        """Opens the field where there is something to leave out."""
        if words:
            self._leave_out.setChecked(True)
        self.negative.set_words(words)

    def set_surprise_offered(self, offered: bool) -> None:
        self._surprise.setVisible(offered)

    def set_least_lines(self, lines: int) -> None:
        self.prompt.set_least_lines(lines)

    def _show_negative(self, shown: bool) -> None:
        self._negative_label.setVisible(shown)
        self.negative.setVisible(shown)
        self._say_negative()
        if shown:
            self.negative.setFocus(Qt.FocusReason.OtherFocusReason)

    def _say_negative(self) -> None:
        """A closed field leaves nothing out, whatever still stands in it."""
        self.negative_changed.emit(self.negative.toPlainText() if self._leave_out.isChecked() else "")

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:  # noqa: N802
        if event.type() in (QEvent.Type.FocusIn, QEvent.Type.FocusOut):
            self.update()
        return super().eventFilter(watched, event)

    def changeEvent(self, event: QEvent) -> None:  # noqa: N802
        super().changeEvent(event)
        if event.type() == QEvent.Type.PaletteChange:
            for area in (self.prompt, self.negative):
                palette = area.palette()
                palette.setColor(QPalette.ColorRole.PlaceholderText, theme.color("text3"))
                area.setPalette(palette)

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        focused = self.prompt.hasFocus() or self.negative.hasFocus()
        line, width = (theme.color("focus"), 2.0) if focused else (theme.color("line"), 1.0)
        paint.ground(painter, self.rect(), theme.RADIUS["card"], theme.color("surface"), line, width)
        painter.end()
