"""linear_w4a16: the weight-only linear, and the golden T5 layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.checkpoints.svdquant_file import read_w4a16
from engine.reference.linear_w4a16 import linear_w4a16
from tests.golden import golden
from tests.tolerances import RELATIVE, largest_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_golden_t5_layer_is_its_logical_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = golden("awq_w4a16")
    packed = {k.replace(".packed.", "."): t for k, t in tensors.items() if k.startswith("t5_linear.packed.")}
    write_safetensors(tmp_path / "t5.safetensors", packed, {})
    weights = read_w4a16(open_safetensors(tmp_path / "t5.safetensors"), "t5_linear")
    codes, zeros, scales = (
        tensors[f"t5_linear.logical.{name}"].float() for name in ("codes", "zero", "group_scale")
    )
    logical = (codes.view(16, 8, 128) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    x = torch.randn(2, 3, 1024).to(dtype)
    found = linear_w4a16(x, weights)
    assert found.dtype == dtype
    # zeros are stored as -zero * scale rounded to fp16: up to 15 levels of 2^-11 each
    assert largest_error(found, x.float() @ logical.view(16, 1024).T) < max(RELATIVE[dtype], 2e-3)


def test_another_width_is_refused(tmp_path: Path) -> None:
    packed = {k.replace(".packed.", "."): t for k, t in golden("awq_w4a16").items() if ".packed." in k}
    write_safetensors(tmp_path / "awq.safetensors", packed, {})
    weights = read_w4a16(open_safetensors(tmp_path / "awq.safetensors"), "t5_linear")
    with pytest.raises(ValueError, match="1024"):
        linear_w4a16(torch.zeros(1, 64), weights)
