"""Starts everything; the one place where objects are created and joined.

Imports stand inside `main`: a process that only asks the first one to come up needs little of this, and a child
process that imports this module by accident must not get a window.
"""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PySide6.QtWidgets import QApplication

    from app.engine_thread import EngineThread
    from app.main_window import MainWindow

NO_DISPLAY = (
    "There is no display here, so no window can open. Pictures are made without one by .venv/bin/tonfa generate."
)


class Program:
    """The joined objects of one run. Made by `main` and by the end-to-end tests."""

    def __init__(self, app: QApplication) -> None:
        from app.engine_thread import EngineThread
        from app.main_window import MainWindow
        from app.pages.generate_page import GeneratePage
        from app.state.composer import ComposerState
        from app.state.generation import GenerationState
        from app.state.history import History
        from app.state.memory import MemoryState
        from app.state.models import ModelsState
        from app.state.settings import Settings
        from app.theme import Theme
        from app.widgets.focus_ring import FocusRing
        from engine.host import Host

        self.theme = Theme(app)
        self.settings = Settings()
        self.models = ModelsState()
        self.composer = ComposerState()
        self.history = History()
        self.memory = MemoryState()
        self.engine: EngineThread = EngineThread(Host())
        self.generation = GenerationState(self.engine, self.composer, self.history)
        self.page = GeneratePage(self.composer, self.generation, self.history, self.memory, self.models)
        self.window: MainWindow = MainWindow(self.page, self.generation, self.composer, self.memory, self.settings)
        self.ring = FocusRing(self.window)
        self.engine.event_arrived.connect(self.generation.on_event)
        self.engine.planned.connect(self.generation.on_planned)
        self.engine.restarted.connect(self.generation.on_restarted)
        self.generation.device_known.connect(self.memory.set_device)
        self.models.changed.connect(self._models_changed)
        self.history.earlier_added.connect(self._show_earlier)
        self.generation.submitted.connect(self._keep_settings)
        self.window.closed.connect(self.close)
        self._closed = False

    def start(self) -> None:
        """Show the window, then begin what takes time."""
        from PySide6.QtCore import QTimer

        self.models.read_built_in()
        self.window.show()
        QTimer.singleShot(0, self._start_rest)

    def _start_rest(self) -> None:
        from app.state.earlier import read_todays
        from app.state.history import THUMBNAIL_SIDE

        self.engine.start()
        self.memory.watch(lambda: self.engine.pid)
        self.models.read_all()
        read_todays(THUMBNAIL_SIDE, self.history.add_earlier)

    def _models_changed(self) -> None:
        """Take the model of the last time, or the first there is, and load it."""
        if self.composer.model is not None:
            return
        wanted = self.settings.model
        card = self.models.usable(wanted)
        if card is None and self.models.listed:
            self.generation.say_no_model(self.models.cards[0].problem if self.models.cards else "")
        if card is None or (card.model != wanted and wanted and not self.models.listed):
            return
        self.composer.set_model(card)
        brought = {lora.file for lora in card.loras}
        if card.model == wanted:
            self.composer.remember(self.settings.composer)
        self.generation.prepare()
        for lora in self.composer.loras:
            if lora.file not in brought:
                self.generation.inspect_lora(lora.file)

    def _show_earlier(self) -> None:
        """The last picture is on the stage, as it was."""
        if self.generation.shown is None and not self.generation.working:
            self.generation.show(self.history.picture(0))

    def _keep_settings(self) -> None:
        if self.composer.model is not None:
            self.settings.model = self.composer.model.model
            self.settings.composer = self.composer.remembered()
            self.settings.save()

    def close(self) -> None:
        """Everything ends within five seconds, a picture that is being made included."""
        if self._closed:
            return
        self._closed = True
        self._keep_settings()
        self.memory.stop()
        self.engine.close()


def has_display() -> bool:
    """Whether Qt can open a window. On Linux a display server says where it is; without one Qt ends the process."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    return sys.platform != "linux" or any(os.environ.get(name) for name in names)


def main() -> int:
    if not has_display():
        print(NO_DISPLAY, file=sys.stderr)
        return 3
    from PySide6.QtWidgets import QApplication

    from app.single_instance import SingleInstance

    app = QApplication(sys.argv)
    app.setApplicationName("Tonfa")
    app.setDesktopFileName("tonfa")
    instance = SingleInstance()
    if not instance.claim():
        print("Tonfa is already open; its window was brought up.")
        return 0
    program = Program(app)
    instance.raise_requested.connect(program.window.bring_up)
    program.start()
    tell_bugs(program)
    _close_on_interrupt(program)
    code = app.exec()
    program.close()
    instance.release()
    return code


def tell_bugs(program: Program) -> None:
    """What nobody foresaw goes to the log and, in generic words, to the window; the work goes on."""
    import traceback
    from types import TracebackType

    from engine import folders

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        detail = "".join(traceback.format_exception(kind, error, where))
        sys.__excepthook__(kind, error, where)
        with contextlib.suppress(OSError):
            folders.logs().mkdir(parents=True, exist_ok=True)
            with (folders.logs() / "window.log").open("a", encoding="utf-8") as log:
                log.write(f"{datetime.now().isoformat(timespec='seconds')}\n{detail}\n")
        program.generation.say_bug(detail)

    sys.excepthook = hook


def _close_on_interrupt(program: Program) -> None:
    """Ctrl-C in the terminal and a polite kill close the window. Python runs the handler when the memory samples
    come in, twice a second, which is when the event loop lets it."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: program.window.close())


if __name__ == "__main__":
    sys.exit(main())
