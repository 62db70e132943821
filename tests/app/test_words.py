"""How numbers are said."""

from __future__ import annotations

import pytest

from app.state import words

GIB = 2**30


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.42, "0.4 s"), (6.13, "6.1 s"), (24.4, "24 s"), (180, "3 min"), (9000, "2.5 h")],
)
def test_seconds_are_never_more_exact_than_they_are(seconds: float, said: str) -> None:
    assert words.seconds(seconds) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "about 0.2 s"), (1.2, "about 1 s"), (6.4, "about 6 s")])
def test_a_prediction_says_about(seconds: float, said: str) -> None:
    assert words.about(seconds) == said


def test_a_prediction_is_one_sentence_with_its_reason() -> None:
    assert words.prediction("fits", 8 * GIB, 12 * GIB, 6.1, 1) == "Fits · about 6 s"
    assert words.prediction("fits", 8 * GIB, 12 * GIB, 24.0, 4) == "Fits · about 24 s for 4"
    assert words.prediction("tight", 8 * GIB, 12 * GIB, 11.0, 1) == "Tight · about 11 s"
    assert words.prediction("moves", 14 * GIB, 12 * GIB, None, 1) == "Parts go to system memory"
    assert words.prediction("too large", int(13.4 * GIB), 12 * GIB, 9.0, 1) == "Will not fit: 13.4 of 12.0 GB"


def test_seeds_are_grouped_and_speed_says_what_is_shorter() -> None:
    assert words.number(41830592) == "41\u202f830\u202f592"
    assert words.speed(2.0, 7) == "3.5 steps a second"
    assert words.speed(9.0, 3) == "3.0 s a step"
    assert words.speed(0.0, 0) == ""
