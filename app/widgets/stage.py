"""The stage: bar with the prompt as title and the picture's tools, error strip, picture or empty page."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QFontMetrics, QResizeEvent
from PySide6.QtWidgets import QHBoxLayout, QLabel, QSizePolicy, QStackedLayout, QVBoxLayout, QWidget

from app import theme
from app.widgets.button import Button
from app.widgets.empty_stage import EmptyStage
from app.widgets.error_strip import ErrorStrip
from app.widgets.picture_view import PictureView


class Stage(QWidget):
    """Tools are there only while there is a picture, Stop only while one is being made."""

    stop_requested = Signal()
    copy_requested = Signal()
    save_requested = Signal()
    folder_requested = Signal()
    recipe_requested = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setProperty("ground", "stage")
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self._words = ""
        self._title_wanted = True
        self.title = QLabel()
        self.title.setTextFormat(Qt.TextFormat.PlainText)
        self.title.setFont(theme.font("body"))
        self.title.setProperty("tone", "text2")
        self.title.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.recipe = self._tool("undo", "Use this recipe: its prompt and settings (U)", self.recipe_requested)
        self.copy = self._tool("copy", "Copy the picture (Ctrl+C)", self.copy_requested)
        self.save = self._tool("save", "Save as… (Ctrl+S)", self.save_requested)
        self.folder = self._tool("folder", "Open the folder", self.folder_requested)
        self.stop = Button("Stop this one", "secondary", "stop", height=32, tip="Stop this one (Ctrl+.)")
        self.stop.clicked.connect(self.stop_requested)
        bar = QHBoxLayout()
        bar.setContentsMargins(24, 8, 16, 8)
        bar.setSpacing(2)
        bar.addWidget(self.title, 1)
        bar.addSpacing(12)
        for widget in (self.recipe, self.copy, self.save, self.folder, self.stop):
            bar.addWidget(widget)
        self._bar = QWidget()
        self._bar.setFixedHeight(theme.LAYOUT["stage_bar"])
        self._bar.setLayout(bar)

        self.strip = ErrorStrip()
        self.strip.hide()
        strip = QHBoxLayout()
        strip.setContentsMargins(24, 0, 24, 0)
        strip.addWidget(self.strip)
        self.picture = PictureView()
        self.empty = EmptyStage()
        self._pages = QStackedLayout()
        self._pages.addWidget(self.empty)
        self._pages.addWidget(self.picture)
        self._layout = layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(self._bar)
        layout.addLayout(strip)
        layout.addLayout(self._pages, 1)
        self.set_tools(picture=False, saved=False, making=False)

    def _tool(self, icon: str, tip: str, wish: object) -> Button:
        button = Button("", "quiet", icon, height=34, icon_size=18, tip=tip)
        button.setFixedWidth(34)
        button.clicked.connect(wish)
        return button

    def set_title(self, words: str) -> None:
        self._words = " ".join(words.split())
        self._elide()

    def set_title_shown(self, shown: bool) -> None:
        """Small windows have no room for it."""
        self._title_wanted = shown
        self._elide()

    def _elide(self) -> None:
        room = max(0, self.title.width())
        words = self._words if self._title_wanted else ""
        shown = QFontMetrics(self.title.font()).elidedText(words, Qt.TextElideMode.ElideRight, room)
        self.title.setText(shown)
        self.title.setToolTip("" if shown == words else words)

    def set_tools(self, *, picture: bool, saved: bool, making: bool) -> None:
        for button in (self.recipe, self.copy, self.save):
            button.setVisible(picture and not making)
        self.folder.setVisible(picture and saved and not making)
        self.stop.setVisible(making)
        self._elide()

    def show_empty(self, empty: bool) -> None:
        self._pages.setCurrentWidget(self.empty if empty else self.picture)

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802  (Qt's name)
        super().resizeEvent(event)
        self._layout.activate()
        self._elide()
