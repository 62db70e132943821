"""What becomes of every layer is decided from names and sizes alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.families.flux import linears_of
from engine.models.flux import Flux
from engine.problems import ProblemError
from engine.quantizer.plan import kept_linears, plan_units
from tests.engine.families.small_flux import SMALL


def network(**sizes: object) -> Flux:
    with torch.device("meta"):
        return Flux(dataclasses.replace(SMALL, **sizes))


def test_every_linear_is_in_exactly_one_unit():
    units = plan_units(network(), "int4", ())
    made = [names.name for unit in units for names in unit.linears]
    assert sorted(made) == sorted(names.name for names in linears_of(SMALL))
    kinds = {kind: sum(len(u.linears) for u in units if u.kind == kind) for kind in ("svdquant", "modulation")}
    assert kinds == {"svdquant": 8 + 2 * 4, "modulation": 2 + 2}


def test_in_single_blocks_qkv_and_fc1_read_one_input():
    units = {unit.name: unit for unit in plan_units(network(), "int4", ())}
    assert [n.name for n in units["single_blocks.1.qkv"].linears] == ["single_blocks.1.qkv", "single_blocks.1.fc1"]
    assert "single_blocks.1.fc1" not in units
    assert [n.name for n in units["double_blocks.0.image.qkv"].linears] == ["double_blocks.0.image.qkv"]


@pytest.mark.parametrize(
    "pattern", ["single_blocks.0.qkv", "single_transformer_blocks.0.qkv_proj", "*_blocks.0.attn.to_k"]
)
def test_a_pattern_may_use_any_of_a_layers_names(pattern):
    assert kept_linears(linears_of(SMALL), [(pattern, "int8")]).get("single_blocks.0.qkv") == "int8"


def test_parts_of_one_module_are_kept_together():
    kept = kept_linears(linears_of(SMALL), [("single_blocks.0.out", "bf16")])
    assert kept == {"single_blocks.0.out": "bf16", "single_blocks.0.fc2": "bf16"}


def test_the_last_pattern_counts():
    kept = kept_linears(linears_of(SMALL), [("*.fc1", "int8"), ("single_blocks.0.fc1", "bf16")])
    assert kept["single_blocks.0.fc1"] == "bf16"
    assert kept["single_blocks.1.fc1"] == "int8"


def test_a_partner_of_a_kept_layer_is_still_quantized():
    units = plan_units(network(), "int4", [("single_blocks.0.fc1", "bf16")])
    shared = next(unit for unit in units if unit.name == "single_blocks.0.qkv")
    assert [names.name for names in shared.linears] == ["single_blocks.0.qkv"]


def test_a_pattern_that_matches_nothing_is_a_problem():
    with pytest.raises(ProblemError, match="No layer is called"):
        plan_units(network(), "int4", [("single_blocks.99.*", "bf16")])


def test_a_width_that_4_bits_cannot_take_is_a_problem_that_says_how_to_go_on():
    narrow = network(num_attention_heads=1, attention_head_dim=32, axes_dims_rope=(4, 14, 14))
    with pytest.raises(ProblemError, match="--keep"):
        plan_units(narrow, "int4", ())
