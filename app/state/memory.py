"""Live memory and load: two samples a second, two minutes kept."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
from PySide6.QtCore import QObject, QThread, Signal, Slot

from app.state import words
from engine.monitor import GpuSample, Monitor, Sample

EVERY_S = 0.5
KEPT = 240


@dataclass(frozen=True, slots=True)
class MemoryNow:
    """The memory that pictures are made in: of the card, or of the system where there is none. Bytes."""

    total: int
    others: int
    ours: int  # the window's and the engine's
    engine: int  # the engine's alone: what a plan counts
    load: float | None  # 0..1 of the card or the processor
    celsius: int | None
    gpu: str  # the card's name, "" without one

    @property
    def used(self) -> int:
        return self.others + self.ours


def of_gpu(gpu: GpuSample) -> MemoryNow:
    ours = min(gpu.our_bytes or 0, gpu.used_bytes)
    return MemoryNow(
        gpu.total_bytes, gpu.used_bytes - ours, ours, ours, gpu.load, gpu.temperature_celsius, gpu.name
    )


def of_system(sample: Sample, this_process: int) -> MemoryNow:
    used = sample.total_bytes - sample.free_bytes
    ours = min(sample.our_bytes + this_process, used)
    return MemoryNow(sample.total_bytes, used - ours, ours, min(sample.our_bytes, ours), sample.cpu_load, None, "")


class _Sampler(QThread):
    """Asks off the GUI thread: a driver may take its time."""

    sampled = Signal(object, int)  # Sample, resident bytes of this process

    def __init__(self, engine_pid: Callable[[], int | None], parent: QObject) -> None:
        super().__init__(parent)
        self._engine_pid = engine_pid
        self._stop = threading.Event()

    def run(self) -> None:
        monitor, me = Monitor(), psutil.Process()
        while not self._stop.is_set():
            pid = self._engine_pid()
            with contextlib.suppress(psutil.Error):
                sample = monitor.sample(pid)
                if pid is None:  # then it is about this process, and the engine has none
                    sample = replace(sample, our_bytes=0)
                self.sampled.emit(sample, me.memory_info().rss)
            self._stop.wait(EVERY_S)

    def stop(self) -> None:
        self._stop.set()
        self.wait(2000)


class MemoryState(QObject):
    changed = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.now: MemoryNow | None = None
        self.others: deque[float] = deque(maxlen=KEPT)  # shares of the whole, oldest first
        self.used: deque[float] = deque(maxlen=KEPT)
        self._device = ""  # its name, once the engine has said it
        self._sampler: _Sampler | None = None

    def watch(self, engine_pid: Callable[[], int | None]) -> None:
        """Begin; `engine_pid` tells whose memory is ours. Ends with `stop`."""
        self._sampler = _Sampler(engine_pid, self)
        self._sampler.sampled.connect(self.on_sample)
        self._sampler.start(QThread.Priority.LowPriority)

    def stop(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()

    def set_device(self, device: str) -> None:
        """The name of what the engine computes on: a card's, or the processor's. Its memory is the one to show."""
        if device != self._device:
            self._device = device
            self.others.clear()
            self.used.clear()

    @Slot(object, int)
    def on_sample(self, sample: Sample, this_process: int) -> None:
        gpu = self._gpu(sample)
        self.now = of_gpu(gpu) if gpu is not None else of_system(sample, this_process)
        self.others.append(self.now.others / self.now.total)
        self.used.append(self.now.used / self.now.total)
        self.changed.emit()

    def _gpu(self, sample: Sample) -> GpuSample | None:
        if not self._device:
            return sample.gpus[0] if sample.gpus else None
        return next((gpu for gpu in sample.gpus if gpu.name == self._device), None)

    # -- words --

    @property
    def where(self) -> str:
        """What computes: the card's name, or the processor."""
        if self.now is None:
            return ""
        return self.now.gpu or "On the processor"

    def memory_words(self, short: bool = False) -> str:
        if self.now is None:
            return ""
        amount = f"{words.gigabytes(self.now.used)} of {words.gigabytes(self.now.total)} GB"
        if short:
            return amount
        return f"{'Graphics' if self.now.gpu else 'System'} memory {amount}"

    def load_words(self) -> str:
        if self.now is None or self.now.load is None:
            return ""
        return f"{'GPU' if self.now.gpu else 'CPU'} {round(100 * self.now.load)} %"

    def heat_words(self) -> str:
        return "" if self.now is None or self.now.celsius is None else f"{self.now.celsius} °C"
