"""modulate_quantize: LayerNorm, shift and scale as FLUX's own blocks do them, then quantize_act."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.reference.modulate_quantize import modulate, modulate_quantize
from engine.reference.quantize_act import ActTarget, dequantize, quantize_act
from tests.tolerances import RELATIVE, largest_error, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modulation_is_layer_norm_times_scale_plus_shift(dtype: torch.dtype) -> None:
    x, shift, scale = (
        (3 + 5 * torch.randn(9, 192)).to(dtype),
        torch.randn(192).to(dtype),
        torch.randn(192).to(dtype),
    )
    wanted = F.layer_norm(x.double(), (192,), eps=1e-6) * scale.double() + shift.double()
    found = modulate(x, shift, scale)
    assert found.dtype == dtype
    assert largest_error(found, wanted) < RELATIVE[dtype]


def test_what_is_quantized_and_projected_is_the_modulated_input() -> None:
    x, shift, scale = torch.randn(9, 192).bfloat16(), torch.randn(192).bfloat16(), torch.randn(192).bfloat16()
    target = ActTarget("e4m3", 0.5 + torch.rand(192), torch.randn(192, 32).bfloat16(), torch.ones(2))
    found, y = modulate_quantize(x, shift, scale, target), modulate(x, shift, scale)
    wanted = quantize_act(y, target)
    assert torch.equal(found.codes, wanted.codes)
    assert found.low is not None
    assert torch.equal(found.low, y.float() @ target.proj_down.float())
    assert relative_error(dequantize(found), y.float() / target.smooth_factor) < 0.03


def test_shift_and_scale_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 64\), \(64,\), \(32,\)"):
        modulate(torch.ones(2, 64), torch.ones(64), torch.ones(32))
