"""The left column: model, prompt, LoRAs, picture settings, and the footer with Generate."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QDragEnterEvent, QDragLeaveEvent, QDropEvent, QPaintEvent
from PySide6.QtWidgets import QFrame, QHBoxLayout, QLabel, QScrollArea, QVBoxLayout, QWidget

from app import theme
from app.widgets import paint
from app.widgets.generate_bar import GenerateBar
from app.widgets.lora_list import LoraList
from app.widgets.lora_row import drop_hint
from app.widgets.model_card import ModelCard
from app.widgets.number_field import NumberField
from app.widgets.prompt_box import PromptBox
from app.widgets.seed_field import SeedField
from app.widgets.size_picker import SizePicker


class _DropHint(QWidget):
    """Lies over the composer while a LoRA is dragged over it."""

    def __init__(self, parent: QWidget) -> None:
        super().__init__(parent)
        self.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        self.hide()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802  (Qt's name)
        painter = paint.begin(self)
        painter.fillRect(self.rect(), theme.color("window", 0.85))
        drop_hint(painter, self.rect().toRectF().adjusted(10, 10, -10, -10), "Drop to add this LoRA")
        painter.end()


class Composer(QWidget):
    """The left column: scrolls if it must, under a fixed footer. Takes .safetensors that are dropped on it."""

    lora_dropped = Signal(str)

    def __init__(self, max_count: int, max_steps: int, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setProperty("ground", "window")
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self.setAcceptDrops(True)
        self.model = ModelCard()
        self.prompt = PromptBox()
        self.loras = LoraList()
        self.size_picker = SizePicker()
        self.count = NumberField("Count", 1, max_count, stepper=True, name="Count of pictures")
        self.steps = NumberField("Steps", 1, max_steps)
        self.seed = SeedField()
        self.guidance = NumberField("Guidance", 0, 30, decimals=1, step=0.1)
        self.footer = GenerateBar()
        self._title = QLabel("Picture")
        self._title.setFont(theme.font("label"))
        numbers = QHBoxLayout()
        numbers.setSpacing(8)
        numbers.addWidget(self.count, 1)
        numbers.addWidget(self.steps, 1)
        more = QHBoxLayout()
        more.setSpacing(8)
        more.addWidget(self.seed, 3)
        more.addWidget(self.guidance, 2)
        inside = QWidget()
        self._column = QVBoxLayout(inside)
        self._column.setSpacing(0)
        for widget, below in ((self.model, 10), (self.prompt, 14), (self.loras, 12)):
            self._column.addWidget(widget)
            self._column.addSpacing(below)
        self._column.addWidget(self._title)
        self._column.addSpacing(8)
        self._column.addWidget(self.size_picker)
        self._column.addSpacing(8)
        self._column.addLayout(numbers)
        self._column.addSpacing(8)
        self._column.addLayout(more)
        self._column.addStretch()
        self.scroll_area = QScrollArea()
        self.scroll_area.setWidget(inside)
        self.scroll_area.setWidgetResizable(True)
        self.scroll_area.setFrameShape(QFrame.Shape.NoFrame)
        self.scroll_area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.scroll_area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.scroll_area.viewport().setAutoFillBackground(False)
        inside.setAutoFillBackground(False)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(self.scroll_area, 1)
        layout.addWidget(self.footer)
        self._hint = _DropHint(self)
        self._margin = 16
        self.scroll_area.verticalScrollBar().rangeChanged.connect(lambda low, high: self._keep_margin(high > low))
        self.set_margin(16)

    def set_margin(self, margin: int) -> None:
        self._margin = margin
        self.footer.set_margin(margin)
        bar = self.scroll_area.verticalScrollBar()
        self._keep_margin(bar.maximum() > bar.minimum())

    def _keep_margin(self, scrolls: bool) -> None:
        """The scroll bar lies in the margin, so that nothing moves when it appears."""
        bar = self.scroll_area.verticalScrollBar().sizeHint().width() if scrolls else 0
        self._column.setContentsMargins(self._margin, min(14, self._margin), self._margin - 1 - bar, 12)

    def set_model_there(self, there: bool) -> None:
        """Without a model there is nothing to set."""
        for widget in (self.loras, self._title, self.size_picker, self.count, self.steps, self.seed, self.guidance):
            widget.setVisible(there)

    def set_guidance_shown(self, shown: bool) -> None:
        """A network that takes no such number has no such field."""
        self.guidance.setVisible(shown)

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:  # noqa: N802
        if dropped_loras(event):
            event.acceptProposedAction()
            self._hint.setGeometry(self.rect())
            self._hint.show()
            self._hint.raise_()

    def dragLeaveEvent(self, event: QDragLeaveEvent) -> None:  # noqa: N802
        self._hint.hide()

    def dropEvent(self, event: QDropEvent) -> None:  # noqa: N802
        self._hint.hide()
        for file in dropped_loras(event):
            self.lora_dropped.emit(file)
        event.acceptProposedAction()


def dropped_loras(event: QDropEvent) -> list[str]:
    files = [url.toLocalFile() for url in event.mimeData().urls() if url.isLocalFile()]
    return [file for file in files if file.lower().endswith(".safetensors")]
