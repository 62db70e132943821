"""FLUX on a card: its blocks through kernels, its steps as graphs, its LoRAs live under them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import jit
from engine.checkpoints.safetensors_file import open_safetensors
from engine.families.flux import load_flux, plan_counts
from engine.layers.fused_linear import FusedLinear
from engine.lora import LoraStack
from engine.models.flux import Flux
from engine.models.step_graph import StepGraph, StepGraphs
from tests.engine.families.small_flux import small_flux, write_16_bit, write_svdquant
from tests.engine.layers.test_fused_linear import write_lora
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    made = {
        precision: write_svdquant(folder / f"{precision}.safetensors", small_flux(), precision)[0]
        for precision in ("int4", "nvfp4")
    }
    return made | {"wide": write_16_bit(folder / "wide.safetensors", small_flux())}


def load(
    files: dict[str, Path], precision: str, plan: str, where: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Flux:
    return load_flux(open_safetensors(files[precision]), plan, where, dtype, fused=True)


def inputs(
    where: str = "cuda", batch: int = 1, seed: int = 2, rows: int = 5, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor | None, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(where, dtype)

    ids = torch.tensor([[0.0, y, x] for y in range(rows) for x in range(3)], device=where)
    timestep = torch.rand(batch, generator=generator).to(where)
    guidance = torch.full((batch,), 3.0, device=where)
    return (
        normal(3 * rows, 64), normal(7, 64), normal(32), timestep, guidance, ids, torch.zeros(7, 3, device=where)
    )  # fmt: skip


@torch.inference_mode()
def step(network: Callable[..., Tensor], *given: object, **named: Any) -> Tensor:
    return network(*given, *inputs(**named)).clone()  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("precision", "plan"),
    [("int4", "w4a4"), ("int4", "w4a8"), ("int4", "w4a16"), ("nvfp4", "w4a16")],
)
def test_a_step_is_the_references(files, precision, plan, dtype):
    """Off by what the reference does when its input is moved by up to one unit of h, half as much again at most:
    a card's sums round the other way now and then, and codes flip with that.
    """
    network = load(files, precision, plan, dtype=dtype)
    found = step(network, dtype=dtype).cpu()
    reference = load(files, precision, plan, "cpu", dtype)
    image, *others = inputs("cpu", dtype=dtype)
    nudge = 1 + torch.finfo(dtype).eps * (torch.rand(image.shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    with torch.inference_mode():
        expected, moved = reference(image, *others), reference((image * nudge).to(dtype), *others)
    error, tolerance = relative_error(found, expected), 1.5 * relative_error(moved, expected)
    print(f"\n{precision} {plan} {dtype}: {error:.4f} of {tolerance:.4f}, {plan_counts(network)}")
    assert error < tolerance


@pytest.mark.parametrize(("precision", "plan"), [("int4", "w4a4"), ("int4", "w4a8"), ("nvfp4", "w4a16")])
def test_a_model_needs_24_kernels_at_most(files, precision, plan):
    network = load(files, precision, plan)
    with jit.noted() as variants:
        for rows in (1, 40, 400):  # tiles of kernels depend on how much there is to do
            step(network, rows=rows)
    assert 0 < len(variants) <= 24


def test_a_16_bit_network_and_a_batch_run_too(files):
    with torch.inference_mode():
        expected = load(files, "wide", "w4a16", "cpu")(*inputs("cpu", batch=2))
    assert relative_error(step(load(files, "wide", "w4a16"), batch=2).cpu(), expected) < 0.02
    both = load(files, "int4", "w4a4")
    pair = inputs(batch=2)
    with torch.inference_mode():
        second = both(*(x[1:] if i < 5 else x for i, x in enumerate(pair)))
        assert torch.equal(both(*pair)[1:], second)


@pytest.mark.parametrize("plan", ["w4a4", "w4a8", "w4a16"])
def test_fifty_steps_are_one(files, plan):
    network = load(files, "int4", plan)
    first = step(network)
    assert all(torch.equal(step(network), first) for _ in range(50))


@pytest.mark.parametrize("plan", ["w4a4", "w4a8", "w4a16"])
def test_a_graph_makes_the_same_bytes_and_takes_new_inputs(files, plan):
    network = load(files, "int4", plan)
    graphs = StepGraphs(network)
    for seed in (2, 3, 4, 5, 2):
        assert torch.equal(step(graphs, 0, seed=seed), step(network, seed=seed))
    assert [type(graph) for graph in graphs._graphs.values()] == [StepGraph]


def test_strengths_are_live_under_a_graph_and_zero_is_no_lora(files, tmp_path):
    network = load(files, "int4", "w4a8")
    plain = step(network)
    loras = [write_lora(tmp_path / f"{i}.safetensors", i, 4 + 8 * i, bias=i % 2 == 1) for i in range(8)]
    stack, graphs = LoraStack(network), StepGraphs(network)
    for chosen in ([], loras[:1], loras):
        stack.set([(file, 0.0) for file in chosen])
        assert torch.equal(step(network), plain)
        for _ in range(4):
            assert torch.equal(step(graphs, stack.layout), plain)
    for strength in (1.0, 0.0, -0.5, 0.3):
        stack.set([(file, strength) for file in loras])
        expected = step(network)
        assert torch.equal(step(graphs, stack.layout), expected)
        assert torch.equal(expected, plain) == (strength == 0)
    stack.set([(loras[3], 0.7)])
    alone = step(network)
    stack.set([(file, 0.7 if file == loras[3] else 0.0) for file in loras])
    assert torch.equal(step(network), alone)
    stack.clear()
    assert torch.equal(step(network), plain)
    assert torch.equal(step(graphs, stack.layout), plain)


def test_a_lora_on_the_card_adds_what_the_reference_adds(files, tmp_path):
    lora = write_lora(tmp_path / "a.safetensors", 1, 20, bias=True)
    results = []
    for where in ("cuda", "cpu"):
        network = load(files, "int4", "w4a16", where)
        LoraStack(network).set([(lora, 0.8)])
        results.append(step(network, where=where).cpu())
    assert relative_error(*results) < 0.02


def test_a_lora_on_16_bit_linears_is_live_under_a_graph_too(files, tmp_path):
    network = load(files, "wide", "w4a16")
    plain = step(network)
    lora = write_lora(tmp_path / "a.safetensors", 1, 20, bias=True)
    stack, graphs = LoraStack(network), StepGraphs(network)
    for strength in (0.5, 0.5, 0.5, 0.0, -1.0):
        stack.set([(lora, strength)])
        assert torch.equal(step(graphs, stack.layout), step(network))
        assert torch.equal(step(network), plain) == (strength == 0)


def test_three_graphs_live_at_most_and_no_memory_for_one_is_no_failure(files, monkeypatch):
    network = load(files, "int4", "w4a4")
    graphs = StepGraphs(network)
    for rows in (2, 3, 4, 5, 2):
        for _ in range(4):
            assert torch.equal(step(graphs, 0, rows=rows), step(network, rows=rows))
        assert len(graphs._graphs) <= 3

    def out_of_memory(*given: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(*given)

    poor = StepGraphs(out_of_memory)
    for _ in range(5):
        assert torch.equal(step(poor, 0), step(network))
    assert list(poor._graphs.values()) == [None]


def test_memory_of_the_network_is_what_its_tensors_say(files):
    from engine.layers.held_bytes import held_bytes

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    network = load(files, "int4", "w4a8")
    after = torch.cuda.memory_allocated()
    assert held_bytes(network) <= after - before < 1.2 * held_bytes(network)
    assert sum(isinstance(module, FusedLinear) for module in network.modules()) == 16
