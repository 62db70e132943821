"""The attention of a size is measured once per card, driver, torch and kernels; a file remembers it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.layers import attention_choice
from engine.layers.attention_backend import Backend, SizeClass, choices, size_class
from engine.layers.attention_choice import FILE, MOST_ENTRIES, choose

CARD = torch.device("cuda:0")
KEY = "card 0, driver 1 | 24 heads of 128, up to 4608 tokens, torch.bfloat16"


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "choices", {})
    monkeypatch.setattr(attention_choice, "_machine", lambda index: f"card {index}, driver 1")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[SizeClass]:
    """What was measured; the answer is cudnn."""
    sizes: list[SizeClass] = []

    def measure(size: SizeClass) -> Backend:
        sizes.append(size)
        return "cudnn"

    monkeypatch.setattr(attention_choice, "_measure", measure)
    return sizes


def next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "choices", {})


def flux(tokens: int, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Backend:
    return choose(24, tokens, 128, dtype, CARD, folder)


def test_a_size_is_measured_once(
    measured: list[SizeClass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flux(4608, tmp_path) == flux(4100, tmp_path) == "cudnn"
    assert measured == [size_class(0, 24, 128, 4608, torch.bfloat16)]
    next_process(monkeypatch)
    assert flux(4608, tmp_path) == "cudnn"
    assert len(measured) == 1


def test_what_runs_is_told(measured: list[SizeClass], tmp_path: Path) -> None:
    flux(4608, tmp_path)
    assert attention_choice.choices == {measured[0]: "cudnn"}


def test_another_size_type_or_machine_is_measured_anew(
    measured: list[SizeClass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux(4608, tmp_path)
    flux(4609, tmp_path)
    flux(4608, tmp_path, torch.float16)
    choose(4, 4608, 128, torch.bfloat16, CARD, tmp_path)
    assert len(measured) == 4
    next_process(monkeypatch)
    monkeypatch.setattr(attention_choice, "_machine", lambda index: f"card {index}, driver 2")
    flux(4608, tmp_path)
    assert len(measured) == 5
    assert len(json.loads((tmp_path / FILE).read_text())) == 5


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", f'{{"{KEY}": "fast"}}', f'{{"{KEY}": ["flash"]}}', "\0", "[" * 99999],
    ids=["empty", "a list", "cut", "an unknown name", "no name", "not text", "deep"],
)  # fmt: skip
def test_a_damaged_file_is_made_again(content: str, measured: list[SizeClass], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    assert flux(4608, tmp_path) == "cudnn"
    assert list(json.loads((tmp_path / FILE).read_text()).values()) == ["cudnn"]
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_where_nothing_can_be_written_each_process_measures(
    measured: list[SizeClass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert flux(4608, tmp_path / "file") == flux(4608, tmp_path / "file") == "cudnn"
    next_process(monkeypatch)
    flux(4608, tmp_path / "file")
    assert len(measured) == 2


def test_the_file_does_not_grow_for_ever(measured: list[SizeClass], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({f"old {i}": "flash" for i in range(MOST_ENTRIES)}))
    flux(4608, tmp_path)
    kept = json.loads((tmp_path / FILE).read_text())
    assert len(kept) == MOST_ENTRIES
    assert list(kept.values())[-1] == "cudnn"
    assert "old 0" not in kept


def test_without_memory_to_measure_in_torch_decides_until_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_choice, "_measure", lambda size: None)
    assert flux(4608, tmp_path) == "torch"
    assert not (tmp_path / FILE).exists()
    monkeypatch.setattr(attention_choice, "_measure", lambda size: "flash")
    assert flux(4608, tmp_path) == "flash"


@pytest.mark.gpu
def test_a_card_is_measured_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real machine
    before = dict(choices)
    choices.clear()
    try:
        chosen = choose(4, 320, 128, torch.float16, torch.device("cuda"), tmp_path)
        (key,) = json.loads((tmp_path / FILE).read_text())
        assert torch.cuda.get_device_name() in key
        assert chosen == choices[size_class(0, 4, 128, 320, torch.float16)]
    finally:
        choices.clear()
        choices.update(before)
