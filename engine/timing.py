"""What this machine needed for pictures before, kept in the cache folder, to say how long the next one will take.

One entry per model, device, plan and number of threads: seconds to load, to encode a prompt, for a step per token
and prediction, to decode per pixel. Each is the last measured value; what was never measured is not predicted.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.folders import cache, read_json, write_whole
from engine.problems import ProblemError

MAX_ENTRIES = 200


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured once on this machine; all in seconds."""

    load: float
    encode: float  # a prompt
    step_token: float  # a step of one prediction, per image token
    decode_pixel: float

    def predict(self, steps: int, tokens: int, pixels: int, predictions: int, prompts: int, loaded: bool) -> float:
        """Seconds for one picture; `prompts`: how many must still be encoded."""
        return (
            (0.0 if loaded else self.load)
            + prompts * self.encode
            + steps * predictions * tokens * self.step_token
            + pixels * self.decode_pixel
        )


def _file() -> Path:
    return cache() / "speed.json"


def _entries() -> dict[str, dict[str, float]]:
    with contextlib.suppress(ProblemError, OSError):
        content = read_json(_file()) if _file().is_file() else {}
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if isinstance(value, dict)}
    return {}  # a damaged cache is made again


def recall(key: str) -> Speed | None:
    """What was measured under `key`, None if nothing usable was."""
    entry = _entries().get(key, {})
    try:
        speed = Speed(**entry)
    except TypeError:
        return None
    values = asdict(speed).values()
    return speed if all(type(value) in (int, float) and 0 <= value < 1e6 for value in values) else None


def remember(key: str, speed: Speed) -> None:
    """Keep `speed` for the next start. A cache that cannot be written is only a missing prediction."""
    entries = _entries()
    entries.pop(key, None)
    entries[key] = asdict(speed)
    kept = dict(list(entries.items())[-MAX_ENTRIES:])
    with contextlib.suppress(ProblemError, OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(), json.dumps(kept, indent=1).encode())
