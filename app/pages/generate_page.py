"""The Generate page: composer left, stage in the middle, timeline right. Joins widgets to state."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QEvent, QPoint, Qt, QUrl, Signal
from PySide6.QtGui import (
    QAccessible,
    QAccessibleAnnouncementEvent,
    QDesktopServices,
    QGuiApplication,
    QImage,
    QResizeEvent,
)
from PySide6.QtWidgets import (
    QFileDialog,
    QHBoxLayout,
    QSplitter,
    QToolTip,
    QWidget,
)

from app import images, theme
from app.state import words
from app.state.composer import MAX_COUNT, MAX_STEPS, ComposerState, LoraSetting
from app.state.generation import GenerationState
from app.state.history import History, Picture
from app.state.memory import MemoryState
from app.state.models import ModelsState
from app.widgets.composer import Composer
from app.widgets.lora_row import LoraView
from app.widgets.stage import Stage
from app.widgets.timeline import Timeline
from engine.folders import ModelCard

SMALL_WIDTH, SMALL_HEIGHT = 1000, 720
COVER_SIDE = 96  # device pixels: sharp at two per logical one


def lora_view(one: LoraSetting, cover: QImage | None) -> LoraView:
    details = "\n".join(f"{key}: {why}" for key, why in one.use.unused[:40]) if one.use else ""
    tone = "warn" if one.problem or one.partly_used else "text2"
    return LoraView(one.file, one.name, one.strength, one.own_strength, one.on, one.words(), tone, details, cover)


class GeneratePage(QWidget):
    edge_dragged = Signal(int)  # the composer's new width

    def __init__(
        self,
        composer: ComposerState,
        generation: GenerationState,
        history: History,
        memory: MemoryState,
        models: ModelsState,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._composer, self._generation = composer, generation
        self._history, self._memory, self._models = history, memory, models
        self._cover: tuple[str, QImage | None] = ("", None)
        self._lora_covers: dict[str, QImage | None] = {}
        self._suggestions: tuple[str, tuple[QImage | None, ...]] = ("", ())
        self._own_width: int | None = None
        self.composer = Composer(MAX_COUNT, MAX_STEPS)
        self.stage = Stage()
        self.timeline = Timeline(history)
        self.splitter = QSplitter(Qt.Orientation.Horizontal)
        self.splitter.addWidget(self.composer)
        self.splitter.addWidget(self.stage)
        self.splitter.setHandleWidth(1)
        self.splitter.setChildrenCollapsible(False)
        self.splitter.setStretchFactor(0, 0)
        self.splitter.setStretchFactor(1, 1)
        limits = theme.LAYOUT["composer"]
        self.composer.setMinimumWidth(limits["min"] - 1)
        self.composer.setMaximumWidth(limits["max"])
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(self.splitter, 1)
        layout.addWidget(self.timeline)
        self._join_composer()
        self._join_stage()
        self.show_settings()
        self.show_generation()

    # -- wishes: widgets to state --

    def _join_composer(self) -> None:
        ui, state, generation = self.composer, self._composer, self._generation
        ui.model.model_chosen.connect(self._choose_model)
        ui.prompt.prompt_changed.connect(state.set_prompt)
        ui.prompt.negative_changed.connect(state.set_negative)
        ui.prompt.surprise_requested.connect(state.surprise)
        ui.loras.strength_chosen.connect(state.set_strength)
        ui.loras.switched.connect(state.switch_lora)
        ui.loras.remove_requested.connect(state.remove_lora)
        ui.loras.move_requested.connect(state.move_lora)
        ui.loras.known_chosen.connect(self.add_lora_file)
        ui.loras.file_requested.connect(self.choose_lora_file)
        ui.loras.show_requested.connect(lambda file: self._open_folder(file))
        ui.lora_dropped.connect(self.add_lora_file)
        ui.size_picker.size_chosen.connect(state.set_size)
        ui.count.valueChanged.connect(lambda value: state.set_count(int(value)))
        ui.steps.valueChanged.connect(lambda value: state.set_steps(int(value)))
        ui.guidance.valueChanged.connect(state.set_guidance)
        ui.seed.valueChanged.connect(lambda value: state.set_seed(int(value)))
        ui.seed.mode_chosen.connect(state.set_seed_mode)
        ui.footer.generate_requested.connect(self.generate)
        ui.footer.stop_requested.connect(generation.stop)
        state.changed.connect(self.show_settings)
        self._models.changed.connect(self.show_settings)

    def _join_stage(self) -> None:
        generation, stage, timeline = self._generation, self.stage, self.timeline
        stage.stop_requested.connect(generation.stop)
        stage.copy_requested.connect(self.copy_picture)
        stage.save_requested.connect(self.save_picture)
        stage.folder_requested.connect(self.open_folder)
        stage.recipe_requested.connect(self.use_recipe)
        stage.strip.answered.connect(lambda: generation.answer(retry=True))
        stage.strip.closed.connect(lambda: generation.answer(retry=False))
        stage.empty.prompt_chosen.connect(self._start_with)
        stage.picture.step_requested.connect(self.step_picture)
        timeline.picture_chosen.connect(lambda row: generation.show(self._history.picture(row)))
        timeline.recipe_requested.connect(lambda row: self.use_recipe(self._history.picture(row)))
        timeline.now_chosen.connect(lambda: generation.show(None))
        timeline.remove_requested.connect(generation.remove)
        timeline.stop_all_requested.connect(generation.stop_all)
        generation.changed.connect(self.show_generation)
        generation.progress_changed.connect(self.show_progress)
        generation.announced.connect(self._announce)
        self._history.image_loaded.connect(lambda _: self.show_generation())
        self._memory.changed.connect(self.show_prediction)
        self.splitter.splitterMoved.connect(self._edge_moved)

    def generate(self, first: bool = False) -> None:
        """Ctrl+Enter from anywhere; an empty prompt is asked for where it is typed."""
        for field in (self.composer.count, self.composer.steps, self.composer.seed, self.composer.guidance):
            field.interpretText()
        if not self._composer.prompt.strip():
            prompt = self.composer.prompt.prompt
            prompt.setFocus(Qt.FocusReason.OtherFocusReason)
            QToolTip.showText(prompt.mapToGlobal(QPoint(0, prompt.height())), "Type what you would like to see.")
            return
        self._generation.generate(first)

    def _start_with(self, prompt: str) -> None:
        self._composer.set_prompt(prompt)
        self.generate()

    def _choose_model(self, model: str) -> None:
        card = self._models.usable(model)
        if card is not None and card is not self._composer.model:
            self._composer.set_model(card)
            self._generation.prepare()

    def choose_lora_file(self) -> None:
        files, _ = QFileDialog.getOpenFileNames(self, "Add a LoRA", "", "LoRA (*.safetensors)")
        for file in files:
            self.add_lora_file(file)

    def add_lora_file(self, file: str) -> None:
        """What does not come with the model is recognised by its content."""
        own = [lora.file for lora in self._composer.model.loras] if self._composer.model else []
        if self._composer.add_lora(file) and file not in own:
            self._generation.inspect_lora(file)

    def use_recipe(self, picture: Picture | None = None) -> None:
        wanted = picture or self._generation.shown
        if wanted is not None:
            self._composer.restore(wanted.request, wanted.seed)

    def copy_picture(self) -> None:
        if (picture := self._generation.shown) is not None:
            QGuiApplication.clipboard().setImage(self._history.image(picture))

    def save_picture(self) -> None:
        picture = self._generation.shown
        if picture is None:
            return
        name = Path(picture.file).name or f"{picture.seed}.png"
        target, _ = QFileDialog.getSaveFileName(self, "Save picture as", name, "PNG (*.png)")
        if target:
            self._generation.save_copy(picture, target)

    def open_folder(self) -> None:
        if (picture := self._generation.shown) is not None and picture.file:
            self._open_folder(picture.file)

    def _open_folder(self, file: str) -> None:
        QDesktopServices.openUrl(QUrl.fromLocalFile(str(Path(file).parent)))

    def step_picture(self, by: int) -> None:
        """Left is the one before in time, so the next row."""
        shown = self._generation.shown
        row = self._history.row_of(shown.id) if shown is not None else -1
        wanted = self._history.picture((row if row is not None else 0) - by)
        if wanted is not None:
            self._generation.show(wanted)

    # -- what is shown: state to widgets --

    def show_settings(self) -> None:
        ui, state = self.composer, self._composer
        card = state.model
        ui.model.set_model(card.name if card else "No model", self._cover_of(card.folder if card else ""))
        choices = [(one.model, one.name, one.problem) for one in self._models.cards]
        ui.model.set_choices(choices)
        ui.prompt.set_prompt(state.prompt)
        if state.negative:
            ui.prompt.set_negative(state.negative)
        ui.prompt.set_surprise_offered(bool(card and card.suggestions))
        self.stage.empty.set_suggestions(*self._suggestions_of(card))
        ui.loras.set_known(state.known_loras() + [(one.file, one.name) for one in self._models.loras])
        ui.loras.set_loras([lora_view(one, self._lora_cover(one.file)) for one in state.loras])
        ui.size_picker.set_presets(list(card.presets) if card else [])
        ui.size_picker.set_choosable(card is None or card.size_min < card.size_max)
        ui.size_picker.set_size(state.width, state.height)
        ui.count.set_value(state.count)
        ui.steps.set_value(state.steps)
        ui.seed.set_value(state.seed)
        ui.seed.set_mode(state.seed_mode)
        ui.set_model_there(card is not None)
        ui.set_guidance_shown(state.guidance is not None)
        if state.guidance is not None:
            ui.guidance.set_value(state.guidance)
        self._show_button()

    def show_generation(self) -> None:
        generation, stage = self._generation, self.stage
        self.composer.model.set_state(generation.model.words, generation.model.loading)
        self._show_button()
        self.show_prediction()
        trouble = generation.trouble
        if trouble is not None:
            problem = trouble.problem
            stage.strip.set_problem(problem.what, problem.todo, trouble.button, problem.detail)
        stage.strip.setVisible(trouble is not None)
        making = generation.running is not None
        self.composer.footer.set_stoppable(making)
        self.timeline.set_now(making, generation.stopped is not None)
        self.timeline.set_waiting([(job.id, job.request.prompt) for job in generation.waiting])
        shown = generation.shown
        active = generation.running or generation.stopped
        stage.set_tools(
            picture=shown is not None, saved=bool(shown and shown.file), making=making and shown is None
        )
        if shown is not None:
            stage.show_empty(False)
            stage.set_title(shown.request.prompt)
            stage.picture.set_progress(None)
            stage.picture.set_picture(self._history.image(shown), (shown.width, shown.height), file=shown.file)
            stage.picture.set_caption(*generation.caption(shown))
            stage.picture.set_description(shown.request.prompt)
            self.timeline.select(self._history.row_of(shown.id))
        elif active is not None:
            stage.show_empty(False)
            stage.set_title(active.job.request.prompt)
            stage.picture.set_description(active.job.request.prompt)
            self.timeline.select(None)
        else:
            stage.show_empty(True)
            stage.set_title("")
        self.show_progress()

    def show_progress(self) -> None:
        """Several times a second: the running picture only."""
        generation, stage = self._generation, self.stage
        active = generation.running or generation.stopped
        if active is None:
            return
        mark = "stop" if generation.trouble is None else "error"
        self.timeline.now.set_progress(
            active.preview, active.step, active.steps, "" if generation.running else mark
        )
        if generation.shown is None:
            tag = "Preview" if active.preview is not None else ""
            stage.picture.set_picture(active.preview, (active.width, active.height), tag=tag)
            stage.picture.set_progress(active.fraction)
            stage.picture.set_caption(*generation.step_words())

    def show_prediction(self) -> None:
        footer, generation, memory = self.composer.footer, self._generation, self._memory
        fits, sentence = generation.prediction()
        if memory.now is None:
            footer.line.set_prediction(fits, sentence, "")
            return
        others, ours, adds, total = generation.memory_bar(memory.now)
        amount = f"{words.gigabytes(others + ours + adds)} of {words.gigabytes(total)} GB"
        footer.line.set_prediction(fits, sentence, "" if fits == "too large" else amount)
        footer.bar.set_bytes(others, ours, adds, total)

    def _show_button(self) -> None:
        text, icon = self._generation.button()
        self.composer.footer.set_button(text, icon, main=self._generation.trouble is None)

    def _cover_of(self, folder: str) -> QImage | None:
        """The model's cover.png, if it brings one."""
        if folder != self._cover[0]:
            file = Path(folder) / "cover.png"
            self._cover = (folder, images.load(file) if folder and file.is_file() else None)
        return self._cover[1]

    def _lora_cover(self, file: str) -> QImage | None:
        """The picture beside a LoRA's file, by the names that other programs look for too."""
        if file not in self._lora_covers:
            beside = [Path(file).with_suffix(suffix) for suffix in (".png", ".preview.png")]
            found = next((one for one in beside if one.is_file()), None)
            self._lora_covers[file] = images.load_small(found, COVER_SIDE) if found else None
        return self._lora_covers[file]

    def _suggestions_of(self, card: ModelCard | None) -> tuple[tuple[str, ...], tuple[QImage | None, ...]]:
        """Three prompts, and their pictures where the model brings `suggestion-1.png` and so on."""
        if card is None:
            return (), ()
        if card.folder != self._suggestions[0]:
            files = [Path(card.folder) / f"suggestion-{number}.png" for number in (1, 2, 3)]
            shown = tuple(images.load_small(file, COVER_SIDE) if file.is_file() else None for file in files)
            self._suggestions = (card.folder, shown)
        return card.suggestions[:3], self._suggestions[1]

    def _announce(self, sentence: str) -> None:
        if QAccessible.isActive():
            QAccessible.updateAccessibility(QAccessibleAnnouncementEvent(self.stage.picture, sentence))

    # -- sizes --

    def set_composer_width(self, width: int) -> None:
        """What the person chose; kept through changes of the window's size."""
        self._own_width = width
        self._fit()

    def _edge_moved(self, position: int, index: int) -> None:
        self._own_width = self.composer.width()
        self.edge_dragged.emit(self._own_width)

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802  (Qt's name)
        super().resizeEvent(event)
        self._fit()

    def changeEvent(self, event: QEvent) -> None:  # noqa: N802
        super().changeEvent(event)
        if event.type() == QEvent.Type.PaletteChange and hasattr(self, "splitter"):
            self.show_settings()

    def _fit(self) -> None:
        """Places by the window's width and height, as the table of sizes says."""
        window = self.window()
        width, height = window.width(), window.height()
        limits, line = theme.LAYOUT["composer"], theme.LAYOUT["timeline"]
        small = width < SMALL_WIDTH
        if small:
            wanted = limits["min"]
        elif width < 1600:
            wanted = limits["normal"]
        else:
            wanted = 400 if width < 2400 else limits["max"]
        if self._own_width is not None and not small:
            wanted = min(limits["max"], max(limits["min"], self._own_width))
        if small:
            self.timeline.set_side(68, line["min"])
        elif width < 2400:
            self.timeline.set_side(80, line["normal"])
        else:
            self.timeline.set_side(88, line["wide"])
        self.composer.set_margin(12 if small else 16)
        self.composer.prompt.set_least_lines(2 if height < SMALL_HEIGHT else 4)
        self.stage.set_title_shown(not small)
        room = self.splitter.width()
        if room > wanted:
            self.splitter.setSizes([wanted - 1, room - wanted])  # the line at its edge belongs to the composer
