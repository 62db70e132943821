"""The whole window with the real engine in its own process and a tiny model of random weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PySide6.QtCore import QEventLoop, Qt, QTimer
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication

from app import images
from app.__main__ import Program

REPO = Path(__file__).resolve().parents[2]
PATIENCE_S = 120
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="stops a process as POSIX does")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in another process: the window's has no torch."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    maker = REPO / "tests" / "end_to_end" / "tiny_bundle.py"
    subprocess.run([sys.executable, str(maker), str(folder), "int4"], cwd=REPO, timeout=300, check=True)
    return folder


class Opened:
    """A running program, and how to wait for it."""

    def __init__(self, app: QApplication, model: Path) -> None:
        self.program = Program(app)
        self.program.settings.model = str(model)
        self.program.start()

    def wait(self, condition: Callable[[], object]) -> None:
        loop, ticks, late = QEventLoop(), QTimer(), QTimer()
        ticks.timeout.connect(lambda: loop.quit() if condition() else None)
        ticks.start(10)
        late.setSingleShot(True)
        late.timeout.connect(lambda: loop.exit(1))
        late.start(PATIENCE_S * 1000)
        if not condition():
            assert loop.exec() == 0, f"not within {PATIENCE_S} s: {self.told()}"

    def told(self) -> str:
        generation = self.program.generation
        return f"{generation.status()} {generation.model} {generation.trouble} jobs {len(generation.jobs)}"

    def ready(self) -> None:
        self.wait(lambda: self.program.generation.model.words.startswith("Ready"))

    def idle(self) -> None:
        self.wait(lambda: not self.program.generation.jobs)

    def ask(self, prompt: str, steps: int = 2) -> None:
        """As a person does: type, Ctrl+Enter."""
        self.program.composer.set_steps(steps)
        field = self.program.page.composer.prompt.prompt
        field.selectAll()
        QTest.keyClicks(field, prompt)
        QTest.keyClick(field, Qt.Key.Key_Return, Qt.KeyboardModifier.ControlModifier)

    def stepping(self) -> None:
        """Until the running picture has done a step."""
        self.wait(lambda: (running := self.program.generation.running) is not None and running.step > 0)


@pytest.fixture(scope="module")
def opened(qapp: QApplication, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    home = os.environ["TONFA_HOME"]
    os.environ["TONFA_HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ["TONFA_MODELS"] = str(model.parent)
    it = Opened(qapp, model)
    it.ready()
    yield it
    it.program.window.close()
    it.program.close()
    os.environ["TONFA_HOME"] = home
    del os.environ["TONFA_MODELS"]


def test_a_prompt_becomes_a_picture_on_the_stage_and_on_disk(opened: Opened) -> None:
    history, generation = opened.program.history, opened.program.generation
    steps: list[int] = []
    generation.progress_changed.connect(lambda: steps.append(generation.running.step if generation.running else 0))
    opened.ask("a red fox in the snow", steps=3)
    opened.idle()
    assert steps == [1, 2, 3]
    assert generation.trouble is None
    picture = history.picture(0)
    assert picture is not None
    assert generation.shown is picture
    assert (picture.width, picture.height, picture.steps) == (64, 64, 3)
    file = Path(picture.file)
    assert file.name == f"0001-{picture.seed}.png"
    saved = images.load(file)
    assert saved is not None
    assert (images.to_pixels(saved) == images.to_pixels(history.image(picture))).all(), "shown is what is kept"
    assert opened.program.page.stage.title.text() == "a red fox in the snow"


def test_the_same_recipe_gives_the_same_picture(opened: Opened) -> None:
    history = opened.program.history
    opened.ask("two cats")
    opened.idle()
    first = history.picture(0)
    opened.program.page.use_recipe(first)
    opened.program.page.generate()
    opened.idle()
    again = history.picture(0)
    assert first is not None
    assert again is not None
    assert again is not first
    assert again.seed == first.seed
    assert (images.to_pixels(history.image(again)) == images.to_pixels(history.image(first))).all()


def test_a_lora_changes_the_picture_and_says_how_much_of_it_is_used(opened: Opened) -> None:
    history, page = opened.program.history, opened.program.page
    opened.program.composer.set_seed(7)
    opened.ask("a house")
    opened.idle()
    row = page.composer.loras.rows()[0]
    pictures = [images.to_pixels(history.image(history.picture(0)))]  # type: ignore[arg-type]
    for strength in (1.5, 0.0):
        row.switch.setChecked(True)
        row.field.setValue(strength)
        page.generate()
        opened.idle()
        pictures.append(images.to_pixels(history.image(history.picture(0))))  # type: ignore[arg-type]
    without, strong, zero = pictures
    assert (strong != without).any()
    assert (zero == without).all(), "strength 0 is no LoRA"
    words = opened.program.composer.loras[0].words()
    assert words.startswith("all ")
    assert words.endswith(" layers used")
    row.switch.setChecked(False)


def test_the_prediction_comes_from_the_engine(opened: Opened) -> None:
    opened.wait(lambda: opened.program.generation.planned is not None)
    assert opened.program.page.composer.footer.line.accessibleName().startswith("Fits")


def test_a_foreign_file_is_refused_in_words_and_the_queue_goes_on(opened: Opened, tmp_path: Path) -> None:
    bad = tmp_path / "not a LoRA.safetensors"
    bad.write_bytes(b"\xff" * 64)
    opened.program.page.add_lora_file(str(bad))
    opened.wait(lambda: opened.program.composer.loras[-1].problem)
    assert not opened.program.composer.loras[-1].on
    assert opened.program.generation.trouble is None
    opened.program.composer.remove_lora(str(bad))


def test_stop_ends_a_picture_and_leaves_no_file(opened: Opened) -> None:
    before, rows = set(all_files()), opened.program.history.rowCount()
    opened.ask("the sea", steps=100)
    opened.stepping()
    QTest.keyClick(opened.program.window, Qt.Key.Key_Period, Qt.KeyboardModifier.ControlModifier)
    opened.idle()
    assert opened.program.history.rowCount() == rows
    assert set(all_files()) == before
    assert opened.program.generation.status()[0] == "Stopped"
    assert opened.program.page.stage.picture.left.text().startswith("Stopped at step ")


@needs_signals
def test_an_engine_that_does_not_answer_never_freezes_the_window(opened: Opened) -> None:
    """With the child stopped nothing answers: if any call on the GUI thread waited for it, this would hang."""
    engine, generation = opened.program.engine, opened.program.generation
    rows = opened.program.history.rowCount()
    opened.ask("first", steps=100)
    opened.stepping()
    child = engine.pid
    assert child is not None
    os.kill(child, signal.SIGSTOP)
    try:
        for number in range(5):
            opened.ask(f"while it sleeps {number}")
            opened.program.composer.set_steps(number + 1)
        generation.remove(generation.waiting[-1].id)
        generation.stop()
        ticks: list[None] = []
        timer = QTimer()
        timer.timeout.connect(lambda: ticks.append(None))
        timer.start(5)
        opened.wait(lambda: len(ticks) > 50)
        assert len(generation.waiting) == 4
    finally:
        os.kill(child, signal.SIGCONT)
    opened.idle()
    assert opened.program.history.rowCount() == rows + 4


@needs_signals
def test_a_killed_engine_is_one_sentence_a_restart_and_the_same_queue(opened: Opened) -> None:
    generation, strip = opened.program.generation, opened.program.page.stage.strip
    rows = opened.program.history.rowCount()
    opened.ask("killed", steps=100)
    opened.ask("waits")
    opened.ask("waits, too")
    opened.stepping()
    child = opened.program.engine.pid
    assert child is not None
    os.kill(child, signal.SIGKILL)
    opened.wait(lambda: generation.trouble is not None)
    assert strip.isVisible()
    assert strip.what.text() == "The engine stopped and was started again."
    assert len(generation.waiting) == 2
    opened.ready()
    assert opened.program.engine.pid not in (None, child)
    assert len(generation.waiting) == 2, "the queue waits for the answer"
    opened.program.composer.set_steps(2)
    assert generation.trouble is not None
    strip.main_button.click()
    assert not strip.isVisible()
    opened.stepping()
    generation.stop()  # a hundred steps were enough to be hit; nobody needs to wait for them
    opened.idle()
    assert opened.program.history.rowCount() == rows + 2


@needs_signals
def test_an_engine_killed_while_idle_comes_back(opened: Opened) -> None:
    child = opened.program.engine.pid
    assert child is not None
    os.kill(child, signal.SIGKILL)
    opened.wait(lambda: opened.program.generation.trouble is not None)
    opened.program.page.stage.strip.close_button.click()
    opened.ready()
    opened.ask("again")
    opened.idle()
    assert opened.program.generation.trouble is None
    assert opened.program.history.picture(0).request.prompt == "again"  # type: ignore[union-attr]


def test_the_next_start_goes_on_where_this_one_ended(opened: Opened, qapp: QApplication) -> None:
    """Settings are kept when Generate is pressed: whoever pulls the plug loses nothing."""
    before = opened.program
    before.composer.set_seed(4711)
    opened.ask("kept", steps=3)
    opened.idle()
    after = Program(qapp)
    after.start()
    opened.wait(lambda: after.history.rowCount() > 0 and after.generation.model.words.startswith("Ready"))
    assert (after.composer.seed, after.composer.seed_mode, after.composer.steps) == (4711, "keep", 3)
    assert after.history.rowCount() == before.history.rowCount()
    assert after.generation.shown is after.history.picture(0)
    assert after.page.stage.title.text() == "kept"
    assert after.composer.prompt == "", "words are in the pictures only"
    after.page.use_recipe()
    assert after.composer.prompt == "kept"
    after.window.close()
    after.close()
    before.window.activateWindow()
    opened.wait(before.window.isActiveWindow)


def test_closing_while_a_picture_is_made_ends_everything(opened: Opened) -> None:
    """The last test of this window."""
    opened.ask("never finished", steps=100)
    opened.ask("never begun")
    opened.stepping()
    child = opened.program.engine.pid
    assert child is not None
    opened.program.window.close()
    assert not opened.program.window.isVisible()
    opened.wait(opened.program.engine.isFinished)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert [file for file in all_files() if file.suffix != ".png"] == []
    opened.idle()  # both were answered


def all_files() -> list[Path]:
    return [file for file in (Path(os.environ["TONFA_HOME"]) / "pictures").rglob("*") if file.is_file()]
