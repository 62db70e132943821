"""Which models and LoRAs there are. The built-in one at once, the others when the folders have been read."""

from __future__ import annotations

from PySide6.QtCore import QObject, QRunnable, QThreadPool, Signal

from engine import folders
from engine.folders import LoraCard, ModelCard
from engine.problems import ProblemError
from engine.requests import BUILT_IN_MODEL


class _List(QRunnable):
    class Done(QObject):
        listed = Signal(list, list)

    def __init__(self) -> None:
        super().__init__()
        self.done = _List.Done()

    def run(self) -> None:
        self.done.listed.emit(folders.list_models(), folders.list_loras())


class ModelsState(QObject):
    changed = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.cards: list[ModelCard] = []
        self.loras: list[LoraCard] = []  # that lie in the models folders
        self.listed = False

    def read_built_in(self) -> None:
        """A few small files of our own: read before the window is first painted, so that nothing pops in."""
        try:
            self.cards = [folders.read_card(folders.assets() / BUILT_IN_MODEL)]
        except (ProblemError, OSError):
            self.cards = []
        self.changed.emit()

    def read_all(self) -> None:
        """The user's folders may lie on a slow disk: read on another thread."""
        task = _List()
        task.done.listed.connect(self._take)
        QThreadPool.globalInstance().start(task)

    def _take(self, cards: list[ModelCard], loras: list[LoraCard]) -> None:
        self.cards, self.loras, self.listed = cards, loras, True
        self.changed.emit()

    def usable(self, wanted: str = "") -> ModelCard | None:
        """The wanted model if it can be used, else the first that can."""
        good = [card for card in self.cards if not card.problem]
        return next((card for card in good if card.model == wanted), good[0] if good else None)
