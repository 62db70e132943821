"""How fast this machine's card runs: each kernel beside torch's 16-bit one, and a whole denoising step.

Medians of CUDA events, in microseconds. Inputs and weights take turns over more memory than a card's cache holds,
as they do in a network. Random weights; nothing is loaded from files.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from statistics import median
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import folders, jit
from engine.device import Device, best_plan, has_kernels
from engine.kernels.attention_fp16 import attention_fp16
from engine.kernels.linear_w4a16 import ArrangedW4A16, arrange, linear_w4a16
from engine.kernels.modulate_quantize import modulate_quantize
from engine.kernels.modulation_w4a16 import arrange_modulation, modulation_w4a16
from engine.kernels.quantize_act import quantize_act
from engine.kernels.svdq_linear import ArrangedLinear, svdq_linear
from engine.layers.attention_backend import Backend, attend_by
from engine.layers.attention_choice import choose
from engine.layers.fused_linear import HEAD_DIM, FusedLinear
from engine.layers.held_bytes import held_bytes
from engine.layers.svdquant_linear import MODULATION_GROUP, LayerPlan
from engine.models.flux import FluxConfig
from engine.models.random_flux import random_flux
from engine.models.step_graph import EAGER_STEPS, StepGraphs
from engine.pipelines.prepare_card import Report, prepare_kernels
from engine.pipelines.text_to_image import Picture, step_inputs
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.quantize_act import ActTarget, QuantizedAct
from engine.reference.svdq_linear import Epilogue, GateResidual, GeluQuantize, Plain, QKNormRope
from engine.requests import Shapes

ROUNDS, WARM_UP = 20, 3
STEP_ROUNDS = 5
PAUSE_CYCLES = 500_000
ROTATED_BYTES = 256 * 2**20
CEILING_SIZE = 8192
T5_GROUP = 128
Bound: TypeAlias = Literal["memory", "matrix", "fp8"]
T = TypeVar("T")
A = TypeVar("A", ArrangedLinear, ArrangedW4A16)
MINI = FluxConfig(
    num_layers=2, num_single_layers=6, num_attention_heads=4, joint_attention_dim=256, pooled_projection_dim=256
)


@dataclass(frozen=True, slots=True)
class Workload:
    """A network, its T5 (joint_attention_dim wide, text_hidden in its MLP) and a picture: what is measured."""

    config: FluxConfig
    picture: Picture
    text_tokens: int
    text_hidden: int

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.picture.num_tokens


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One operation at one shape. torch_us, fp8_us: torch's own at that shape, where it has one.

    bound: the ceiling that is met first, the card's copy bandwidth or the rate of its matrix units; ceiling: the
    fraction of it that was reached. e4m3 is held to the FP8 rate. torch cannot tell that of 4-bit integers, which
    are held to the 16-bit one and may be above 1.
    """

    operation: str
    shape: str
    plan: str
    us: float
    torch_us: float | None
    fp8_us: float | None
    bound: Bound
    ceiling: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """One call of the network."""

    what: str
    ms: float
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the card reaches, measured: bytes read and written by a copy, multiplications and additions by torch."""

    copy_bytes_per_second: float
    matrix_flops: float  # in 16 bit
    fp8_flops: float | None  # None where torch has none


def workload(shapes: Shapes) -> Workload:
    side = 1024 if shapes == "flux" else 256
    picture = Picture("", "", side, side, steps=1, seed=0, guidance=3.5, cfg=1.0)
    return Workload(FluxConfig(), picture, 512, 10240) if shapes == "flux" else Workload(MINI, picture, 32, 768)


def measured_plans(arch: int) -> list[LayerPlan]:
    """By which int4 linears are measured: the card's own plan, the fallback, and w4a8 where it can be chosen."""
    own = best_plan(arch, "int4").plan
    others: tuple[LayerPlan, ...] = ("w4a8", "w4a16")
    return [own, *(plan for plan in others if plan != own and has_kernels(plan, "int4", arch))]


def bench(device: Device, shapes: Shapes, with_step: bool, report: Report) -> dict[str, Any]:
    """What `bench` prints as JSON (shape: engine/cli.schema.json). `report` may raise to stop."""
    assert device.arch is not None
    job = workload(shapes)
    plan = best_plan(device.arch, "int4").plan
    report("Measuring what the card reaches", 0.0)
    with torch.inference_mode():
        ceilings = measure_ceilings(torch.device(device.torch_name))
        kernels = measure_kernels(job, measured_plans(device.arch), device, ceilings, report)
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


def turn(held: list[T], index: int) -> T:
    return held[index % len(held)]


def copies(linear: A) -> list[A]:
    """The same linear with its weights in other memory each."""
    if linear.qweight is None:  # the reference's
        return [linear]
    return [replace(linear, qweight=qweight) for qweight in in_turns(linear.qweight.clone)]


def measure_ceilings(device: torch.device) -> Ceilings:
    source, target = (torch.empty(ROTATED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    copy_us = microseconds(lambda _: target.copy_(source))
    a, b = (torch.randn(CEILING_SIZE, CEILING_SIZE, device=device).half() for _ in range(2))
    wide_us, fp8_us = microseconds(lambda _: a @ b, rounds=5), fp8_products_us([a], [b], torch.float16)
    flops = 2 * CEILING_SIZE**3 * 1e6
    fp8_flops = None if fp8_us is None else flops / fp8_us
    return Ceilings(2 * ROTATED_BYTES / copy_us * 1e6, flops / wide_us, fp8_flops)


# ---------------------------------------------------------------------------------------------------- the kernels


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape. run: takes a number, see `microseconds`.

    num_bytes: read and written at least; product: (M, N, K) of what multiplies matrices. by_torch: torch's own of
    what is no linear.
    """

    operation: str
    shape: str
    plan: LayerPlan
    run: Callable[[int], object]
    num_bytes: int
    product: tuple[int, int, int] | None = None
    is_linear: bool = False
    by_torch: Callable[[int], object] | None = None

    def bound(self, us: float, ceilings: Ceilings) -> tuple[Bound, float]:
        """The ceiling it meets first, and how near it comes in `us` microseconds."""
        m, n, k = self.product or (0, 0, 0)
        units: Bound = "matrix"
        flops = ceilings.matrix_flops
        if ceilings.fp8_flops is not None and self.is_linear and self.plan == "w4a8":
            units, flops = "fp8", ceilings.fp8_flops
        memory = self.num_bytes / us * 1e6 / ceilings.copy_bytes_per_second
        matrix = 2 * m * n * k / us * 1e6 / flops
        return ("memory", memory) if memory > matrix else (units, matrix)


def measure_kernels(
    job: Workload, plans: list[LayerPlan], device: Device, ceilings: Ceilings, report: Report
) -> list[KernelTime]:
    """Every row of the table. Compiles what is missing first."""
    place, dtype, arch = torch.device(device.torch_name), getattr(torch, device.dtype), jit.current_arch()
    backend = choose(job.config.num_attention_heads, job.tokens, HEAD_DIM, dtype, place, folders.cache())
    make = partial(kernel_cases, job, plans, place, dtype, arch, backend)
    total = 0
    with jit.noted() as variants:
        for case in make():
            case.run(0)
            total += 1
    for done, missing in jit.prepare(variants, arch):
        report(f"Preparing your graphics card, {done} of {missing}", 0.0)
    jit.load(variants)
    linears_us = cache(partial(torch_linears_us, dtype=dtype, device=place))
    times: list[KernelTime] = []
    for case in make():
        report(f"Measuring {case.operation}", (1 + len(times)) / (2 + total))
        us = microseconds(case.run)
        torch_us = fp8_us = None
        if case.is_linear and case.product:
            torch_us, fp8_us = linears_us(*case.product)
        elif case.by_torch:
            torch_us = microseconds(case.by_torch)
        bound, ceiling = case.bound(us, ceilings)
        times.append(KernelTime(case.operation, case.shape, case.plan, us, torch_us, fp8_us, bound, ceiling))
        del case  # its memory goes before the next one's is made
    return times


def kernel_cases(
    job: Workload,
    plans: list[LayerPlan],
    device: torch.device,
    dtype: torch.dtype,
    arch: str | None,
    backend: Backend,
) -> Iterator[Case]:
    """The rows of the table in their order: a block by each plan, then what is the same under all of them.

    One after another, because each holds much memory. arch: the card's ("90a"), None for the reference.
    """
    config = replace(job.config, num_layers=0, num_single_layers=1)
    c, heads, text = config.hidden_size, config.num_attention_heads, config.joint_attention_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    for plan in plans:
        (block,) = random_flux(config, plan, device, dtype, arch).single_blocks
        yield from block_cases(block, plan, cache(lambda width: in_turns(lambda: normal(job.tokens, width))))
    x = normal(job.tokens, c)
    if backend != "fp16":
        yield attention_case(f"attention, {backend}", partial(attend_by, backend), heads, plans[0], x)
    yield attention_case("attention_fp16", attention_fp16, heads, plans[0], x.half())
    yield modulation_case(normal(1, c), 3 * c)
    for name, k, n in (("q, k, v, o", text, text), ("wi", text, job.text_hidden), ("wo", job.text_hidden, text)):
        yield text_case(name, normal(job.text_tokens, k), n, arch)


def block_cases(block: nn.Module, plan: LayerPlan, tokens: Callable[[int], list[Tensor]]) -> Iterator[Case]:
    """What a single block launches by a plan. tokens: its inputs by their width, (M, K) each."""
    linears: list[FusedLinear] = [getattr(block, name) for name in ("qkv", "out", "fc1", "fc2")]
    qkv, out, fc1, fc2 = linears
    streams = tokens(qkv.in_features)
    (m, _), shift, joint = streams[0].shape, streams[0][0].clone(), torch.cat([streams[0]] * 3, dim=1)
    angles, norm = (torch.ones(*shape, device=joint.device) for shape in ((m, HEAD_DIM // 2), (HEAD_DIM,)))

    def quantizing(
        operation: str, name: str, target: ActTarget, quantize: Callable[[Tensor], QuantizedAct]
    ) -> Case:
        inputs = tokens(target.in_features)
        moved = inputs[0].nbytes + num_bytes(quantize(inputs[0]))
        shape = f"{name}, {m} x {target.in_features}, rank {target.rank}"
        return Case(f"{operation}.{plan}", shape, plan, lambda i: quantize(turn(inputs, i)), moved)

    def multiplying(what: str, name: str, linear: FusedLinear, end: Callable[[int], Epilogue]) -> Case:
        n, k = linear.out_features, linear.in_features
        acts = [linear.read(quantize_act(x, linear.target)) for x in tokens(k)]
        arranged = copies(linear.layout.linear)

        def run(index: int) -> Tensor | QuantizedAct:
            return svdq_linear(turn(acts, index), turn(arranged, index), end(index))

        written = num_bytes(run(0)) * (2 if isinstance(end(0), GateResidual) else 1)
        moved = num_bytes(acts[0]) + linear.layout.linear.num_bytes + written
        shape = f"{name}, {m} x {k} -> {n}, rank {linear.rank}"
        return Case(f"svdq_linear.{plan}, {what}", shape, plan, run, moved, (m, n, k), is_linear=True)

    def gated(index: int) -> GateResidual:
        stream = turn(streams, index)
        return GateResidual(shift, stream, stream)

    yield quantizing("quantize_act", "out", out.target, lambda x: quantize_act(x, out.target))
    yield quantizing("quantize_act", "fc2", fc2.target, lambda x: quantize_act(x, fc2.target))
    yield quantizing(
        "modulate_quantize", "qkv, fc1", qkv.target, lambda x: modulate_quantize(x, shift, shift, qkv.target)
    )
    yield multiplying("plain", "qkv", qkv, lambda _: Plain(joint))
    yield multiplying("q/k norm and RoPE", "qkv", qkv, lambda _: QKNormRope(norm, norm, angles, angles, joint))
    yield multiplying("gate and residual", "out", out, gated)
    yield multiplying("GELU and quantize", "fc1", fc1, lambda _: GeluQuantize(fc2.target))
    yield multiplying("gate and residual", "fc2", fc2, gated)


def attention_case(operation: str, run: Callable[..., Tensor], heads: int, plan: LayerPlan, x: Tensor) -> Case:
    """x: (M, C); q, k and v are views as a fused projection leaves them."""
    m, c = x.shape
    views = [
        joint.view(1, m, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        for joint in in_turns(lambda: torch.cat([x] * 3, dim=1))
    ]
    return Case(
        operation,
        f"{heads} heads x {m} x {c // heads}",
        plan,
        lambda i: run(*turn(views, i)),
        4 * x.nbytes,
        (m, m, 2 * c),  # q k^T, and what it weighs v with
        by_torch=lambda i: attend_by("torch", *turn(views, i)),
    )


def random_w4a16(n: int, k: int, group: int, like: Tensor) -> W4A16Weights:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=like.device)
    scales = torch.full((n, k // group), k**-0.5, device=like.device, dtype=like.dtype)
    return W4A16Weights(codes, scales, -7.5 * scales, None, group)


def modulation_case(x: Tensor, n: int) -> Case:
    """x: (1, K), behind its SiLU."""
    k = x.shape[1]
    one = arrange_modulation(random_w4a16(n, k, MODULATION_GROUP, x))
    weights = [replace(one, codes=codes) for codes in in_turns(one.codes.clone)]
    moved = one.codes.nbytes + one.scales.nbytes + 2 * (k + n)

    def run(index: int) -> Tensor:
        return modulation_w4a16(x, turn(weights, index), splits=3)

    return Case("modulation_w4a16", f"1 x {k} -> {n}", "w4a16", run, moved, (1, n, k), is_linear=True)


def text_case(name: str, x: Tensor, n: int, arch: str | None) -> Case:
    """A linear of a 4-bit T5. x: (T, K)."""
    m, k = x.shape
    one = arrange(random_w4a16(n, k, T5_GROUP, x), x.dtype, arch)
    weights = copies(one)

    def run(index: int) -> Tensor:
        return linear_w4a16(x, turn(weights, index))

    moved = x.nbytes + one.num_bytes + m * n * x.itemsize
    return Case("linear_w4a16", f"T5 {name}, {m} x {k} -> {n}", "w4a16", run, moved, (m, n, k), is_linear=True)


def num_bytes(held: Tensor | QuantizedAct) -> int:
    tensors = (held,) if isinstance(held, Tensor) else (held.codes, held.scales, held.low)
    return sum(one.nbytes for one in tensors if one is not None)


def torch_linears_us(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float | None]:
    """torch's own linear in 16 bit with a bias, and its FP8 product where it has that."""

    def random(rows: int) -> list[Tensor]:
        return in_turns(lambda: torch.randn(rows, k, device=device, dtype=dtype))

    inputs, weights, bias = random(m), random(n), torch.randn(n, device=device, dtype=dtype)
    wide_us = microseconds(lambda i: F.linear(turn(inputs, i), turn(weights, i), bias))
    return wide_us, fp8_products_us(inputs, weights, dtype)


def fp8_products_us(xs: list[Tensor], weights: list[Tensor], dtype: torch.dtype) -> float | None:
    """x (M, K) @ weight (N, K).T, a scale per row and column; x was quantized before."""
    xs, weights = ([one.to(torch.float8_e4m3fn) for one in many] for many in (xs, weights))
    scales = torch.ones(len(xs[0]), 1, device=xs[0].device), torch.ones(1, len(weights[0]), device=xs[0].device)
    try:
        return microseconds(lambda i: torch._scaled_mm(turn(xs, i), turn(weights, i).T, *scales, out_dtype=dtype))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # neither this card nor this torch has it
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
