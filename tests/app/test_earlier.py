"""Pictures of an earlier start are read from their files, whoever wrote them."""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from pytestqt.qtbot import QtBot

from app.state.composer import LOST, ComposerState
from app.state.earlier import read, read_todays, request_of
from app.state.generation import GenerationState
from app.state.history import History
from engine.requests import ImageRequest, LoraChoice

RECIPE = {
    "prompt": "ein roter Fuchs, 狐", "negative": "", "model": "Tonfa Mini", "loras": [],
    "width": 64, "height": 64, "steps": 8, "seed": 7, "guidance": 3.0, "cfg": 1.0,
}  # fmt: skip


def save(path: Path, recipe: Any = RECIPE, side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "what other programs read")
    texts.add_text("tonfa", json.dumps(recipe, ensure_ascii=False))
    Image.new("RGB", (side, side), "red").save(path, pnginfo=texts)


@pytest.fixture
def today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TONFA_HOME", str(tmp_path))
    return tmp_path / "pictures" / date.today().isoformat()


def test_todays_pictures_come_back_below_those_of_this_start(
    history: History, qtbot: QtBot, today: Path, generation: GenerationState
) -> None:
    for number in (1, 2, 10):
        save(today / f"{number:04d}-7.png", {**RECIPE, "seed": number})
    save(today / "notes.png")
    (today / "0011-1.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 64)).save(today / "0012-1.png")
    with qtbot.waitSignal(history.earlier_added, timeout=5000):
        read_todays(208, history.add_earlier)
    shown = [history.picture(row) for row in range(history.rowCount())]
    assert [one.seed for one in shown if one is not None] == [10, 2, 1]
    newest = shown[0]
    assert newest is not None
    assert newest.request.prompt == "ein roter Fuchs, 狐"
    left, right, _ = generation.caption(newest)
    assert "64 × 64" in left
    assert right == "", "nobody knows any more how long it took"


def test_a_day_without_pictures_makes_no_folder(history: History, qtbot: QtBot, today: Path) -> None:
    with qtbot.assertNotEmitted(history.earlier_added, wait=200):
        read_todays(208, history.add_earlier)
    assert not today.exists()


def test_what_was_saved_meanwhile_is_not_listed_twice(history: History, today: Path) -> None:
    save(today / "0001-7.png")
    found = read(today / "0001-7.png", 208)
    assert found is not None
    history.add_earlier([found])
    history.add_earlier([found])
    assert history.rowCount() == 1


def test_the_files_of_a_real_engine_are_read(tmp_path: Path) -> None:
    from engine import recipe
    from tests.engine.test_recipe import MADE, PIXELS

    (tmp_path / "a.png").write_bytes(recipe.png_bytes(PIXELS, MADE))
    found = read(tmp_path / "a.png", 208)
    assert found is not None
    assert (found.request.prompt, found.request.seed) == (MADE.prompt, MADE.seed)
    assert [one.file for one in found.request.loras] == [one.name for one in MADE.loras]


@pytest.mark.parametrize(
    "damage",
    [
        "", "[]", "null", "7", "[" * 100_000, "1" * 10_000, '{"prompt": "x"}',
        *(
            json.dumps({**RECIPE, name: value})
            for name, value in (
                ("steps", "many"), ("prompt", ["x"]), ("seed", -1), ("cfg", 1e300), ("loras", 1),
                ("loras", [{"name": "x", "strength": "strong"}]), ("loras", [{"name": "x", "strength": 1}] * 100),
            )
        ),
    ],
)  # fmt: skip
def test_a_damaged_recipe_is_none(damage: str) -> None:
    assert request_of(damage) is None


def test_its_loras_are_found_by_name(composer: ComposerState) -> None:
    loras = (LoraChoice("3D look", 0.4), LoraChoice("Storybook ink", 1.2))
    composer.restore(ImageRequest("a fox", loras=loras, width=9999 // 2, height=256), 7)
    assert composer.width == 384, "snapped to what this model takes"
    known, lost = composer.loras
    assert (known.on, known.strength) == (True, 0.4)
    assert (lost.on, lost.problem) == (False, LOST)
    assert os.path.isabs(composer.next_request("").loras[0].file)
