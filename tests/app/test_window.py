"""The window joined with its states, an engine that only notes what it is told, and real events."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PySide6.QtCore import QMimeData, QPoint, QPointF, QRect, Qt, QUrl
from PySide6.QtGui import QDragEnterEvent, QDragLeaveEvent, QDropEvent
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QAbstractButton, QApplication, QLineEdit, QSlider, QWidget
from pytestqt.qtbot import QtBot

from app.main_window import MainWindow
from app.pages.generate_page import GeneratePage
from app.state.composer import ComposerState
from app.state.generation import GenerationState
from app.state.history import History
from app.state.memory import MemoryState
from app.state.models import ModelsState
from app.state.settings import Settings
from app.theme import Theme
from app.widgets.button import Button
from app.widgets.focus_ring import FocusRing
from engine.events import Cancelled, Failed, Finished, ImageDone, ImageStarted, Loading, Planned, Prepared, StepDone
from engine.folders import ModelCard
from engine.monitor import Sample
from engine.problems import engine_stopped
from engine.requests import ImageRequest, InspectRequest
from tests.app.conftest import NotingEngine, picture

GIB = 2**30
Key, Mod = Qt.Key, Qt.KeyboardModifier


@dataclass
class Opened:
    window: MainWindow
    page: GeneratePage
    generation: GenerationState
    composer: ComposerState
    memory: MemoryState
    history: History
    engine: NotingEngine

    def image_jobs(self) -> list[tuple[int, ImageRequest]]:
        return [(job, request) for job, request, _ in self.engine.submitted if isinstance(request, ImageRequest)]

    def make(self, prompt: str) -> None:
        self.composer.set_prompt(prompt)
        self.page.generate()
        job, request = self.image_jobs()[-1]
        self.generation.on_event(job, ImageStarted(1, 1, request.seed, 8, 256, 256))
        self.generation.on_event(job, StepDone(1, 1, 8, 8, 0.8, picture(16, 16)))
        self.generation.on_event(job, ImageDone(1, 1, request.seed, picture(256, 256), "", {}, 1.2))
        self.generation.on_event(job, Finished())


@pytest.fixture
def opened(
    qtbot: QtBot,
    dark: Theme,
    engine: NotingEngine,
    composer: ComposerState,
    history: History,
    generation: GenerationState,
    card: ModelCard,
) -> Opened:
    memory, models = MemoryState(), ModelsState()
    models.cards = [card]
    page = GeneratePage(composer, generation, history, memory, models)
    window = MainWindow(page, generation, composer, memory, Settings())
    qtbot.addWidget(window)
    window.resize(1280, 800)
    window.show()
    qtbot.waitExposed(window)
    generation.prepare()
    generation.on_event(1, Loading("Loading", 0.5))
    generation.on_event(1, Prepared("Tonfa Mini", "Some Processor", "w4a16", 2.0))
    generation.on_event(1, Finished())
    return Opened(window, page, generation, composer, memory, history, engine)


def test_a_prompt_and_ctrl_enter_become_a_picture(opened: Opened, qtbot: QtBot) -> None:
    ui = opened.page.composer
    QTest.keyClicks(ui.prompt.prompt, "a red fox")
    QTest.keyClick(ui.prompt.prompt, Key.Key_Return, Mod.ControlModifier)
    job, request = opened.image_jobs()[0]
    assert request.prompt == "a red fox"
    assert ui.footer.generate.text() == "Add to queue"
    assert ui.footer.stop.isVisible()
    opened.generation.on_event(job, ImageStarted(1, 1, request.seed, 8, 256, 256))
    opened.generation.on_event(job, StepDone(1, 1, 4, 8, 0.4, picture(16, 16)))
    stage = opened.page.stage
    assert stage.title.text() == "a red fox"
    assert stage.picture.left.text().startswith("Step 4 of 8")
    assert stage.stop.isVisible()
    assert opened.page.timeline.now.isVisible()
    opened.generation.on_event(job, ImageDone(1, 1, request.seed, picture(256, 256), "", {}, 1.2))
    opened.generation.on_event(job, Finished())
    assert stage.picture.right.text() == "1.2 s"
    assert stage.picture.accessibleName() == "a red fox"
    assert not stage.stop.isVisible()
    assert stage.copy.isVisible()
    assert not opened.page.timeline.now.isVisible()
    assert opened.page.timeline.list.model().rowCount() == 1
    assert ui.footer.generate.text() == "Generate"


def test_before_the_first_picture_there_is_a_way_to_begin(opened: Opened, qtbot: QtBot) -> None:
    empty = opened.page.stage.empty
    assert empty.isVisible()
    first = empty.first()
    assert isinstance(first, QAbstractButton)
    QTest.mouseClick(first, Qt.MouseButton.LeftButton)
    assert opened.image_jobs()[0][1].prompt == "a red fox"
    assert opened.page.composer.prompt.prompt.toPlainText() == "a red fox"
    assert not empty.isVisible()


def test_generate_without_a_prompt_asks_for_one_where_it_is_typed(opened: Opened) -> None:
    opened.page.composer.footer.generate.click()
    assert opened.image_jobs() == []
    assert opened.page.composer.prompt.prompt.hasFocus()


def test_a_failure_is_one_sentence_one_button_and_holds_the_accent(opened: Opened) -> None:
    opened.composer.set_prompt("a red fox")
    opened.page.generate()
    opened.page.generate()
    job, request = opened.image_jobs()[0]
    opened.generation.on_event(job, ImageStarted(1, 1, request.seed, 8, 256, 256))
    opened.generation.on_event(job, StepDone(1, 1, 5, 8, 0.5, picture(16, 16)))
    opened.engine.held = True
    opened.generation.on_event(job, Failed(engine_stopped("Exit code -9.")))
    strip = opened.page.stage.strip
    assert strip.isVisible()
    assert strip.what.text() == "The engine stopped and was started again."
    assert strip.main_button.text() == "Continue"
    assert strip.details_button.isVisible()
    assert not strip.details.isVisible()
    strip.details_button.click()
    assert strip.details.toPlainText() == "Exit code -9."
    assert opened.page.timeline.now.isVisible()
    assert opened.page.timeline.waiting.text() == "1 waiting"
    assert opened.window.status.state.text() == "Waiting for you"
    strip.main_button.click()
    assert not strip.isVisible()
    assert opened.image_jobs()[-1][1] == request
    assert opened.engine.went_on == 1


def test_numbers_typed_but_not_left_count_for_generate(opened: Opened) -> None:
    opened.composer.set_prompt("x")
    steps = opened.page.composer.steps
    steps.lineEdit().setFocus()
    steps.selectAll()
    QTest.keyClicks(steps.lineEdit(), "12")
    QTest.keyClick(steps.lineEdit(), Key.Key_Return, Mod.ControlModifier)
    assert opened.image_jobs()[0][1].steps == 12


def test_settings_reach_the_request(opened: Opened) -> None:
    ui = opened.page.composer
    opened.composer.set_prompt("x")
    ui.count.setValue(3)
    ui.guidance.setValue(2.5)
    ui.seed.setValue(1234)
    row = ui.loras.rows()[0]
    row.switch.click()
    row.field.setValue(0.75)
    ui.size_picker.select.activated.emit(1)
    opened.page.generate()
    request = opened.image_jobs()[0][1]
    assert (request.count, request.guidance, request.seed) == (3, 2.5, 1234)
    assert (request.width, request.height) == (320, 192)
    assert [(one.file, one.strength) for one in request.loras] == [("/nowhere/lora-3d.safetensors", 0.75)]


def test_a_dropped_lora_is_added_and_looked_into(opened: Opened, tmp_path: Path) -> None:
    file = tmp_path / "Storybook ink.safetensors"
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(file)), QUrl.fromLocalFile(str(tmp_path / "notes.txt"))])
    drop = QDropEvent(QPointF(10, 10), Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Mod.NoModifier)
    opened.page.composer.dropEvent(drop)
    assert [one.name for one in opened.composer.loras] == ["3D look", "Storybook ink"]
    assert opened.engine.submitted[-1][1] == InspectRequest(str(file))
    assert len(opened.page.composer.loras.rows()) == 2


def test_files_dragged_over_a_field_are_the_composers(opened: Opened, tmp_path: Path) -> None:
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(tmp_path / "a.safetensors"))])
    ui = opened.page.composer
    for target in (ui.prompt.prompt.viewport(), ui.steps.lineEdit(), ui):
        enter = QDragEnterEvent(
            QPoint(3, 3), Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Mod.NoModifier
        )
        QApplication.sendEvent(target, enter)
        assert enter.isAccepted()
        assert ui._hint.isVisible(), target
        ui.dragLeaveEvent(QDragLeaveEvent())
        assert not ui._hint.isVisible()


def test_the_timeline_shows_and_the_arrows_walk(opened: Opened) -> None:
    for prompt in ("first", "second", "third"):
        opened.make(prompt)
    stage, timeline = opened.page.stage, opened.page.timeline
    assert stage.title.text() == "third"
    timeline.list.clicked.emit(timeline.list.model().index(2, 0))
    assert stage.title.text() == "first"
    stage.picture.setFocus()
    QTest.keyClick(stage.picture, Key.Key_Right)
    assert stage.title.text() == "second"
    QTest.keyClick(stage.picture, Key.Key_Left)
    QTest.keyClick(stage.picture, Key.Key_Left)
    assert stage.title.text() == "first", "the oldest is the last"


def test_u_uses_the_recipe_of_the_picture_shown(opened: Opened) -> None:
    opened.make("first")
    seed = opened.image_jobs()[0][1].seed
    opened.make("second")
    opened.generation.show(opened.history.picture(1))
    opened.page.stage.picture.setFocus()
    QTest.keyClick(opened.page.stage.picture, Key.Key_U)
    assert opened.page.composer.prompt.prompt.toPlainText() == "first"
    assert opened.composer.seed == seed
    assert opened.composer.seed_mode == "keep"


def test_the_prediction_and_its_bar(opened: Opened) -> None:
    opened.memory.on_sample(Sample(16 * GIB, 11 * GIB, 1 * GIB, 0.06, ()), 0)
    opened.generation.on_planned(Planned(3 * GIB, 0, 12 * GIB, 16 * GIB, 1.2, "fits"))
    line = opened.page.composer.footer.line
    assert line.accessibleName() == "Fits · about 1 s. 7.0 of 16.0 GB"
    assert "2.0 GB more for this picture" in opened.page.composer.footer.bar.toolTip()
    assert opened.window.status.memory.text() == "System memory 5.0 of 16.0 GB"
    assert opened.window.status.load.text() == "CPU 6 %"


def test_what_waits_is_counted_and_can_be_taken_out(opened: Opened) -> None:
    opened.composer.set_prompt("x")
    for _ in range(4):
        opened.page.generate()
    timeline = opened.page.timeline
    assert timeline.waiting.text() == "3 waiting"
    timeline.remove_requested.emit(opened.image_jobs()[-1][0])
    assert opened.engine.cancelled == [opened.image_jobs()[-1][0]]
    QTest.keyClick(opened.window, Key.Key_Period, Mod.ControlModifier)
    assert opened.engine.cancelled[-1] == opened.image_jobs()[0][0]


@pytest.mark.parametrize(
    ("width", "height", "composer_px", "timeline_px"),
    [(900, 600, 304, 92), (1280, 800, 344, 112), (1700, 1000, 400, 112), (2500, 1300, 440, 208)],
)
def test_places_follow_the_table_of_sizes(
    opened: Opened, qtbot: QtBot, width: int, height: int, composer_px: int, timeline_px: int
) -> None:
    opened.window.resize(width, height)
    qtbot.waitUntil(lambda: opened.window.width() == width)
    QApplication.processEvents()
    assert abs(opened.page.composer.width() - composer_px) <= 1
    assert opened.page.timeline.width() == timeline_px
    inside = opened.page.composer.scroll_area.widget()
    assert inside is not None
    assert inside.width() <= opened.page.composer.scroll_area.viewport().width(), "nothing is cut off at the side"


def test_every_control_has_a_name(opened: Opened) -> None:
    opened.make("a red fox")
    nameless = []
    for widget in opened.window.findChildren(QWidget):
        if not isinstance(widget, QAbstractButton | QSlider | QLineEdit) or not widget.isVisible():
            continue
        inner = isinstance(widget, QLineEdit) and widget.objectName() == "qt_spinbox_lineedit"
        if (
            not inner
            and not widget.accessibleName()
            and not (isinstance(widget, QAbstractButton) and widget.text())
        ):
            nameless.append(widget)
    assert nameless == []


def test_tab_follows_the_column_from_top_to_bottom(opened: Opened) -> None:
    ui = opened.page.composer
    wanted = [ui.prompt.prompt, ui.loras.add, ui.size_picker.select, ui.count, ui.steps, ui.seed, ui.guidance,
              ui.footer.generate, opened.page.stage.picture, opened.page.timeline.list]  # fmt: skip
    order, at = [], opened.window.nextInFocusChain()
    for _ in range(400):
        if at in wanted and at not in order:
            order.append(at)
        assert at is not None
        at = at.nextInFocusChain()
    assert order == wanted


def test_f6_goes_through_the_regions(opened: Opened) -> None:
    opened.make("a red fox")
    opened.page.composer.prompt.prompt.setFocus()
    QTest.keyClick(opened.window, Key.Key_F6)
    assert opened.page.stage.picture.hasFocus()
    QTest.keyClick(opened.window, Key.Key_F6)
    assert opened.page.timeline.list.hasFocus()
    QTest.keyClick(opened.window, Key.Key_F6, Mod.ShiftModifier)
    assert opened.page.stage.picture.hasFocus()


def test_the_focus_ring_is_for_the_keyboard(opened: Opened) -> None:
    ring, generate = FocusRing(opened.window), opened.page.composer.footer.generate
    generate.setFocus(Qt.FocusReason.TabFocusReason)
    assert ring.isVisible()
    where = QRect(generate.mapTo(opened.window, QPoint()), generate.size())
    assert ring.geometry() == where.adjusted(-4, -4, 4, 4)
    opened.window.resize(1300, 850)
    QApplication.processEvents()
    where = QRect(generate.mapTo(opened.window, QPoint()), generate.size())
    assert ring.geometry() == where.adjusted(-4, -4, 4, 4), "it moves with what it frames"
    generate.clearFocus()
    generate.setFocus(Qt.FocusReason.MouseFocusReason)
    assert not ring.isVisible()
    opened.page.composer.prompt.prompt.setFocus(Qt.FocusReason.TabFocusReason)
    assert not ring.isVisible(), "the prompt draws its own"


def test_foreign_words_stay_plain_text(opened: Opened) -> None:
    opened.make("<b>bold</b><img src='file:///etc/passwd'>")
    assert opened.page.stage.title.textFormat() == Qt.TextFormat.PlainText
    assert opened.page.stage.title.text().startswith("<b>bold</b>")


def test_the_window_remembers_its_size(opened: Opened, qtbot: QtBot) -> None:
    opened.window.resize(900, 666)
    opened.window.close()
    again = MainWindow(
        GeneratePage(opened.composer, opened.generation, opened.history, opened.memory, ModelsState()),
        opened.generation,
        opened.composer,
        opened.memory,
        Settings(),
    )
    qtbot.addWidget(again)
    assert (again.width(), again.height()) == (900, 666)


def test_a_tall_window_leaves_the_prompt_as_high_as_its_words(opened: Opened, qtbot: QtBot) -> None:
    prompt, high = opened.page.composer.prompt, 144  # four lines and the footer
    for size in ((1280, 800), (1440, 1100)):
        opened.window.resize(*size)
        QApplication.processEvents()
        assert prompt.height() == high


def test_one_size_alone_is_shown_and_not_offered(opened: Opened, card: ModelCard) -> None:
    picker = opened.page.composer.size_picker
    swap = picker.findChild(Button)
    assert picker.select.focusPolicy() == Qt.FocusPolicy.StrongFocus
    assert swap is not None
    assert swap.isVisible()
    opened.composer.set_model(replace(card, presets=(("Square", 256, 256),), size_min=256, size_max=256))
    assert picker.select.currentText() == "Square  256 × 256"
    assert picker.select.focusPolicy() == Qt.FocusPolicy.NoFocus
    assert "this size only" in picker.select.toolTip()
    assert not swap.isVisible()


def test_the_built_in_model_shows_what_its_prompts_and_its_lora_look_like(opened: Opened, qtbot: QtBot) -> None:
    models = ModelsState()
    models.read_built_in()
    opened.composer.set_model(models.cards[0])
    page = opened.page
    prompts, pictures = page._suggestions_of(models.cards[0])
    assert len(prompts) == len(pictures) == 3
    assert None not in pictures
    assert page.composer.loras.rows()[0]._view.cover is not None


def test_stopping_is_told_where_the_picture_was(opened: Opened) -> None:
    opened.composer.set_prompt("a red fox")
    opened.page.generate()
    job, request = opened.image_jobs()[0]
    opened.generation.on_event(job, ImageStarted(1, 1, request.seed, 8, 256, 256))
    opened.generation.on_event(job, StepDone(1, 1, 5, 8, 0.5, picture(16, 16)))
    opened.page.composer.footer.stop.click()
    opened.generation.on_event(job, Cancelled())
    assert opened.window.status.state.text() == "Stopped"
    assert opened.page.stage.picture.left.text() == "Stopped at step 5 of 8"
    assert opened.page.timeline.now.isVisible()
    assert opened.page.timeline.now.toolTip() == "Stopped"
    assert not opened.page.stage.strip.isVisible()
    assert not opened.page.composer.footer.stop.isVisible()
    opened.make("another")
    assert not opened.page.timeline.now.isVisible()
    assert opened.window.status.state.text() == "Ready"


def test_a_drag_begins_at_the_picture_only(opened: Opened) -> None:
    opened.make("a red fox")
    view = opened.page.stage.picture
    QTest.mousePress(view, Qt.MouseButton.LeftButton, pos=QPoint(2, 2))
    QTest.mouseMove(view, QPoint(60, 60))  # outside the picture: nothing starts, nothing raises
    QTest.mouseRelease(view, Qt.MouseButton.LeftButton, pos=QPoint(60, 60))
