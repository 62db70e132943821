"""One window per user, by real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PySide6.QtWidgets import QApplication
from pytestqt.qtbot import QtBot

from app.single_instance import SingleInstance

SECOND = """
from PySide6.QtCore import QCoreApplication
from app.single_instance import SingleInstance
app = QCoreApplication([])
print(SingleInstance().claim())
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TONFA_HOME", str(tmp_path))
    return tmp_path


def second_start() -> str:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_a_second_start_raises_the_first_and_ends(home: Path, qapp: QApplication, qtbot: QtBot) -> None:
    first = SingleInstance()
    assert first.claim()
    with qtbot.waitSignal(first.raise_requested, timeout=30_000):
        assert second_start() == "False"
    first.release()
    assert second_start() == "True"


def test_one_that_was_killed_is_no_obstacle(home: Path, qapp: QApplication) -> None:
    dies = SECOND.replace(
        "print(SingleInstance().claim())", "i = SingleInstance(); i.claim(); import os; os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", dies], timeout=60, check=False)
    assert (home / "settings" / "window.lock").exists(), "left behind"
    after = SingleInstance()
    assert after.claim()
    after.release()


def test_other_folders_are_another_program(home: Path, qapp: QApplication, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SingleInstance()
    assert first.claim()
    monkeypatch.setenv("TONFA_HOME", str(home / "other"))
    assert second_start() == "True"
    first.release()
