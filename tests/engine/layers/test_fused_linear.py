"""Blocks through fused linears: what they compute, and that LoRAs on them leave nothing behind.

On the CPU, through the reference: the same layer code as on a card.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.checkpoints.svdquant_file import read_svdquant_linear, read_w4a16
from engine.device import PlanChoice
from engine.families.flux import linears_of, load_flux, plan_counts
from engine.layers import modulation
from engine.layers.fused_linear import FusedLinear, share_input
from engine.layers.held_bytes import held_bytes
from engine.layers.svdquant_linear import PackedLinear, SVDQuantLinear
from engine.lora import LoraStack
from engine.models.flux import Flux
from engine.pipelines.foresight import loaded_bytes
from engine.problems import ProblemError
from tests.engine.families.small_flux import SMALL, random_svdquant, small_flux, write_svdquant
from tests.tolerances import relative_error


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return {
        precision: write_svdquant(folder / f"{precision}.safetensors", small_flux(), precision)[0]
        for precision in ("int4", "nvfp4")
    }


def network(files: dict[str, Path], precision: str = "int4", plan: str = "w4a4", fused: bool = True) -> Flux:
    return load_flux(open_safetensors(files[precision]), plan, fused=fused)


def velocity(network: Flux, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(batch, 6, 64, generator=generator), torch.randn(batch, 3, 64, generator=generator)
    ids = torch.tensor([[0.0, y, x] for y in range(2) for x in range(3)])
    pooled = torch.randn(batch, 32, generator=generator)
    timestep, guidance = torch.rand(batch, generator=generator), torch.full((batch,), 3.0)
    with torch.inference_mode():
        result: Tensor = network(image, text, pooled, timestep, guidance, ids, torch.zeros(3, 3))
    return result


def write_lora(path: Path, seed: int, rank: int = 4, bias: bool = False) -> str:
    """For linears with and without a shared input, before and behind a GELU, and for a modulation."""
    generator = torch.Generator().manual_seed(seed)
    c, tensors = SMALL.hidden_size, {}
    for module, rows, columns in (
        ("transformer_blocks.0.attn.to_q", c, c),
        ("transformer_blocks.0.ff.net.2", c, 4 * c),
        ("single_transformer_blocks.0.norm.linear", 3 * c, c),
        ("single_transformer_blocks.1.attn.to_v", c, c),
        ("single_transformer_blocks.1.proj_mlp", 4 * c, c),
        ("single_transformer_blocks.1.proj_out", c, 5 * c),
    ):
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        tensors[f"transformer.{module}.lora_A.weight"] = down
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.3
        if bias:
            tensors[f"transformer.{module}.lora_B.bias"] = torch.randn(rows, generator=generator) * 0.3
    write_safetensors(path, {name: tensor.bfloat16() for name, tensor in tensors.items()}, {})
    return str(path)


@pytest.fixture
def loras(tmp_path: Path) -> list[str]:
    return [
        write_lora(tmp_path / f"{seed}.safetensors", seed, rank, bias)
        for seed, (rank, bias) in enumerate([(4, False), (16, True), (20, False)])
    ]


@pytest.mark.parametrize(("precision", "plan"), [("int4", "w4a4"), ("int4", "w4a16"), ("nvfp4", "w4a4")])
def test_blocks_of_fused_linears_compute_what_their_linears_do_one_by_one(files, precision, plan):
    fused = network(files, precision, plan)
    assert any(isinstance(module, FusedLinear) for module in fused.modules())
    one_by_one = network(files, precision, plan, fused=False)
    assert plan_counts(fused) == plan_counts(one_by_one)
    assert relative_error(velocity(fused), velocity(one_by_one)) < 1e-5


def test_scales_fixed_before_a_gemm_stay_near_those_of_its_tokens(files):
    by_token = velocity(network(files, plan="w4a8", fused=False))
    assert relative_error(velocity(network(files, plan="w4a8")), by_token) < 0.04


def test_a_batch_is_its_pictures_one_by_one(files):
    fused = network(files)
    both = velocity(fused, batch=2)
    assert relative_error(both, velocity(network(files, fused=False), batch=2)) < 1e-5


def test_a_single_block_quantizes_its_input_once(files, monkeypatch):
    fused = network(files, plan="w4a8")
    for block in fused.single_blocks:  # the file's factors are random; the quantizer gives both the same
        fc1 = block.fc1.own_layout
        smooth = block.qkv.target.smooth_factor
        block.fc1.layout = block.fc1.own_layout = replace(fc1, target=replace(fc1.target, smooth_factor=smooth))
    apart = velocity(fused)
    calls = []
    quantize = modulation.modulate_quantize
    monkeypatch.setattr(modulation, "modulate_quantize", lambda *given: calls.append(given) or quantize(*given))
    velocity(fused)
    before = len(calls)
    for block in fused.single_blocks:
        share_input(block.qkv, block.fc1)
        assert block.qkv.target is block.fc1.target
        assert block.qkv.layout.ranks == slice(0, 32)
        assert block.fc1.layout.ranks == slice(32, 64)
    calls.clear()
    assert torch.equal(velocity(fused), apart)
    assert len(calls) == before - SMALL.num_single_layers


def test_linears_that_want_different_things_share_nothing(files):
    block = network(files).single_blocks[0]
    assert block.qkv.target is not block.fc1.target


@pytest.mark.parametrize("plan", ["w4a4", "w4a8", "w4a16"])
def test_a_lora_adds_what_it_adds_on_the_processors_own_way(files, loras, plan):
    choices = [(loras[0], 0.8), (loras[1], -0.5)]
    changes = []
    for fused in (True, False):
        made = network(files, plan=plan, fused=fused)
        plain = velocity(made)
        LoraStack(made).set(choices)
        changes.append(velocity(made) - plain)
    assert relative_error(*changes) < {"w4a16": 1e-4, "w4a4": 1e-3, "w4a8": 0.3}[plan]


def test_strength_zero_is_bit_identical_to_no_lora(files, loras):
    fused = network(files)
    plain = velocity(fused)
    stack = LoraStack(fused)
    stack.set([(file, 0.0) for file in loras])
    assert torch.equal(velocity(fused), plain)
    stack.set([(loras[0], 0.0), (loras[1], 0.8), (loras[2], 0.0)])
    among_others = velocity(fused)
    stack.set([(loras[1], 0.8)])
    assert torch.equal(velocity(fused), among_others)
    assert not torch.equal(among_others, plain)
    stack.clear()
    assert torch.equal(velocity(fused), plain)
    assert all(m.layout is m.own_layout for m in fused.modules() if isinstance(m, FusedLinear))


def test_a_new_strength_writes_into_memory_that_stays(files, loras):
    fused = network(files)
    stack = LoraStack(fused)
    stack.set([(file, 1.0) for file in loras])
    layout, number = fused.single_blocks[1].fc1.layout, stack.layout
    pointers = layout.linear.rank_scales.data_ptr(), layout.target.rank_scales.data_ptr()
    stack.set([(loras[0], 0.25), (loras[1], 0.0), (loras[2], -2.0)])
    assert fused.single_blocks[1].fc1.layout is layout
    assert stack.layout == number
    assert (layout.linear.rank_scales.data_ptr(), layout.target.rank_scales.data_ptr()) == pointers
    assert layout.linear.rank_scales.tolist() == [1.0, 1.0, 0.25, 0.0, -2.0, -2.0]
    stack.set([(loras[0], 0.25)])
    assert stack.layout == number + 1


def test_a_bias_follows_its_strength_and_the_files_own_stays(files, loras):
    fused = network(files)
    fc2 = fused.double_blocks[0].image.fc2
    own = fc2.layout.linear.bias.clone()
    stack = LoraStack(fused)
    stack.set([(loras[1], 2.0)])
    added = fc2.layout.linear.bias - own
    stack.set([(loras[1], 1.0)])
    assert torch.allclose((fc2.layout.linear.bias - own) * 2, added, atol=1e-5)
    assert added.abs().max() > 0.1
    stack.set([(loras[1], 0.0)])
    assert torch.equal(fc2.layout.linear.bias, own)
    assert torch.equal(fc2.own_layout.linear.bias, own)


def test_more_rank_than_one_kernel_takes_is_refused_and_than_two_take_together_split(files, tmp_path):
    fused = network(files)
    with pytest.raises(ProblemError, match="992 is the most"):
        LoraStack(fused).set([(write_lora(tmp_path / "much.safetensors", 1, rank=1008), 1.0)])
    block = fused.single_blocks[1]
    fc1 = block.fc1.own_layout
    smooth = block.qkv.target.smooth_factor
    block.fc1.layout = block.fc1.own_layout = replace(fc1, target=replace(fc1.target, smooth_factor=smooth))
    share_input(block.qkv, block.fc1)
    LoraStack(fused).set([(write_lora(tmp_path / "some.safetensors", 1, rank=512), 1.0)])
    assert block.qkv.target is not block.fc1.target
    assert block.fc1.target.rank == 544
    assert torch.isfinite(velocity(fused)).all()


def test_a_code_of_minus_eight_runs_weight_only_under_w4a8():
    weights = random_svdquant(256, 128, "int4", 16, 0.0, torch.Generator().manual_seed(1), has_bias=True)
    assert FusedLinear(weights, "w4a8", torch.float32).plan == "w4a8"
    weights.codes[3, 5] = -8
    layer = FusedLinear(weights, "w4a8", torch.float32)
    assert (layer.plan, layer.target.format) == ("w4a16", "half")


def test_what_the_card_has_no_kernel_for_runs_weight_only(files):
    weights = random_svdquant(256, 128, "nvfp4", 16, 0.0, torch.Generator().manual_seed(1), has_bias=True)
    assert FusedLinear(weights, "w4a4", torch.bfloat16, "120a").plan == "w4a4"
    assert FusedLinear(weights, "w4a4", torch.bfloat16, "90a").plan == "w4a16"


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_files_header_tells_what_its_layers_take_on_a_card(files, precision):
    file = open_safetensors(files[precision])
    told = loaded_bytes(file, 2, PlanChoice("w4a16", ""), on_card=True)
    made = network(files, precision, "w4a16", fused=False)
    held = 0
    for names in linears_of(SMALL):
        if names.kind == "quantized":
            weights = read_svdquant_linear(file, names.public)
            held += held_bytes(FusedLinear(weights, "w4a16", torch.bfloat16, "90a"))
        elif names.kind == "modulation":
            held += held_bytes(PackedLinear(read_w4a16(file, names.public, splits=names.splits), torch.bfloat16))
        else:
            held += held_bytes(made.get_submodule(names.name)) // 2  # fp32 here
    assert told == pytest.approx(held, rel=0.05)  # files pad the scales of modulations as narrow as these


def test_a_layer_of_odd_sizes_is_expanded_instead(tmp_path):
    fused = load_flux(open_safetensors(write_svdquant(tmp_path / "q.safetensors", small_flux())[0]), fused=True)
    assert not any(isinstance(module, SVDQuantLinear) for module in fused.modules())
