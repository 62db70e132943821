"""`python -m app` from nothing to a painted window, in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.__main__ import NO_DISPLAY, main, tell_bugs
from app.state.generation import GenerationState

HEAVY = {"torch", "transformers", "diffusers", "tokenizers", "safetensors", "huggingface_hub", "PIL", "cuda"}

START = """
import json, sys
from PySide6.QtCore import QEvent, QObject, QTimer
from PySide6.QtWidgets import QApplication
import app.__main__ as program

class Watch(QObject):
    def eventFilter(self, watched, event):
        if event.type() == QEvent.Type.Paint:
            QTimer.singleShot(SECONDS * 1000, finish)
            QApplication.instance().removeEventFilter(self)
        return False

def finish():
    window = next(w for w in QApplication.topLevelWidgets() if w.windowTitle() == "Tonfa")
    heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(NAMES))
    print(json.dumps({"title": window.windowTitle(), "visible": window.isVisible(), "heavy": heavy}), flush=True)
    window.close()

watch = Watch()
original = QApplication.exec
def run(*arguments):
    QApplication.instance().installEventFilter(watch)
    return original()
QApplication.exec = run
sys.exit(program.main())
"""


def start(home: Path, seconds: int) -> tuple[int, dict[str, object]]:
    script = START.replace("SECONDS", str(seconds)).replace("NAMES", repr(sorted(HEAVY)))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TONFA_HOME": str(home)},
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_the_window_is_up_without_torch_and_ends_when_closed(tmp_path: Path) -> None:
    code, told = start(tmp_path, seconds=1)
    assert code == 0
    assert told == {"title": "Tonfa", "visible": True, "heavy": []}


def test_importing_the_program_brings_no_window_and_no_qt() -> None:
    script = "import sys, app.__main__; sys.exit('PySide6' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_a_bug_is_logged_and_told_in_generic_words(
    generation: GenerationState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Joined:
        pass

    joined = Joined()
    joined.generation = generation  # type: ignore[attr-defined]
    monkeypatch.setenv("TONFA_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    tell_bugs(joined)  # type: ignore[arg-type]
    error = ZeroDivisionError("one thing too few")
    sys.excepthook(ZeroDivisionError, error, None)
    assert generation.trouble is not None
    assert generation.trouble.problem.what == "Something went wrong inside Tonfa."
    assert "one thing too few" in generation.trouble.problem.detail
    assert "one thing too few" in (tmp_path / "logs" / "window.log").read_text("utf-8")
    assert "one thing too few" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a display")
def test_without_a_display_there_is_a_sentence_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    assert main() == 3
    assert capsys.readouterr().err.strip() == NO_DISPLAY
