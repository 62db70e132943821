"""Which plan a quantized linear runs by, on every architecture; and what this machine is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine import device
from engine.device import Device, best_plan, choose_device, choose_plan, has_kernels
from engine.jit import ARCHITECTURES
from engine.layers.fused_linear import has_kernel
from engine.monitor import GpuSample
from engine.problems import ProblemError

SAMPLE = GpuSample(0, "a card", "uuid", 90, "580", 80 * 2**30, 0, None, None, None, None)


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


@pytest.mark.parametrize(
    ("arch", "precision", "wanted"),
    [(90, "int4", "auto"), (89, "int4", "auto"), (120, "nvfp4", "auto"), (120, "int4", "w4a16")],
)
def test_a_card_that_suits_the_file_says_nothing(arch, precision, wanted):
    assert choose_plan(card(arch), precision, wanted).notice == ""


@pytest.mark.parametrize(
    ("arch", "precision", "wanted"),
    [(90, "nvfp4", "auto"), (100, "int4", "auto"), (90, "nvfp4", "w4a4"), (86, "int4", "w4a8"),
     (88, "int4", "auto"), (120, "nvfp4", "w4a8")],
)  # fmt: skip
def test_a_card_that_does_not_runs_weight_only_and_says_so_in_one_sentence(arch, precision, wanted):
    choice = choose_plan(card(arch), precision, wanted)
    assert choice.plan == "w4a16"
    assert choice.notice.startswith("a card ")
    assert choice.notice.count(".") == 1
    assert "w4a16" in choice.notice


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("plan", ["w4a4", "w4a8", "w4a16"])
def test_the_kernels_are_where_they_are_said_to_be(arch, precision, plan):
    number = int(arch.removesuffix("a"))
    assert has_kernels(plan, precision, number) == has_kernel(plan, precision, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_the_best_plan_of_every_card_has_kernels(arch, precision):
    number = int(arch.removesuffix("a"))
    assert has_kernels(best_plan(number, precision).plan, precision, number)


def test_a_plan_that_does_not_fit_the_file_is_a_problem():
    with pytest.raises(ProblemError, match="16-bit"):
        choose_plan(device.cpu(), None, "w4a4")
    with pytest.raises(ProblemError, match="4-bit"):
        choose_plan(device.cpu(), "int4", "bf16")
    assert choose_plan(device.cpu(), None, "bf16")
    assert choose_plan(device.cpu(), None, "auto")


def test_auto_is_the_card_where_one_can_be_used(monkeypatch):
    monkeypatch.setattr(device.Monitor, "gpus", lambda self, pid=None: (SAMPLE,))
    monkeypatch.setattr(device, "cuda_problem", lambda cards: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="a card", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert choose_device("auto") == Device("cuda:0", "a card", 90, "580", "bfloat16")
    monkeypatch.setattr(device, "cuda_problem", lambda cards: "The driver 470 is too old.")
    assert choose_device("auto").torch_name == "cpu"
    with pytest.raises(ProblemError, match="too old"):
        choose_device("cuda")


def test_a_card_without_a_compiler_for_its_kernels_cannot_be_used(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "has_compiler", lambda: True)
    assert device.cuda_problem((SAMPLE,)) == ""
    monkeypatch.setattr(device, "has_compiler", lambda: False)
    assert "NVRTC" in device.cuda_problem((SAMPLE,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver 580" in device.cuda_problem((SAMPLE,))


def test_without_a_card_auto_is_the_processor_and_cuda_a_problem(monkeypatch):
    monkeypatch.setattr(device.Monitor, "gpus", lambda self, pid=None: ())
    chosen = choose_device("auto")
    assert (chosen.torch_name, chosen.dtype, chosen.arch) == ("cpu", "float32", None)
    for wanted in ("cuda", "cuda:3"):
        with pytest.raises(ProblemError, match="No NVIDIA graphics card"):
            choose_device(wanted)
