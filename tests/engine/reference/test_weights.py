"""What quantized weights stand for, and that pieces which do not fit together are refused with their numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import SVDQuantWeights


def int4_weights(n: int = 3, k: int = 128, rank: int = 2) -> SVDQuantWeights:
    g = torch.Generator().manual_seed(0)
    return SVDQuantWeights(
        precision="int4",
        codes=torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=g),
        wscales=torch.rand(n, k // 64, generator=g),
        smooth_factor=torch.rand(k, generator=g) + 0.5,
        bias=torch.randn(n, generator=g),
        proj_down=torch.randn(k, rank, generator=g),
        proj_up=torch.randn(n, rank, generator=g),
    )


def test_dense_is_the_sum_of_its_parts_element_by_element() -> None:
    w = replace(int4_weights(), wtscale=torch.tensor(0.5), wcscales=torch.tensor([1.0, 2.0, 3.0]), input_shift=0.25)
    weight, bias = w.dense()
    assert w.bias is not None
    assert bias is not None
    for n, k in ((0, 0), (1, 63), (2, 64), (2, 127)):
        code, scale = float(w.codes[n, k]), float(w.wscales[n, k // 64])
        residual = code * scale * 0.5 * (n + 1) / float(w.smooth_factor[k])
        low_rank = float(w.proj_up[n] @ w.proj_down[k])
        assert float(weight[n, k]) == pytest.approx(residual + low_rank, rel=1e-5, abs=1e-6)
    unsmoothed = w.residual() / w.smooth_factor
    assert torch.allclose(bias, w.bias + 0.25 * unsmoothed.sum(1), atol=1e-5)


def test_a_layer_without_bias_gets_one_only_for_a_shift() -> None:
    without = replace(int4_weights(), bias=None)
    assert without.dense()[1] is None
    assert replace(without, input_shift=0.25).dense()[1] is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codes", torch.zeros(3, 100, dtype=torch.int8)),
        ("codes", torch.zeros(3, 128, dtype=torch.uint8)),
        ("wscales", torch.zeros(3, 3)),
        ("wscales", torch.zeros(3, 2, dtype=torch.float8_e4m3fn)),
        ("smooth_factor", torch.zeros(64)),
        ("bias", torch.zeros(4)),
        ("proj_down", torch.zeros(64, 2)),
        ("proj_up", torch.zeros(3, 4)),
        ("wtscale", torch.zeros(1)),
        ("wcscales", torch.zeros(2)),
        ("precision", "int5"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="SVDQuantWeights"):
        replace(int4_weights(), **{field: value})  # type: ignore[arg-type]


def test_weight_only_weights_are_codes_times_scales_plus_zeros() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 8)
    scales, zeros = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, -1.0], [0.0, -7.0]])
    weight = W4A16Weights(codes, scales, zeros, None, 64).dense()
    assert weight[0, 5] == 5.5
    assert weight[0, 64 + 5] == 9.0
    assert weight[1, 64 + 15] == 53.0
    with pytest.raises(ValueError, match="scales"):
        W4A16Weights(codes, scales[:1], zeros, None, 64)
    with pytest.raises(ValueError, match="uint8"):
        W4A16Weights(codes.to(torch.int8), scales, zeros, None, 64)
