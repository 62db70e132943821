"""How far a conversion is, and how long the rest will take."""

from __future__ import annotations

from time import perf_counter

from engine.events import QuantizeProgress


class Progress:
    """Counts 4-bit layers for people, and work for the prediction of the rest.

    Work is in passes of one calibration's samples through one block of the usual size.
    """

    def __init__(self, done: int, total: int, work: float) -> None:
        """done, total: 4-bit layers; work: all that is left to do."""
        self._done, self._total = done, total
        self._work_left, self._work_done, self._started = work, 0.0, perf_counter()

    def event(self, what: str) -> QuantizeProgress:
        left_s = 0.0
        if self._work_done > 0:
            left_s = (perf_counter() - self._started) * max(0.0, self._work_left) / self._work_done
        return QuantizeProgress(what, self._done, self._total, left_s)

    def advance(self, work: float, layers: int = 0) -> None:
        """`work` was done, and with it `layers` 4-bit layers."""
        self._done += layers
        self._work_done += work
        self._work_left -= work
