"""This run's pictures: newest first, and memory that does not grow without end."""

from __future__ import annotations

from pathlib import Path

import pytest
from PySide6.QtCore import Qt
from PySide6.QtGui import QImage
from pytestqt.qtbot import QtBot

from app import images
from app.state import history as module
from app.state.history import FILE_ROLE, THUMBNAIL_SIDE, History, Picture
from engine.requests import ImageRequest
from tests.app.conftest import picture


def add(history: History, prompt: str, file: str = "", side: int = 64) -> Picture:
    image = images.to_qimage(picture(side, side))
    return history.add(image, ImageRequest(prompt), seed=1, steps=8, seconds=1.0, predicted_s=None, file=file)


def test_the_newest_stands_first(history: History) -> None:
    first, second = add(history, "first"), add(history, "second", "/x/0002-1.png")
    assert [history.picture(0), history.picture(1), history.picture(2)] == [second, first, None]
    assert history.row_of(first.id) == 1
    index = history.index(0, 0)
    assert history.data(index, Qt.ItemDataRole.AccessibleTextRole) == "second"
    assert history.data(index, FILE_ROLE) == "/x/0002-1.png"
    thumbnail = history.data(index, Qt.ItemDataRole.DecorationRole)
    assert isinstance(thumbnail, QImage)
    assert thumbnail.width() == thumbnail.height() == THUMBNAIL_SIDE


def test_old_pictures_leave_memory_and_come_back_from_their_file(
    history: History, qtbot: QtBot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * 512 * 512 * 3 + 1)
    file = tmp_path / "0001-1.png"
    assert images.to_qimage(picture(512, 512)).save(str(file))
    old = add(history, "old", str(file), 512)
    for words in ("newer", "newest"):
        add(history, words, str(file), 512)
    with qtbot.waitSignal(history.image_loaded, timeout=5000) as loaded:
        assert history.image(old).width() == THUMBNAIL_SIDE, "the thumbnail stands in"
    assert loaded.args == [old.id]
    assert history.image(old).width() == 512


def test_a_picture_without_a_file_stays_in_memory(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 1)
    first = add(history, "first", side=300)
    add(history, "second", side=300)
    assert history.image(first).width() == 300


def test_a_file_that_is_gone_leaves_the_thumbnail(
    history: History, qtbot: QtBot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 1)
    lost = add(history, "lost", str(tmp_path / "gone.png"), 512)
    add(history, "other", str(tmp_path / "gone too.png"), 512)
    assert history.image(lost).width() == THUMBNAIL_SIDE
    with qtbot.assertNotEmitted(history.image_loaded, wait=200):
        pass
