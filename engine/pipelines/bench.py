"""How fast this machine's card runs: each kernel beside torch's 16-bit linear, and a whole denoising step.

Medians of CUDA events, in microseconds. Inputs take turns over more memory than a card's cache holds, as they do in
a network. Random weights; nothing is loaded from files.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import folders, jit
from engine.device import Device, best_plan
from engine.kernels.modulate_quantize import modulate_quantize
from engine.kernels.quantize_act import quantize_act
from engine.kernels.svdq_linear import svdq_linear
from engine.layers.attention_backend import Backend, attend
from engine.layers.attention_choice import choose
from engine.layers.fused_linear import HEAD_DIM, FusedLinear
from engine.layers.held_bytes import held_bytes
from engine.layers.linear import BranchedLinear
from engine.layers.svdquant_linear import LayerPlan
from engine.models.flux import FluxConfig
from engine.models.random_flux import random_flux
from engine.models.step_graph import EAGER_STEPS, StepGraphs
from engine.pipelines.prepare_card import Report, prepare_kernels
from engine.pipelines.text_to_image import Picture, step_inputs
from engine.reference.quantize_act import QuantizedAct
from engine.reference.svdq_linear import Epilogue, GateResidual, GeluQuantize, Plain, QKNormRope
from engine.requests import Shapes

ROUNDS, WARM_UP = 20, 3
STEP_ROUNDS = 5
PAUSE_CYCLES = 500_000
ROTATED_BYTES = 256 * 2**20
CEILING_SIZE = 8192
MINI = FluxConfig(
    num_layers=2, num_single_layers=6, num_attention_heads=4, joint_attention_dim=256, pooled_projection_dim=256
)


@dataclass(frozen=True, slots=True)
class Workload:
    """A network and a picture: what is measured."""

    config: FluxConfig
    picture: Picture
    text_tokens: int

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.picture.num_tokens


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One operation at one shape. torch_us, fp8_us: torch's plain linear of that shape, where there is one.

    ceiling: the fraction of what the card reaches: of its copy bandwidth, or of its 16-bit matrix rate ("above 1":
    the low-bit units are faster than those).
    """

    operation: str
    shape: str
    plan: str
    us: float
    torch_us: float | None
    fp8_us: float | None
    bound: Literal["memory", "matrix"]
    ceiling: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """One call of the network."""

    what: str
    ms: float
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the card reaches, measured: bytes read and written by a copy, 16-bit multiplications and additions."""

    copy_bytes_per_second: float
    matrix_flops: float


def workload(shapes: Shapes) -> Workload:
    side = 1024 if shapes == "flux" else 256
    picture = Picture("", "", side, side, steps=1, seed=0, guidance=3.5, cfg=1.0)
    return Workload(FluxConfig(), picture, 512) if shapes == "flux" else Workload(MINI, picture, 32)


def bench(device: Device, shapes: Shapes, with_step: bool, report: Report) -> dict[str, Any]:
    """What `bench` prints as JSON (shape: engine/cli.schema.json). `report` may raise to stop."""
    assert device.arch is not None
    job = workload(shapes)
    plan = best_plan(device.arch, "int4").plan
    report("Measuring what the card reaches", 0.0)
    with torch.inference_mode():
        ceilings = measure_ceilings(torch.device(device.torch_name))
        kernels = measure_kernels(job, plan, device, ceilings, report)
        steps: list[StepTime] = []
        if with_step:
            steps = measure_steps(job, plan, device, report) + measure_wide_step(job, device, report)
    report("Measured", 1.0)
    return {
        "card": device.name,
        "arch": f"sm_{device.arch}",
        "torch": torch.__version__,
        "plan": plan,
        "shapes": shapes,
        "ceilings": asdict(ceilings),
        "kernels": [asdict(one) for one in kernels],
        "steps": [asdict(one) for one in steps],
    }


# ------------------------------------------------------------------------------------------------ how it is timed


def microseconds(run: Callable[[int], object], rounds: int = ROUNDS) -> float:
    """Median of CUDA events around run(0), run(1), ...: a run uses its number to take other memory each time."""
    for index in range(WARM_UP):
        run(index)
    times: list[float] = []
    for index in range(rounds):
        torch.cuda._sleep(PAUSE_CYCLES)  # the launches wait in line, so the processor's time does not count
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(index)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return median(times)


def in_turns(make: Callable[[], Tensor]) -> list[Tensor]:
    """Copies of a tensor, of more bytes than a cache holds."""
    first = make()
    return [first, *(make() for _ in range(min(64, ROTATED_BYTES // max(1, first.nbytes))))]


def measure_ceilings(device: torch.device) -> Ceilings:
    source, target = (torch.empty(ROTATED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    copy_us = microseconds(lambda _: target.copy_(source))
    a, b = (torch.randn(CEILING_SIZE, CEILING_SIZE, device=device).half() for _ in range(2))
    product_us = microseconds(lambda _: a @ b, rounds=5)
    return Ceilings(2 * ROTATED_BYTES / copy_us * 1e6, 2 * CEILING_SIZE**3 / product_us * 1e6)


# ---------------------------------------------------------------------------------------------------- the kernels


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape. run: takes a number, see `microseconds`.

    num_bytes: read and written at least, of what moves bytes; product: (M, N, K) of what multiplies matrices.
    """

    operation: str
    shape: str
    run: Callable[[int], object]
    num_bytes: int = 0
    product: tuple[int, int, int] | None = None
    is_linear: bool = False


def measure_kernels(
    job: Workload, plan: LayerPlan, device: Device, ceilings: Ceilings, report: Report
) -> list[KernelTime]:
    """Every operation of a block at the picture's size. Compiles what is missing first."""
    place, dtype = torch.device(device.torch_name), getattr(torch, device.dtype)
    heads = job.config.num_attention_heads
    backend = choose(heads, job.tokens, HEAD_DIM, dtype, place, folders.cache())
    with jit.noted() as variants:
        for case in kernel_cases(job, plan, place, dtype, backend):
            case.run(0)
    for done, total in jit.prepare(variants, jit.current_arch()):
        report(f"Preparing your graphics card, {done} of {total}", 0.0)
    jit.load(variants)
    cases = kernel_cases(job, plan, place, dtype, backend)  # once more: nothing was computed before
    times = []
    for index, case in enumerate(cases):
        report(f"Measuring {case.operation}", (1 + index) / (2 + len(cases)))
        us = microseconds(case.run)
        if case.product is None:
            ceiling = case.num_bytes / us * 1e6 / ceilings.copy_bytes_per_second
            times.append(KernelTime(case.operation, case.shape, plan, us, None, None, "memory", ceiling))
            continue
        m, n, k = case.product
        ceiling = 2 * m * n * k / us * 1e6 / ceilings.matrix_flops
        beside: tuple[float | None, float | None] = (None, None)
        if case.is_linear:
            beside = torch_linear_us(m, n, k, dtype, place), fp8_linear_us(m, n, k, dtype, place)
        times.append(KernelTime(case.operation, case.shape, plan, us, *beside, "matrix", ceiling))
    return times


def kernel_cases(
    job: Workload, plan: LayerPlan, device: torch.device, dtype: torch.dtype, backend: Backend
) -> list[Case]:
    """What one single block of the network launches."""
    config = replace(job.config, num_layers=0, num_single_layers=1)
    (block,) = random_flux(config, plan, device, dtype, jit.current_arch()).single_blocks
    qkv, out, fc1, fc2 = (getattr(block, name) for name in ("qkv", "out", "fc1", "fc2"))
    m, c, heads = job.tokens, config.hidden_size, config.num_attention_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def quantizing(
        operation: str, name: str, linear: FusedLinear, quantize: Callable[[Tensor], QuantizedAct]
    ) -> Case:
        inputs = in_turns(lambda: normal(m, linear.in_features))
        made = quantize(inputs[0])
        moved = sum(one.nbytes for one in (inputs[0], made.codes, made.scales, made.low) if one is not None)
        shape = f"{name}, {m} x {linear.in_features}, rank {linear.target.rank}"
        return Case(operation, shape, lambda index: quantize(inputs[index % len(inputs)]), moved)

    def multiplying(name: str, what: str, linear: FusedLinear, end: Epilogue) -> Case:
        n, k = linear.out_features, linear.in_features
        act = linear.read(quantize_act(normal(m, k), linear.target))
        shape = f"{name}, {m} x {k} -> {n}, rank {linear.rank}"
        run = partial(svdq_linear, act, linear.layout.linear, end)
        return Case(f"svdq_linear, {what}", shape, lambda _: run(), product=(m, n, k), is_linear=True)

    shift, stream, joint = normal(c), normal(m, c), normal(m, 3 * c)
    angles, norm = torch.ones(m, HEAD_DIM // 2, device=device), torch.ones(HEAD_DIM, device=device)
    q, k, v = joint.view(1, m, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    conditioning, modulation = normal(1, c), block.modulation
    assert isinstance(modulation, BranchedLinear)
    return [
        quantizing("quantize_act", "out", out, lambda x: quantize_act(x, out.target)),
        quantizing("quantize_act", "fc2", fc2, lambda x: quantize_act(x, fc2.target)),
        quantizing(
            "modulate_quantize", "qkv and fc1", qkv, lambda x: modulate_quantize(x, shift, shift, qkv.target)
        ),
        multiplying("qkv", "plain", qkv, Plain(joint)),
        multiplying("qkv", "q/k norm and RoPE", qkv, QKNormRope(norm, norm, angles, angles, joint)),
        multiplying("out", "gate and residual", out, GateResidual(shift, stream, stream)),
        multiplying("fc1", "GELU and quantize", fc1, GeluQuantize(fc2.target)),
        multiplying("fc2", "gate and residual", fc2, GateResidual(shift, stream, stream)),
        Case(
            f"attention, {backend}",
            f"{heads} heads x {m} x {HEAD_DIM}",
            lambda _: attend(q, k, v),
            product=(m, m, 2 * heads * HEAD_DIM),  # q k^T, and what it weighs v with
        ),
        Case(
            "modulation_w4a16",
            f"1 x {c} -> {modulation.out_features}",
            lambda _: modulation(conditioning),
            held_bytes(modulation),
        ),
    ]


def torch_linear_us(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> float:
    """torch's own 16-bit linear with a bias."""
    inputs = in_turns(lambda: torch.randn(m, k, device=device, dtype=dtype))
    weight, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((n, k), (n,)))
    return microseconds(lambda index: F.linear(inputs[index % len(inputs)], weight, bias))


def fp8_linear_us(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """torch's FP8 product with a scale per row and column, activations quantized before; None where it has none."""
    x, weight = (torch.randn(rows, k, device=device).to(torch.float8_e4m3fn) for rows in (m, n))
    ones = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
    try:
        return microseconds(lambda _: torch._scaled_mm(x, weight.T, *ones, out_dtype=dtype))
    except (RuntimeError, NotImplementedError, ValueError):
        return None


# -------------------------------------------------------------------------------------------------------- a step


def blank_step(job: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """What the network takes, of random numbers."""
    image, text, pooled = (
        torch.randn(1, *shape, device=device, dtype=dtype)
        for shape in (
            (job.picture.num_tokens, job.config.in_channels),
            (job.text_tokens, job.config.joint_attention_dim),
            (job.config.pooled_projection_dim,),
        )
    )
    return step_inputs(job.picture, image, text, pooled, sigma=0.5)


def measure_steps(job: Workload, plan: LayerPlan, device: Device, report: Report) -> list[StepTime]:
    """One call of the network by our kernels, as it is and as a graph."""
    place, dtype = torch.device(device.torch_name), getattr(torch, device.dtype)
    inputs = blank_step(job, place, dtype)
    report("Making a network of random weights", 0.0)
    network = random_flux(job.config, plan, place, dtype, jit.current_arch())
    prepare_kernels(network, inputs, report)
    graphs, weights = StepGraphs(network), held_bytes(network)
    report("Measuring a step", 0.5)
    times = [StepTime(f"{plan}, without a graph", _step_ms(lambda: network(*inputs)), weights)]
    for _ in range(EAGER_STEPS):
        graphs(0, *inputs)
    times.append(StepTime(f"{plan}, as a graph", _step_ms(lambda: graphs(0, *inputs)), weights))
    return times


def measure_wide_step(job: Workload, device: Device, report: Report) -> list[StepTime]:
    """The same network in 16 bit, as torch runs it; nothing where the card cannot hold it."""
    place, dtype = torch.device(device.torch_name), getattr(torch, device.dtype)
    inputs = blank_step(job, place, dtype)
    gc.collect()
    torch.cuda.empty_cache()
    report("Measuring a step in 16 bit", 0.9)
    with contextlib.suppress(torch.OutOfMemoryError):  # most cards cannot hold it: that is what 4 bits are for
        wide = random_flux(job.config, None, place, dtype)
        what = f"{device.dtype}, torch's linears"
        return [StepTime(what, _step_ms(lambda: wide(*inputs)), held_bytes(wide))]
    return []


def _step_ms(run: Callable[[], object]) -> float:
    return microseconds(lambda _: run(), rounds=STEP_ROUNDS) / 1000
