"""Which processor makes the picture, and which plan its quantized linears run by, with the reason.

The table is design section 4 in code; a person can override it. torch is imported only when a CUDA device is asked
about, so `doctor` answers in a blink.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Literal

from engine.monitor import GpuSample, Monitor, cpu_name
from engine.problems import bad_request, machine_cannot
from engine.requests import Plan, Precision

LayerPlan = Literal["w4a4", "w4a8", "w4a16"]
DType = Literal["float32", "bfloat16", "float16"]

OLDEST_ARCH = 75
# Where a plan's kernels run; w4a16's run everywhere. engine/kernels/svdq_linear.py says the same, held by a test.
KERNELS: dict[tuple[LayerPlan, Precision], tuple[int, ...]] = {
    ("w4a4", "int4"): (75, 80, 86, 87, 89, 90),
    ("w4a8", "int4"): (89, 90, 120, 121),
    ("w4a4", "nvfp4"): (120, 121),
}


@dataclass(frozen=True, slots=True)
class Device:
    """A processor as torch names it. arch: compute capability as one number (89), None for the CPU."""

    torch_name: str  # "cpu", "cuda:0"
    name: str
    arch: int | None
    driver: str
    dtype: DType  # of the network

    @property
    def is_cuda(self) -> bool:
        return self.arch is not None


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """How quantized linears run, and why. notice: a sentence for people where the card does not suit the file."""

    plan: LayerPlan
    reason: str
    notice: str = ""


def cpu() -> Device:
    return Device("cpu", cpu_name(), None, "", "float32")


def choose_device(wanted: str = "auto") -> Device:
    """The device a request names ("auto", "cpu", "cuda", "cuda:N"). Raises ProblemError if it is not usable.

    "auto" is the first graphics card that can be used, else the CPU.
    """
    if wanted == "cpu":
        return cpu()
    cards = Monitor().gpus()
    if wanted == "auto" and not cards:
        return cpu()
    problem = cuda_problem(cards)
    if problem and wanted == "auto":
        return cpu()
    if problem:
        raise machine_cannot(problem, "Choose the device cpu.")
    import torch

    index = int(wanted.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise bad_request(
            f"There is no graphics card {index}; there are {torch.cuda.device_count()}.", "Choose a smaller number."
        )
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    if arch < OLDEST_ARCH:
        if wanted == "auto":
            return cpu()
        raise machine_cannot(
            f"{properties.name} (compute {properties.major}.{properties.minor}) is older than Tonfa needs (7.5).",
            "Choose the device cpu.",
        )
    dtype: DType = "float16" if arch < 80 else "bfloat16"
    return Device(f"cuda:{index}", properties.name, arch, cards[0].driver, dtype)


def cuda_problem(cards: tuple[GpuSample, ...]) -> str:
    """Why the cards cannot be used, "" if they can."""
    if not cards:
        return "No NVIDIA graphics card was found."
    import torch

    if torch.version.cuda is None:
        return "This installation of torch is for the CPU only."
    available = False
    with contextlib.suppress(RuntimeError):
        available = torch.cuda.is_available()
    if not available:
        return f"The driver {cards[0].driver} is too old for CUDA {torch.version.cuda}."
    return "" if has_compiler() else "NVIDIA's compiler for kernels (NVRTC) is missing."


@functools.cache
def has_compiler() -> bool:
    """Whether NVRTC is there, which compiles our kernels for the card."""
    try:
        from cuda.bindings import nvrtc

        return not int(nvrtc.nvrtcVersion()[0])
    except Exception:  # not installed, or its library is not
        return False


def best_plan(arch: int | None, precision: Precision) -> PlanChoice:
    """What a quantized linear should run by on an architecture, kernels provided (design section 4)."""
    if arch is None:
        return PlanChoice("w4a16", "no graphics card: weights are expanded once, activations stay as they are")
    if precision == "int4":
        if 75 <= arch <= 89:
            return PlanChoice("w4a4", f"sm_{arch} multiplies 4-bit integers natively")
        if arch == 90:
            return PlanChoice("w4a8", "sm_90 has no 4-bit units; 8-bit activations run on wgmma")
        if 100 <= arch < 120:
            return PlanChoice("w4a16", f"sm_{arch} has neither int4 nor plain e4m3 mma")
        if arch >= 120:
            return PlanChoice("w4a8", f"sm_{arch} has no int4 units; 8-bit activations run on e4m3 mma")
    elif arch >= 120:
        return PlanChoice("w4a4", f"sm_{arch} multiplies block-scaled fp4 natively")
    return PlanChoice("w4a16", f"sm_{arch} has no units for {precision}; codes are expanded")


def choose_plan(device: Device, precision: Precision | None, wanted: Plan) -> PlanChoice:
    """The plan that will run. precision: of the file's 4-bit layers, None for a 16-bit file.

    Raises ProblemError where what is wanted does not fit the file.
    """
    if precision is None:
        if wanted not in ("auto", "bf16"):
            raise bad_request(
                f"This model's file is 16-bit; the plan {wanted} needs a 4-bit one.",
                "Choose the plan auto, or make the model 4-bit first.",
            )
        return PlanChoice("w4a16", "the file is 16-bit")
    if wanted == "bf16":
        raise bad_request("This model's file is 4-bit; the plan bf16 needs a 16-bit one.", "Choose the plan auto.")
    if not device.is_cuda:
        return best_plan(None, precision) if wanted == "auto" else PlanChoice(wanted, "chosen by hand")
    assert device.arch is not None
    choice = best_plan(device.arch, precision) if wanted == "auto" else PlanChoice(wanted, "chosen by hand")
    if not has_kernels(choice.plan, precision, device.arch):
        return PlanChoice(
            "w4a16",
            f"sm_{device.arch} has no kernels for {choice.plan} of {precision}",
            f"{device.name} cannot run {precision} files by {choice.plan}: their 4-bit weights meet 16-bit "
            "activations instead (w4a16).",
        )
    if choice.plan == "w4a16" and wanted == "auto":
        return replace(
            choice,
            notice=f"{device.name} has no units for {precision} files: their 4-bit weights meet 16-bit activations "
            "(w4a16).",
        )
    return choice


def has_kernels(plan: LayerPlan, precision: Precision, arch: int) -> bool:
    """Whether there are kernels of a plan for an architecture."""
    return plan == "w4a16" or arch in KERNELS.get((plan, precision), ())
