"""Numbers as a friend would say them: rounded, with units, in sentences."""

from __future__ import annotations

from engine.events import Fits

GIB = 2**30
THIN_SPACE = "\u202f"


def gigabytes(size: float) -> str:
    """ "7.3"; the unit stands once, at the end of the sentence."""
    return f"{size / GIB:.1f}"


def number(value: int) -> str:
    """ "41 830 592" with thin spaces."""
    return f"{value:,}".replace(",", THIN_SPACE)


def seconds(value: float) -> str:
    """ "0.4 s", "6.1 s", "24 s", "3 min", "1.5 h": never more exact than it is."""
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 99.5:
        return f"{value:.0f} s"
    if value < 5400:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"


def about(value: float) -> str:
    """A prediction says "about", and rounds to whole seconds from one on."""
    return f"about {value:.0f} s" if 0.95 <= value < 99.5 else f"about {seconds(value)}"


def size(width: int, height: int) -> str:
    return f"{width} × {height}"


def steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def speed(elapsed_s: float, done: int) -> str:
    """ "3.4 steps a second" or, when slow, "1.8 s a step"."""
    if done <= 0 or elapsed_s <= 0:
        return ""
    rate = done / elapsed_s
    return f"{rate:.1f} steps a second" if rate >= 1 else f"{seconds(1 / rate)} a step"


def prediction(fits: Fits, needed: int, total: int, expected_s: float | None, count: int) -> str:
    """The sentence beside Generate. needed, total in bytes; expected_s for all `count` pictures."""
    when = "" if expected_s is None else f" · {about(expected_s)}" + (f" for {count}" if count > 1 else "")
    match fits:
        case "fits":
            return f"Fits{when}"
        case "tight":
            return f"Tight{when}"
        case "moves":
            return f"Parts go to system memory{when}"
        case "too large":
            return f"Will not fit: {gigabytes(needed)} of {gigabytes(total)} GB"
