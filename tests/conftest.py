"""What all tests share: devices, seeds, no screen, no network, and none of the person's own folders.

Imports neither torch nor Qt: the window's tests must be able to say that the window brings no torch, and kernel
tests run on machines without Qt.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SEED = int(os.environ.get("TONFA_TEST_SEED", "0"))  # of all random inputs: another one is another set of tests

# Set before anything imports Qt or a Hugging Face library, and inherited by every process a test starts.
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # engine/host.py says why; tests share the machine, too
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", PYTHONPATH=str(REPO))
_HOME = tempfile.TemporaryDirectory(prefix="tonfa-tests-")
os.environ["TONFA_HOME"] = _HOME.name

# A shell's background job ignores Ctrl-C and hands that down; a test that presses it would see nothing happen.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # The same examples in every run, and no opinion about a busy machine.
    settings.register_profile(
        "tonfa", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("tonfa")


def _has_nvidia_card() -> bool:
    """Whether torch sees a card; asked only when a test that needs one was chosen."""
    import torch

    return torch.cuda.is_available()


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """What torch calls the device: "cpu", and "cuda" where there is a card. A test that takes it runs on both."""
    return "cuda" if request.param == "gpu" else "cpu"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _has_nvidia_card():
        pytest.skip("needs an NVIDIA graphics card")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every run, whatever ran before. Never the reason that torch is imported."""
    random.seed(SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)
