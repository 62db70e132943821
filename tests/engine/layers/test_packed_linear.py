"""4-bit weights that stay 4-bit in memory compute what the expanded ones do."""

from __future__ import annotations

import pytest
import torch

from engine.checkpoints.safetensors_file import open_safetensors
from engine.layers.held_bytes import held_bytes
from engine.layers.svdquant_linear import PackedLinear, W4A16Linear
from engine.reference.linear_w4a16 import W4A16Weights
from engine.text import t5
from tests.end_to_end import tiny_bundle
from tests.tolerances import RELATIVE, largest_error


def random_weights(group: int, has_bias: bool) -> W4A16Weights:
    scales = (torch.rand(96, 256 // group) + 0.5).bfloat16()
    codes = torch.randint(0, 16, (96, 256), dtype=torch.uint8)
    bias = torch.randn(96).bfloat16() if has_bias else None
    return W4A16Weights(codes, scales, (-7.5 * scales).bfloat16(), bias, group)


@pytest.mark.parametrize(
    ("group", "arch"), [(64, None), (128, None), (128, "75")], ids=["modulation", "T5", "T5 in fp32 on a card"]
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_a_packed_linear_is_the_expanded_one(group, arch, has_bias):
    weights = random_weights(group, has_bias)
    packed, expanded = PackedLinear(weights, torch.float32, arch), W4A16Linear(weights)
    x = torch.randn(2, 5, 256)
    assert largest_error(packed(x), expanded(x)) < RELATIVE[torch.float32]
    if arch:
        assert held_bytes(packed) < held_bytes(expanded) / 6


def test_a_t5_of_packed_linears_says_what_one_of_expanded_ones_says(tmp_path, monkeypatch):
    file = open_safetensors(tiny_bundle.write_t5(tmp_path / "t5.safetensors", four_bit=True))
    ids, cpu = [3, 4, 5, 1], torch.device("cpu")
    expected = t5.T5Encoder(file, cpu, torch.float32).encode(ids)
    monkeypatch.setattr(t5, "W4A16Linear", lambda weights, dtype: PackedLinear(weights, dtype))
    assert largest_error(t5.T5Encoder(file, cpu, torch.float32).encode(ids), expected) < RELATIVE[torch.float32]
