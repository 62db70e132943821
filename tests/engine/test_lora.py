"""The LoRA stack: what it adds, and that it leaves nothing behind."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoints.safetensors_file import write_safetensors
from engine.families.flux import lora_targets
from engine.layers.linear import BranchedLinear
from engine.lora import LoraStack
from engine.models.flux import Flux, FluxConfig
from engine.problems import ProblemError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOY = FluxConfig(
    in_channels=8,
    out_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=1,
    joint_attention_dim=24,
    pooled_projection_dim=12,
    axes_dims_rope=(4, 6, 6),
)


def toy_network() -> Flux:
    torch.manual_seed(5)
    return Flux(TOY).eval().requires_grad_(False)


def velocity(network: Flux) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(1, 6, 8, generator=generator), torch.randn(1, 3, 24, generator=generator)
    ids = torch.tensor([[0.0, y, x] for y in range(2) for x in range(3)])
    pooled = torch.randn(1, 12, generator=generator)
    result: torch.Tensor = network(
        image, text, pooled, torch.tensor([0.7]), torch.tensor([3.0]), ids, torch.zeros(3, 3)
    )
    return result


def write_lora(path: Path, seed: int, rank: int = 4, **extra: torch.Tensor) -> str:
    """A random LoRA for q of one block and the whole of another's MLP."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra)
    for module, rows, columns in (
        ("transformer_blocks.0.attn.to_q", 16, 16),
        ("transformer_blocks.1.ff.net.0.proj", 64, 16),
        ("single_transformer_blocks.1.proj_out", 16, 80),
        ("single_transformer_blocks.0.norm.linear", 48, 16),
    ):
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    write_safetensors(path, tensors, {})
    return str(path)


@pytest.fixture
def loras(tmp_path: Path) -> list[str]:
    return [write_lora(tmp_path / f"{i}.safetensors", seed=i, rank=rank) for i, rank in enumerate((4, 16, 20))]


@pytest.mark.parametrize("name", ["lora_diffusers", "lora_diffusers_alpha"])
def test_the_weight_that_a_file_adds_is_the_golden_one(name, tmp_path):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    path = tmp_path / "lora.safetensors"
    keys = {key.removeprefix("input::"): value for key, value in golden.items() if key.startswith("input::")}
    write_safetensors(path, keys, {})
    network = toy_network()
    [report] = LoraStack(network).set([(str(path), 1.0)])
    assert (report.keys_used, report.keys_unused) == (len(keys), ())
    deltas = {key.removeprefix("delta_weight::"): value for key, value in golden.items() if "delta_weight::" in key}
    targets = lora_targets(network)
    for module, expected in deltas.items():
        for target in targets[module]:
            layer = network.get_submodule(target.name)
            assert isinstance(layer, BranchedLinear)
            assert layer.branches is not None
            eye = torch.eye(layer.in_features)
            added = layer.branches.add_to(torch.zeros(layer.in_features, layer.out_features), eye).T
            ours = added[slice(*target.rows)]
            theirs = expected[:, slice(*target.columns)]
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max())), target.name


def test_a_bias_delta_and_two_files_add_up(loras, tmp_path):
    network = toy_network()
    bias = torch.arange(16.0)
    biased = write_lora(
        tmp_path / "b.safetensors", 9, **{"transformer.single_transformer_blocks.1.proj_out.lora_B.bias": bias}
    )
    stack = LoraStack(network)
    layer = network.get_submodule("single_blocks.1.fc2")
    assert isinstance(layer, BranchedLinear)
    x = torch.randn(3, 64)
    parts = []
    for file, strength in ((loras[0], 0.5), (biased, -1.5)):
        stack.set([(file, strength)])
        parts.append(layer(x) - layer.base(x))
    stack.set([(loras[0], 0.5), (biased, -1.5)])
    assert torch.allclose(layer(x) - layer.base(x), parts[0] + parts[1], atol=1e-4)
    stack.set([(biased, 1.0)])
    assert torch.allclose((layer(torch.zeros(1, 64)) - layer.base(torch.zeros(1, 64)))[0], bias)


def test_strength_zero_is_bit_identical_to_no_lora(loras):
    network = toy_network()
    plain = velocity(network)
    stack = LoraStack(network)
    stack.set([(file, 0.0) for file in loras])
    assert torch.equal(velocity(network), plain)
    stack.set([(file, 1.0) for file in loras])
    assert not torch.equal(velocity(network), plain)


def test_another_lora_at_strength_zero_changes_no_bit(loras):
    network = toy_network()
    stack = LoraStack(network)
    stack.set([(loras[1], 0.8)])
    alone = velocity(network)
    stack.set([(loras[0], 0.0), (loras[1], 0.8), (loras[2], 0.0)])
    assert torch.equal(velocity(network), alone)


def test_a_new_strength_touches_nothing_but_the_scales(loras):
    network = toy_network()
    stack = LoraStack(network)
    stack.set([(file, 1.0) for file in loras])
    layers = [m for m in network.modules() if isinstance(m, BranchedLinear) and m.branches is not None]
    before = [(m.branches, m.branches.proj_down.clone(), m.branches.proj_up.clone()) for m in layers]
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    stack.set([(file, 0.25) for file in loras])
    for layer, (branches, down, up) in zip(layers, before, strict=True):
        assert layer.branches is branches
        assert torch.equal(branches.proj_down, down)
        assert torch.equal(branches.proj_up, up)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_twenty_switches_leave_no_residue(loras):
    network = toy_network()
    stack = LoraStack(network)
    dice = random.Random(1)
    for _ in range(20):
        chosen = dice.sample(loras, dice.randint(0, 3))
        stack.set([(file, dice.choice([-1.0, 0.0, 0.3, 2.0])) for file in chosen])
        velocity(network)
    stack.clear()
    fresh = toy_network()
    assert torch.equal(velocity(network), velocity(fresh))
    stack.set([(loras[2], 0.7)])
    LoraStack(fresh).set([(loras[2], 0.7)])
    assert torch.equal(velocity(network), velocity(fresh))


def test_what_does_not_fit_is_named_with_its_reason(tmp_path):
    path = tmp_path / "odd.safetensors"
    good = "transformer.transformer_blocks.0.attn.to_k"
    write_safetensors(
        path,
        {
            f"{good}.lora_A.weight": torch.ones(2, 16),
            f"{good}.lora_B.weight": torch.ones(16, 2),
            "transformer.transformer_blocks.7.attn.to_k.lora_A.weight": torch.ones(2, 16),
            "transformer.transformer_blocks.0.attn.to_v.lora_A.weight": torch.ones(2, 16),
            "transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.ones(2, 60),
            "transformer.transformer_blocks.0.ff.net.2.lora_B.weight": torch.ones(16, 2),
            "text_encoder.anything": torch.ones(1),
        },
        {},
    )
    [report] = LoraStack(toy_network()).set([(str(path), 1.0)])
    why = {item.key: item.why for item in report.keys_unused}
    assert report.keys_used == 2
    assert why["transformer.transformer_blocks.7.attn.to_k.lora_A.weight"] == "this model has no such layer"
    assert "lora_B.weight is missing" in why["transformer.transformer_blocks.0.attn.to_v.lora_A.weight"]
    assert "16 x 60" in why["transformer.transformer_blocks.0.ff.net.2.lora_A.weight"]
    assert "not a LoRA key" in why["text_encoder.anything"]


def test_a_damaged_file_is_refused_and_the_old_stack_stays(loras, tmp_path):
    network = toy_network()
    stack = LoraStack(network)
    stack.set([(loras[0], 1.0)])
    before = velocity(network)
    broken = write_lora(
        tmp_path / "nan.safetensors", 3,
        **{"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": torch.full((2, 16), float("nan")),
           "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": torch.ones(16, 2)},
    )  # fmt: skip
    for bad in (broken, str(tmp_path / "missing.safetensors")):
        with pytest.raises(ProblemError):
            stack.set([(bad, 1.0)])
        assert torch.equal(velocity(network), before)


def test_more_rank_than_the_kernels_take_is_refused(tmp_path):
    files = [write_lora(tmp_path / f"{i}.safetensors", i, rank=600) for i in range(2)]
    with pytest.raises(ProblemError, match="rank"):
        LoraStack(toy_network()).set([(file, 1.0) for file in files])


def test_memory_that_ends_while_a_stack_is_laid_out_leaves_the_old_one(loras, monkeypatch):
    network = toy_network()
    plain = velocity(network)
    stack = LoraStack(network)
    calls = []

    def out_of_memory(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("engine.lora._bias_rows", out_of_memory)
        with pytest.raises(MemoryError):
            stack.set([(loras[0], 1.0)])
    assert torch.equal(velocity(network), plain)
    stack.clear()
    stack.set([(loras[0], 1.0)])
    fresh = toy_network()
    LoraStack(fresh).set([(loras[0], 1.0)])
    assert torch.equal(velocity(network), velocity(fresh))


def test_a_layer_told_twice_is_used_once_and_said(tmp_path):
    module = "transformer_blocks.0.attn.to_k"
    path = tmp_path / "twice.safetensors"
    factors = {"lora_A.weight": torch.ones(2, 16), "lora_B.weight": torch.ones(16, 2)}
    prefixes = (f"transformer.{module}", module)
    write_safetensors(path, {f"{prefix}.{k}": v.clone() for prefix in prefixes for k, v in factors.items()}, {})
    [report] = LoraStack(toy_network()).set([(str(path), 1.0)])
    assert (report.keys_used, len(report.keys_unused)) == (2, 2)
    assert all("says the same" in item.why for item in report.keys_unused)
