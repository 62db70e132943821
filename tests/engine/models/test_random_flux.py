"""A FLUX of random weights: alive through all its blocks, the same each time, as small as 4 bits promise."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from engine.families.flux import linears_of, plan_counts
from engine.layers.fused_linear import FusedLinear
from engine.layers.held_bytes import held_bytes
from engine.layers.svdquant_linear import PackedLinear
from engine.models.flux import Flux, FluxConfig
from engine.models.random_flux import random_flux, random_layer
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import Precision, SVDQuantWeights

GIB = 2**30
SMALL = FluxConfig(num_layers=1, num_single_layers=2, num_attention_heads=2, joint_attention_dim=64)
CPU = torch.device("cpu")
ROWS = 128


def weights(k: int, shift: float, precision: Precision) -> SVDQuantWeights:
    """ROWS rows of zeros."""
    int4 = precision == "int4"
    return SVDQuantWeights(
        precision=precision,
        codes=torch.zeros(ROWS, k, dtype=torch.int8 if int4 else torch.uint8),
        wscales=torch.zeros(ROWS, k // (64 if int4 else 16)).to(torch.bfloat16 if int4 else torch.float8_e4m3fn),
        smooth_factor=torch.ones(k, dtype=torch.bfloat16),
        bias=torch.zeros(ROWS, dtype=torch.bfloat16),
        proj_down=torch.zeros(k, 32, dtype=torch.bfloat16),
        proj_up=torch.zeros(ROWS, 32, dtype=torch.bfloat16),
        wtscale=None if int4 else torch.tensor(1.0),
        input_shift=shift if int4 else 0.0,
    )


@cache
def bytes_of_layer(n: int, k: int, shift: float, plan: str, precision: Precision, arch: str) -> int:
    """What a layer holds on a card, counted from its first rows: all but what belongs to its input grows with N."""
    layer = FusedLinear(weights(k, shift, precision), plan, torch.bfloat16, arch)  # type: ignore[arg-type]
    layer.feeds(None)
    assert layer.plan == plan
    grows = layer.layout.linear.num_bytes - layer.layout.linear.rank_scales.nbytes
    return grows * n // ROWS + held_bytes(layer) - grows


@cache
def bytes_of_modulation(n: int, k: int) -> int:
    scales = torch.zeros(ROWS, k // 64, dtype=torch.bfloat16)
    codes, bias = torch.zeros(ROWS, k, dtype=torch.uint8), torch.zeros(ROWS, dtype=torch.bfloat16)
    return held_bytes(PackedLinear(W4A16Weights(codes, scales, scales, bias, 64), torch.bfloat16)) * n // ROWS


@pytest.mark.parametrize(
    ("precision", "plan", "arch"),
    [
        ("int4", "w4a4", "89"),
        ("int4", "w4a8", "90a"),
        ("int4", "w4a8", "120a"),
        ("int4", "w4a16", "100a"),
        ("nvfp4", "w4a4", "120a"),
        ("nvfp4", "w4a16", "90a"),
    ],
)
def test_flux_takes_at_most_6_7_gib_of_graphics_memory(precision, plan, arch):
    config = FluxConfig()
    with torch.device("meta"):
        network = Flux(config)
    total = 0
    for names in linears_of(config):
        linear = network.get_submodule(names.name)
        n, k = linear.out_features, linear.in_features
        match names.kind:
            case "quantized":
                total += bytes_of_layer(n, k, names.input_shift, plan, precision, arch)
            case "modulation":
                total += bytes_of_modulation(n, k)
            case _:
                total += 2 * (n * k + n)
    print(f"\n{precision} {plan} sm_{arch}: {total / GIB:.3f} GiB")
    assert 6.0 * GIB < total <= 6.7 * GIB


def test_numbers_stay_alive_and_inputs_have_outliers():
    network = random_flux(SMALL, "w4a8", CPU, torch.float32)
    assert plan_counts(network) == {"bf16": 10, "w4a16": 4, "w4a8": 16}
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(1, 16, 64, generator=generator), torch.randn(1, 8, 64, generator=generator)
    ids = torch.zeros(16, 3)
    with torch.inference_mode():
        velocity = network(
            image,
            text,
            torch.randn(1, 768, generator=generator),
            torch.ones(1),
            torch.ones(1),
            ids,
            torch.zeros(8, 3),
        )
        _, scale, _ = network.single_blocks[0].modulation(torch.ones(1, 256)).chunk(3, dim=1)
    assert 0.1 < velocity.std() < 10
    assert scale.max() > 10 * scale.median()


def test_the_same_name_makes_the_same_layer_and_a_single_block_shares_its_input():
    one, other = (random_layer("single_blocks.1.fc1", SMALL, CPU) for _ in range(2))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.proj_up, other.proj_up)
    assert not torch.equal(one.codes, random_layer("single_blocks.0.fc1", SMALL, CPU).codes)
    block = random_flux(replace(SMALL, num_layers=0), "w4a4", CPU, torch.float32).single_blocks[1]
    assert block.qkv.target is block.fc1.target
