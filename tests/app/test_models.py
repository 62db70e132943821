"""Models and LoRAs found on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytestqt.qtbot import QtBot

from app.state.models import ModelsState
from engine.folders import ModelCard


def test_folders_are_read_on_another_thread(qtbot: QtBot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bundle.json").write_text("{", "utf-8")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "ink.safetensors").write_bytes(b"")
    monkeypatch.setenv("TONFA_MODELS", str(tmp_path))
    state = ModelsState()
    with qtbot.waitSignal(state.changed, timeout=10_000):
        state.read_all()
    assert state.listed
    broken = next(card for card in state.cards if card.name == "broken")
    assert broken.problem
    assert [(one.name, one.file) for one in state.loras] == [("ink", str(tmp_path / "loras" / "ink.safetensors"))]


def test_a_model_with_a_problem_is_never_chosen(qtbot: QtBot, card: ModelCard) -> None:
    state = ModelsState()
    assert state.usable() is None
    state.cards = [ModelCard("bad", "Bad", "/bad", problem="A file is missing."), card]
    assert state.usable() is card
    assert state.usable("bad") is card
    assert state.usable(card.model) is card
