"""How far a conversion is, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from engine.events import QuantizeProgress


class Progress:
    """Counts 4-bit layers for people, and work for the prediction of the rest.

    Work is in passes of a linear's rows through the largest block.
    """

    def __init__(self, done: int, total: int, sizes: Sequence[float], passes: Sequence[float]) -> None:
        """done, total: 4-bit layers; sizes: of each block, relative to the largest; passes: left, through each."""
        self._done, self._total, self._sizes = done, total, sizes
        self._work_left = sum(size * count for size, count in zip(sizes, passes, strict=True))
        self._work_done, self._started = 0.0, perf_counter()

    def event(self, what: str) -> QuantizeProgress:
        left_s = 0.0
        if self._work_done > 0:
            left_s = (perf_counter() - self._started) * max(0.0, self._work_left) / self._work_done
        return QuantizeProgress(what, self._done, self._total, left_s)

    def advance(self, block: int, passes: float, layers: int = 0) -> None:
        """`passes` went through block number `block`, and with them `layers` 4-bit layers were finished."""
        self._done += layers
        self._work_done += passes * self._sizes[block]
        self._work_left -= passes * self._sizes[block]
