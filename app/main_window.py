"""The frame: rail, the page, status bar; and the keys that work everywhere."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import QEvent, Qt, QTimer, Signal
from PySide6.QtGui import QCloseEvent, QKeySequence, QShortcut, QShowEvent
from PySide6.QtWidgets import QApplication, QGridLayout, QStackedWidget, QWidget

from app import theme
from app.pages.generate_page import SMALL_WIDTH, GeneratePage
from app.state.composer import ComposerState
from app.state.generation import GenerationState
from app.state.memory import KEPT, MemoryState
from app.state.settings import Settings
from app.widgets.rail import Rail
from app.widgets.status_bar import StatusBar


class MainWindow(QWidget):
    closed = Signal()

    def __init__(
        self,
        page: GeneratePage,
        generation: GenerationState,
        composer: ComposerState,
        memory: MemoryState,
        settings: Settings,
    ) -> None:
        super().__init__()
        self._page, self._generation, self._composer = page, generation, composer
        self._memory, self._settings = memory, settings
        self.setWindowTitle("Tonfa")
        self.setProperty("ground", "window")
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self.setMinimumSize(*theme.LAYOUT["minimum_window"])
        self.rail = Rail([("Generate", "generate")])
        self.status = StatusBar()
        self.pages = QStackedWidget()
        self.pages.addWidget(page)
        layout = QGridLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(self.rail, 0, 0, 2, 1)
        layout.addWidget(self.pages, 0, 1)
        layout.addWidget(self.status, 1, 1)
        self.rail.page_requested.connect(self.pages.setCurrentIndex)
        generation.changed.connect(self.show_status)
        memory.changed.connect(self.show_memory)
        memory.changed.connect(self.show_status)
        page.edge_dragged.connect(lambda width: setattr(settings, "composer_width", width))
        self._add_keys()
        self._restore()
        self.show_status()

    def _restore(self) -> None:
        self.resize(1280, 800)
        if (geometry := self._settings.geometry) is not None:
            self.restoreGeometry(geometry)
        if (width := self._settings.composer_width) is not None:
            self._page.set_composer_width(width)

    # -- keys --

    def _add_keys(self) -> None:
        page, generation = self._page, self._generation
        ui = page.composer
        for keys, wish in (
            ("Ctrl+Return", page.generate),
            ("Ctrl+Enter", page.generate),
            ("Ctrl+Shift+Return", lambda: page.generate(first=True)),
            ("Ctrl+Shift+Enter", lambda: page.generate(first=True)),
            ("Ctrl+.", generation.stop),
            ("Ctrl+Shift+.", generation.stop_all),
            ("Ctrl+Shift+>", generation.stop_all),  # what Shift makes of the full stop on many keyboards
            ("Ctrl+1", lambda: self.pages.setCurrentIndex(0)),
            ("Ctrl+L", lambda: ui.prompt.prompt.setFocus(Qt.FocusReason.ShortcutFocusReason)),
            ("Ctrl+Shift+L", ui.loras.open_add),
            ("Ctrl+R", self._composer.new_seed),
            ("Ctrl+S", page.save_picture),
            ("Ctrl+Q", self.close),
            ("F6", lambda: self._next_region(1)),
            ("Shift+F6", lambda: self._next_region(-1)),
            ("F11", self._full_screen),
        ):
            self._key(keys, wish, self, Qt.ShortcutContext.WindowShortcut)
        for place in (page.stage, page.timeline):  # letters act only where nothing is typed
            context = Qt.ShortcutContext.WidgetWithChildrenShortcut
            self._key("U", page.use_recipe, place, context)
            self._key("Ctrl+C", page.copy_picture, place, context)

    def _key(self, keys: str, wish: Callable[[], object], where: QWidget, context: Qt.ShortcutContext) -> None:
        shortcut = QShortcut(QKeySequence(keys), where)
        shortcut.setContext(context)
        shortcut.setAutoRepeat(False)
        shortcut.activated.connect(lambda: wish())

    def _next_region(self, by: int) -> None:
        """Composer, stage, timeline, round and round."""
        page = self._page
        regions: list[tuple[QWidget, QWidget]] = [
            (page.composer, page.composer.prompt.prompt),
            (page.stage, page.stage.picture if page.stage.picture.isVisible() else page.stage.empty.first()),
            (page.timeline, page.timeline.list),
        ]
        shown = [one for one in regions if one[1].isVisible()]
        focus = QApplication.focusWidget()
        here = next((i for i, (region, _) in enumerate(shown) if focus and region.isAncestorOf(focus)), 0)
        shown[(here + by) % len(shown)][1].setFocus(Qt.FocusReason.ShortcutFocusReason)

    def _full_screen(self) -> None:
        self.setWindowState(self.windowState() ^ Qt.WindowState.WindowFullScreen)

    # -- what is shown --

    def show_status(self) -> None:
        state, beside, tone = self._generation.status()
        self.status.set_state(state, beside or self._memory.where, tone)

    def show_memory(self) -> None:
        if not self.isVisible() or self.isMinimized():
            return  # nothing is painted that nobody sees
        memory = self._memory
        short = self.width() < SMALL_WIDTH
        self.status.set_memory(memory.memory_words(short), memory.load_words(), memory.heat_words())
        self.status.set_history(memory.others, memory.used, KEPT)

    def bring_up(self) -> None:
        """A second start of the program asks for this."""
        self.setWindowState(self.windowState() & ~Qt.WindowState.WindowMinimized)
        self.show()
        self.raise_()
        self.activateWindow()

    def showEvent(self, event: QShowEvent) -> None:  # noqa: N802  (Qt's name)
        super().showEvent(event)
        self._page.composer.prompt.prompt.setFocus(Qt.FocusReason.OtherFocusReason)

    def changeEvent(self, event: QEvent) -> None:  # noqa: N802
        super().changeEvent(event)
        if event.type() == QEvent.Type.WindowStateChange:
            self.show_memory()

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802
        self._settings.geometry = self.saveGeometry()
        self._settings.save()
        super().closeEvent(event)
        QTimer.singleShot(0, self.closed.emit)  # first the window goes, then what takes time ends
