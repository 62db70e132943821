"""Bytes per stage, and predictions from what was measured."""

from __future__ import annotations

import pytest

from engine import folders, memory, timing
from engine.memory import ModelSizes, plan
from engine.timing import Speed

GIB = 2**30
LARGE = ModelSizes(
    encoders=9 * GIB,
    network=6 * GIB,
    decoder=GIB // 6,
    loras=0,
    hidden_size=3072,
    text_tokens=512,
    decoder_channels=256,
    item_bytes=2,
)


def test_parts_that_fit_together_stay_together():
    layout = plan(LARGE, 1024, 1024, predictions=1, available=48 * GIB)
    assert layout.keep_all
    assert layout.fits == "fits"
    assert 15 * GIB < layout.peak_bytes < 20 * GIB


def test_parts_that_do_not_take_turns_and_the_largest_stage_decides():
    layout = plan(LARGE, 1024, 1024, predictions=1, available=12 * GIB)
    assert not layout.keep_all
    assert layout.fits == "moves"
    assert layout.peak_bytes == pytest.approx(9 * GIB, rel=0.1)


def test_what_no_order_of_stages_makes_fit_is_too_large():
    assert plan(LARGE, 1024, 1024, predictions=1, available=8 * GIB).fits == "too large"


def test_larger_pictures_and_two_predictions_take_more():
    small = plan(LARGE, 512, 512, 1, 48 * GIB)
    assert plan(LARGE, 2048, 2048, 1, 48 * GIB).peak_bytes > small.peak_bytes
    work = {stage.name: stage.work for stage in small.stages}
    double = {stage.name: stage.work for stage in plan(LARGE, 512, 512, 2, 48 * GIB).stages}
    assert double["denoise"] == 2 * work["denoise"]
    assert double["decode"] == work["decode"]


def test_the_process_itself_counts():
    assert plan(LARGE, 512, 512, 1, 48 * GIB, memory.PROCESS_BYTES).peak_bytes == pytest.approx(
        plan(LARGE, 512, 512, 1, 48 * GIB).peak_bytes + memory.PROCESS_BYTES
    )


def test_a_measured_speed_is_scaled_to_the_next_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("TONFA_HOME", str(tmp_path))
    assert timing.recall("model | cpu") is None
    speed = Speed(load=4.0, encode=0.1, step_token=0.001, decode_pixel=1e-6)
    timing.remember("model | cpu", speed)
    assert timing.recall("model | cpu") == speed
    once = speed.predict(steps=8, tokens=256, pixels=65536, predictions=1, prompts=1, loaded=True)
    assert once == pytest.approx(0.1 + 8 * 256 * 0.001 + 0.065536)
    assert speed.predict(8, 256, 65536, 1, 1, loaded=False) == pytest.approx(once + 4)


@pytest.mark.parametrize(
    "content",
    ["damaged", "[]", '{"k": 5}', '{"k": {"load": 1}}', '{"k": {"load": "x", "encode": 1, "step_token": 1,'
     '"decode_pixel": 1}}', '{"k": {"load": -1, "encode": 1, "step_token": 1, "decode_pixel": 1}}'],
)  # fmt: skip
def test_a_damaged_memory_of_speeds_is_forgotten(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TONFA_HOME", str(tmp_path))
    folders.cache().mkdir(parents=True)
    (folders.cache() / "speed.json").write_text(content)
    assert timing.recall("k") is None
    timing.remember("k", Speed(1, 1, 1, 1))
    assert timing.recall("k") == Speed(1, 1, 1, 1)
