"""Which plan a quantized linear runs by, on every architecture; and what this machine is."""

from __future__ import annotations

import pytest

from engine import device
from engine.device import Device, best_plan, choose_device, choose_plan
from engine.problems import ProblemError


# Design section 4, row by row.
@pytest.mark.parametrize(
    ("arch", "int4", "nvfp4"),
    [
        (None, "w4a16", "w4a16"),
        (75, "w4a4", "w4a16"),
        (80, "w4a4", "w4a16"),
        (86, "w4a4", "w4a16"),
        (87, "w4a4", "w4a16"),
        (89, "w4a4", "w4a16"),
        (90, "w4a8", "w4a16"),
        (100, "w4a16", "w4a16"),
        (103, "w4a16", "w4a16"),
        (110, "w4a16", "w4a16"),
        (120, "w4a8", "w4a4"),
        (121, "w4a8", "w4a4"),
    ],
)
def test_the_table_of_plans(arch, int4, nvfp4):
    assert best_plan(arch, "int4").plan == int4
    assert best_plan(arch, "nvfp4").plan == nvfp4
    assert best_plan(arch, "int4").reason


def card(arch: int) -> Device:
    return Device("cuda:0", "a card", arch, "580", "bfloat16")


def test_a_person_may_override_the_plan():
    assert choose_plan(device.cpu(), "int4", "w4a4").plan == "w4a4"
    assert choose_plan(card(89), "int4", "w4a8").plan == "w4a8"


def test_a_plan_without_a_kernel_falls_back_and_says_so(monkeypatch):
    monkeypatch.setattr(device, "PLANS_WITH_KERNELS", frozenset())
    choice = choose_plan(card(89), "int4", "auto")
    assert choice.plan == "w4a16"
    assert "w4a4" in choice.reason
    monkeypatch.setattr(device, "PLANS_WITH_KERNELS", frozenset({"w4a4"}))
    assert choose_plan(card(89), "int4", "auto").plan == "w4a4"


def test_a_plan_that_does_not_fit_the_file_is_a_problem():
    with pytest.raises(ProblemError, match="16-bit"):
        choose_plan(device.cpu(), None, "w4a4")
    with pytest.raises(ProblemError, match="4-bit"):
        choose_plan(device.cpu(), "int4", "bf16")
    assert choose_plan(device.cpu(), None, "bf16")
    assert choose_plan(device.cpu(), None, "auto")


def test_auto_is_the_processor_until_there_are_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(device.Monitor, "gpus", lambda self, pid=None: asked.append(1) or ())
    monkeypatch.setattr(device, "PLANS_WITH_KERNELS", frozenset())
    assert choose_device("auto").torch_name == "cpu"
    assert not asked
    monkeypatch.setattr(device, "PLANS_WITH_KERNELS", frozenset({"w4a4"}))
    assert choose_device("auto").torch_name == "cpu"  # there is no card here
    assert asked


def test_without_a_card_auto_is_the_processor_and_cuda_a_problem(monkeypatch):
    monkeypatch.setattr(device.Monitor, "gpus", lambda self, pid=None: ())
    chosen = choose_device("auto")
    assert (chosen.torch_name, chosen.dtype, chosen.arch) == ("cpu", "float32", None)
    for wanted in ("cuda", "cuda:3"):
        with pytest.raises(ProblemError, match="No NVIDIA graphics card"):
            choose_device(wanted)
