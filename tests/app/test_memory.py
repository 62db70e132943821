"""Live memory: whose it is, and what is said about it."""

from __future__ import annotations

from PySide6.QtWidgets import QApplication
from pytestqt.qtbot import QtBot

from app.state.memory import KEPT, MemoryState
from engine.monitor import GpuSample, Sample

GIB = 2**30


def card(index: int, used: float, ours: float | None) -> GpuSample:
    mine = None if ours is None else int(ours * GIB)
    return GpuSample(index, f"Card {index}", "uuid", 89, "580.1", 12 * GIB, int(used * GIB), mine, 0.98, 180.0, 67)


def system(*gpus: GpuSample) -> Sample:
    return Sample(16 * GIB, 10 * GIB, 2 * GIB, 0.06, gpus)


def test_without_a_card_it_is_system_memory(qapp: QApplication) -> None:
    state = MemoryState()
    state.on_sample(system(), GIB // 2)
    now = state.now
    assert now is not None
    assert (now.ours, now.engine, now.used) == (int(2.5 * GIB), 2 * GIB, 6 * GIB)
    assert state.memory_words() == "System memory 6.0 of 16.0 GB"
    assert state.memory_words(short=True) == "6.0 of 16.0 GB"
    assert state.load_words() == "CPU 6 %"
    assert state.heat_words() == ""
    assert state.where == "On the processor"


def test_with_a_card_it_is_graphics_memory_of_the_one_that_computes(qapp: QApplication) -> None:
    state = MemoryState()
    state.set_device("Card 1")
    state.on_sample(system(card(0, 1.0, 0.0), card(1, 7.3, 6.0)), 0)
    assert state.memory_words() == "Graphics memory 7.3 of 12.0 GB"
    assert state.load_words() == "GPU 98 %"
    assert state.heat_words() == "67 °C"
    assert state.where == "Card 1"
    assert state.now is not None
    assert state.now.ours == 6 * GIB


def test_a_card_that_is_not_used_is_not_shown(qapp: QApplication) -> None:
    state = MemoryState()
    state.set_device("Some Processor")
    state.on_sample(system(card(0, 1.0, None)), 0)
    assert state.memory_words().startswith("System memory")


def test_two_minutes_are_kept(qapp: QApplication) -> None:
    state = MemoryState()
    for _ in range(2 * KEPT):
        state.on_sample(system(), 0)
    assert len(state.used) == len(state.others) == KEPT


def test_this_machine_is_sampled_off_the_gui_thread(qtbot: QtBot) -> None:
    state = MemoryState()
    with qtbot.waitSignals([state.changed, state.changed], timeout=10_000):
        state.watch(lambda: None)
    state.stop()
    now = state.now
    assert now is not None
    assert 0 < now.used <= now.total
    assert now.ours > 0
