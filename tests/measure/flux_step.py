"""One denoising step of a FLUX.1-sized transformer on this card: ours beside diffusers' in bf16.

    python tests/measure/flux_step.py [--size 1024] [--plan auto] [--no-peers] [--no-check]

Random weights with outliers (engine/models/random_flux.py), 512 text tokens. Prints Markdown: times, bytes, and how
the kernels of sampled layers agree with the reference on the same inputs.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from engine import jit
from engine.device import best_plan
from engine.families.flux import linears_of
from engine.layers.attention_choice import choose
from engine.layers.held_bytes import held_bytes
from engine.models.flux import Flux, FluxConfig
from engine.models.random_flux import random_flux, random_layer
from engine.models.step_graph import EAGER_STEPS, StepGraphs
from tests.measure.recorded_kernels import Recorder

GIB = 2**30
TEXT_TOKENS = 512
ROUNDS = 7
SAMPLED = ("double_blocks.0.", "double_blocks.18.", "single_blocks.0.", "single_blocks.37.")
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16


def step_inputs(config: FluxConfig, size: int) -> dict[str, Tensor]:
    """What both networks take, by our names."""
    side = size // 16
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, device=DEVICE, dtype=DTYPE)

    ids = torch.zeros(side, side, 3, device=DEVICE)
    ids[..., 1] = torch.arange(side, device=DEVICE)[:, None]
    ids[..., 2] = torch.arange(side, device=DEVICE)
    return {
        "image": normal(side * side, config.in_channels),
        "text": normal(TEXT_TOKENS, config.joint_attention_dim),
        "pooled": normal(config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=DEVICE),
        "guidance": torch.full((1,), 3.5, device=DEVICE),
        "image_ids": ids.view(-1, 3),
        "text_ids": torch.zeros(TEXT_TOKENS, 3, device=DEVICE),
    }


def milliseconds(run: Callable[[], object]) -> str:
    """Median of CUDA events, and the range."""
    for _ in range(2):
        run()
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return f"{median(times):.1f} ({min(times):.1f}-{max(times):.1f})"


def row(what: str, ms: str, weights: int, *rest: str) -> None:
    peak = torch.cuda.max_memory_allocated() / GIB
    print(f"| {what} | {ms} | {weights / GIB:.2f} | {peak:.2f} | {', '.join(rest)} |", flush=True)


def forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure_ours(config: FluxConfig, plan: Any, size: int, check: bool) -> str:
    """Two rows; returns the table of agreements."""
    forget()
    started = time.perf_counter()
    network = random_flux(config, plan, DEVICE, DTYPE, jit.current_arch())
    torch.cuda.synchronize()
    loaded, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() / GIB
    inputs, weights = tuple(step_inputs(config, size).values()), held_bytes(network)
    with jit.noted() as variants:
        network(*inputs)
    started = time.perf_counter()
    jit.load(variants)
    compiled = time.perf_counter() - started
    with TemporaryDirectory() as folder:
        tokens = inputs[0].shape[1] + TEXT_TOKENS
        backend = choose(config.num_attention_heads, tokens, 128, DTYPE, DEVICE, Path(folder))
    torch.cuda.reset_peak_memory_stats()
    velocity = network(*inputs)
    told = f"made in {loaded:.1f} s, peak while loading {peak:.2f} GiB; {len(variants)} kernels in {compiled:.1f} s"
    row(f"ours, {plan}, eager", milliseconds(lambda: network(*inputs)), weights, told, f"attention {backend}")
    graphs = StepGraphs(network)
    for _ in range(EAGER_STEPS + 1):
        replayed = graphs(0, *inputs)
    same = "same bytes as eager" if torch.equal(replayed, velocity) else "OTHER BYTES than eager"
    row(f"ours, {plan}, CUDA graph", milliseconds(lambda: graphs(0, *inputs)), weights, same)
    return check_layers(network, config, inputs) if check else ""


def check_layers(network: Flux, config: FluxConfig, inputs: tuple[Tensor, ...]) -> str:
    """How the kernels of the sampled layers agree with the reference, as a table."""
    forget()
    sampled = [
        names.name for names in linears_of(config) if names.kind == "quantized" and names.name.startswith(SAMPLED)
    ]
    recorder = Recorder({name: random_layer(name, config, DEVICE) for name in sampled}, DEVICE)
    with recorder.watching(network):
        network(*inputs)
    return recorder.table()


def measure_diffusers(config: FluxConfig, size: int) -> None:
    """Rows of FluxTransformer2DModel in bf16, eager and compiled block by block."""
    from diffusers import FluxTransformer2DModel

    forget()
    options = {key: value for key, value in config.to_json().items() if key != "_class_name"}
    with torch.device("meta"):
        oracle = FluxTransformer2DModel(**{**options, "axes_dims_rope": tuple(options["axes_dims_rope"])})
    oracle = oracle.to(DTYPE).to_empty(device=DEVICE).requires_grad_(False).eval()
    generator = torch.Generator(DEVICE).manual_seed(2)
    for name, parameter in oracle.named_parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.0
        parameter.normal_(0.0, spread, generator=generator)
        if "norm" in name and parameter.ndim == 1 and "linear" not in name:
            parameter.fill_(1.0)
    given = step_inputs(config, size)
    named = {
        "hidden_states": given["image"],
        "encoder_hidden_states": given["text"],
        "pooled_projections": given["pooled"],
        "timestep": given["timestep"],
        "guidance": given["guidance"],
        "img_ids": given["image_ids"],
        "txt_ids": given["text_ids"],
        "return_dict": False,
    }
    weights = held_bytes(oracle)
    row("diffusers, bf16, eager", milliseconds(lambda: oracle(**named)), weights)
    started = time.perf_counter()
    oracle.compile_repeated_blocks(fullgraph=True)
    oracle(**named)
    compiled = time.perf_counter() - started
    row(
        "diffusers, bf16, torch.compile",
        milliseconds(lambda: oracle(**named)),
        weights,
        f"compiled in {compiled:.0f} s",
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    plan = best_plan(10 * major + minor, "int4").plan if options.plan == "auto" else options.plan
    config = FluxConfig()
    print(
        f"{torch.cuda.get_device_name()}, sm_{jit.current_arch()}, torch {torch.__version__}, {options.size} pixels"
    )
    print("\n| one step, batch 1 | ms, median (range) | weights GiB | peak GiB | |\n|---|---|---|---|---|")
    table = measure_ours(config, plan, options.size, not options.no_check)
    if not options.no_peers:
        with torch.no_grad():
            measure_diffusers(config, options.size)
    if table:
        print(f"\nSampled layers ({', '.join(SAMPLED)}) against the reference, same inputs:\n\n{table}")


if __name__ == "__main__":
    main()
