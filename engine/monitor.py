"""Live memory and load of this machine: NVML for graphics cards, psutil for the rest. No torch.

NVML is looked for once; without a driver, or without a card, there are simply no GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One graphics card now. Values that the driver does not tell are None."""

    index: int
    name: str
    uuid: str
    arch: int  # compute capability as one number: 89
    driver: str
    total_bytes: int
    used_bytes: int
    our_bytes: int | None  # of the process asked about
    load: float | None  # 0 .. 1
    power_watts: float | None
    temperature_celsius: int | None

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """This machine now. `our_bytes` is the resident memory of the process asked about."""

    total_bytes: int
    free_bytes: int  # could be had without swapping
    our_bytes: int
    cpu_load: float  # 0 .. 1, since the sample before
    gpus: tuple[GpuSample, ...]


class Monitor:
    """Reads one sample when asked. Costs well under a millisecond without a card, a few with one."""

    def __init__(self) -> None:
        self._nvml: Any = None
        with contextlib.suppress(Exception):  # no driver, no library, a driver that is being updated: no card
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml

    def sample(self, pid: int | None = None) -> Sample:
        """`pid`: the process whose share is told, this one where None; a process that is gone has 0."""
        memory = psutil.virtual_memory()
        ours = 0
        with contextlib.suppress(psutil.Error):
            ours = psutil.Process(pid).memory_info().rss
        return Sample(
            total_bytes=memory.total,
            free_bytes=memory.available,
            our_bytes=ours,
            cpu_load=psutil.cpu_percent() / 100,
            gpus=self.gpus(pid),
        )

    def gpus(self, pid: int | None = None) -> tuple[GpuSample, ...]:
        """Every graphics card, in NVML's order, which is the order of the slots."""
        if self._nvml is None:
            return ()
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError:
            return ()
        cards = []
        for index in range(count):
            with contextlib.suppress(self._nvml.NVMLError):  # a card that fell off the bus
                cards.append(self._gpu(index, os.getpid() if pid is None else pid))
        return tuple(cards)

    def _gpu(self, index: int, pid: int) -> GpuSample:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        ours = None
        if processes is not None:
            ours = sum(one.usedGpuMemory or 0 for one in processes if one.pid == pid)
        load, power = (
            self._ask(nvml.nvmlDeviceGetUtilizationRates, handle),
            self._ask(nvml.nvmlDeviceGetPowerUsage, handle),
        )
        return GpuSample(
            index=index,
            name=_text(nvml.nvmlDeviceGetName(handle)),
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            arch=10 * major + minor,
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
            total_bytes=memory.total,
            used_bytes=memory.used,
            our_bytes=ours,
            load=None if load is None else load.gpu / 100,
            power_watts=None if power is None else power / 1000,
            temperature_celsius=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        )

    def _ask(self, function: Any, *arguments: Any) -> Any:
        """A value that some cards or drivers do not tell: then None."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


@functools.cache
def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_threads() -> int:
    """Processors this process may use: less than there are in a container or under an affinity."""
    with contextlib.suppress(AttributeError, psutil.Error, OSError):
        return len(psutil.Process().cpu_affinity() or []) or (os.cpu_count() or 1)
    return os.cpu_count() or 1


def peak_host_bytes() -> int:
    """The most memory this process ever had resident."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
