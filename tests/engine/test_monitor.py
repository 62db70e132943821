"""Live memory: of this machine, and of a card as the driver tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from engine import monitor
from engine.folders import repository
from engine.monitor import Monitor


def test_this_machines_memory_is_what_psutil_says():
    sample = Monitor().sample()
    assert sample.total_bytes == psutil.virtual_memory().total
    assert 0 < sample.free_bytes <= sample.total_bytes
    assert sample.our_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert 0 <= sample.cpu_load <= 1


def test_a_process_that_is_gone_has_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert Monitor().sample(child.pid).our_bytes == 0


def test_the_peak_is_at_least_what_is_resident_now():
    assert monitor.peak_host_bytes() >= psutil.Process().memory_info().rss * 0.9
    assert monitor.cpu_threads() >= 1
    assert monitor.cpu_name()


class Driver:
    """NVML's functions for one card, some of them unsupported, as laptops' and servers' drivers are."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        if index == 1:
            raise self.NVMLError("fell off the bus")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(total=12 * 2**30, used=3 * 2**30)

    def nvmlDeviceGetCudaComputeCapability(self, handle):  # noqa: N802
        return 8, 9

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        return [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**30),
            SimpleNamespace(pid=1, usedGpuMemory=None),
        ]

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        return SimpleNamespace(gpu=42)

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        raise self.NVMLError("not supported")

    def nvmlDeviceGetTemperature(self, handle, sensor):  # noqa: N802
        return 61

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return b"A card"

    def nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return "GPU-1"

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return "580.95"


def test_what_a_driver_does_not_tell_is_none_and_a_lost_card_is_left_out():
    watched = Monitor()
    watched._nvml = Driver()
    (card,) = watched.gpus()
    assert (card.name, card.arch, card.driver) == ("A card", 89, "580.95")
    assert card.free_bytes == 9 * 2**30
    assert card.our_bytes == 2**30
    assert (card.load, card.power_watts, card.temperature_celsius) == (0.42, None, 61)
    assert watched.gpus(pid=99)[0].our_bytes == 0


def test_the_window_watches_memory_without_torch():
    code = "import sys; from engine.monitor import Monitor; Monitor().sample(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository())
