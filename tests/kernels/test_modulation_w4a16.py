"""modulation_w4a16: shifts, scales and gates in the order that layers use, from the golden modulation layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.checkpoints.svdquant_file import read_w4a16
from engine.reference.modulation_w4a16 import modulation_w4a16
from tests.golden import GOLDEN, golden
from tests.tolerances import RELATIVE, largest_error


@pytest.mark.parametrize(("case", "splits", "scales"), [("adanorm_zero", 6, (1, 4)), ("adanorm_single", 3, (1,))])
def test_parts_come_in_logical_order_and_scales_contain_their_one(
    case: str, splits: int, scales: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = golden("awq_w4a16")
    packed = {k.replace(".packed.", "."): t for k, t in tensors.items() if k.startswith(f"{case}.packed.")}
    write_safetensors(tmp_path / "layer.safetensors", packed, {})
    weights = read_w4a16(open_safetensors(tmp_path / "layer.safetensors"), case, splits=splits)
    codes, group_scale = tensors[f"{case}.logical.codes_signed"].float(), tensors[f"{case}.logical.group_scale"]
    dense = (codes.view(24, 16, 64) * group_scale.float().unsqueeze(-1)).view(24, 1024)
    bias = tensors[f"{case}.logical.bias"].float().view(splits, -1).clone()
    bias[list(scales)] += 1
    x = torch.randn(5, 1024)
    expected = (x @ dense.T).view(5, splits, -1) + bias
    # The stored zeros are -7 scales rounded to bf16, and so is the bias with its one.
    assert largest_error(modulation_w4a16(x, weights, splits), expected) < 2 * RELATIVE[torch.bfloat16]


def test_the_golden_block_is_reproduced() -> None:
    file = open_safetensors(GOLDEN / "mini_flux_single_block_int4.safetensors")
    probes = golden("mini_flux_single_block_int4_probes")
    weights = read_w4a16(file, "single_transformer_blocks.0.norm.linear", splits=3)
    shift, scale, gate = modulation_w4a16(probes["norm.linear.x_after_silu"], weights, 3).unbind(1)
    assert largest_error(shift, probes["norm.linear.shift"]) < RELATIVE[torch.float32]
    assert largest_error(scale, probes["norm.linear.scale_plus_one"]) < RELATIVE[torch.float32]
    assert largest_error(gate, probes["norm.linear.gate"]) < RELATIVE[torch.float32]


def test_rows_that_do_not_split_are_refused(tmp_path: Path) -> None:
    file = open_safetensors(GOLDEN / "mini_flux_single_block_int4.safetensors")
    weights = read_w4a16(file, "single_transformer_blocks.0.norm.linear")
    with pytest.raises(ValueError, match="multiple of 5"):
        modulation_w4a16(torch.zeros(1, 128), weights, 5)
