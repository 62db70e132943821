"""svdq_linear's w4a8 kernels on a card: what they alone have. tests/kernels/test_svdq_linear.py has the rest.

On Hopper both sources run: wgmma, which serves there, and mma.sync, only to be checked for sm_89 and sm_120.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.jit import current_arch
from engine.kernels._fused_scale import fused_gelu_scale, gelu_reach
from engine.kernels.quantize_act import arrange_target
from engine.kernels.svdq_linear import ARCHITECTURES_OF, arrange, svdq_linear
from engine.reference.quantize_act import ActTarget, QuantizedAct
from engine.reference.svdq_linear import GeluQuantize, Plain, SVDQuantWeights, svdq_linear_quantized
from tests.kernels.act_targets import difference, poisoned  # noqa: F401
from tests.kernels.linears import excess, random_linear
from tests.tolerances import CODES_FROM_SUMS, RELATIVE, SUMS_E4M3, largest_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
CARD = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["svdq_linear.w4a8_sm90", "svdq_linear.w4a8"])
def source(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if current_arch() not in ARCHITECTURES_OF[name]:
        pytest.skip(f"{name} does not run on sm_{current_arch()}")
    return name


def random_act(m: int, k: int, rank: int) -> QuantizedAct:
    """Codes all over e4m3's range, rows four octaves apart."""
    codes = (150 * torch.randn(m, k, device=CARD)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.exp2(4 * torch.rand(m, device=CARD) - 2) / 150
    return QuantizedAct("e4m3", codes, scales, torch.randn(m, rank, device=CARD) if rank else None)


def made_by(source: str, act: QuantizedAct, weights: SVDQuantWeights, dtype: torch.dtype) -> Tensor:
    made = svdq_linear(act, arrange(weights, "w4a8", dtype, current_arch(), source), Plain())
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("scales", [torch.float32, FP16, BF16])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_group_scales_are_exactly_those_of_the_file(source: str, dtype: torch.dtype, scales: torch.dtype) -> None:
    weights = random_linear("int4", 264, 512, 16, dtype=dtype, lowest=-7)
    weights = replace(weights, wscales=(weights.wscales.float() * (1 + torch.rand(264, 8, device=CARD))).to(scales))
    act = random_act(40, 512, 16)
    expected = svdq_linear_quantized(act, weights, "w4a8", Plain(), dtype=dtype)
    assert isinstance(expected, Tensor)
    assert excess(made_by(source, act, weights, dtype), expected, SUMS_E4M3) <= 1


def test_a_tokens_scale_comes_before_the_low_rank_product_and_the_bias(source: str) -> None:
    weights, act = random_linear("int4", 256, 512, 32, lowest=-7), random_act(40, 512, 32)
    assert act.scales is not None
    assert act.low is not None
    assert weights.bias is not None
    silent = replace(act, scales=torch.zeros_like(act.scales))
    expected = act.low.bfloat16().float() @ weights.proj_up.float().T + weights.bias.float()
    assert largest_error(made_by(source, silent, weights, BF16), expected) < RELATIVE[BF16]


def test_whole_numbers_come_out_whole(source: str) -> None:
    """Small integers through e4m3, its subnormals and the scaling of each group: nothing is rounded."""
    weights = random_linear("int4", 256, 1024, 0, dtype=torch.float32, lowest=-7)
    weights = replace(weights, wscales=torch.ones_like(weights.wscales), bias=None)
    codes = torch.randint(-4, 5, (200, 1024), device=CARD).float()
    act = QuantizedAct(
        "e4m3", codes.to(torch.float8_e4m3fn).view(torch.uint8), torch.full((200,), 1 / 64, device=CARD), None
    )
    expected = (codes.double() @ weights.codes.double().T / 64).to(BF16)
    assert torch.equal(made_by(source, act, weights, BF16), expected)


@pytest.mark.parametrize(("m", "n", "k"), [(4613, 12288, 3072), (77, 2048, 512)], ids=["FLUX", "Mini"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_fused_gelu_gives_fc2_what_the_reference_gives(
    source: str, dtype: torch.dtype, m: int, n: int, k: int
) -> None:
    """Each row's scale as `fused_gelu_scale` has it; where GELU crosses 0, a unit of y is many steps of e4m3."""
    weights, act = random_linear("int4", n, k, 32, dtype=dtype, lowest=-7), random_act(m, k, 32)
    target = arrange_target(
        ActTarget(
            format="e4m3",
            smooth_factor=0.5 + torch.rand(n, device=CARD),
            proj_down=(torch.randn(n, 32, device=CARD) / n**0.5).to(dtype),
            rank_scales=torch.ones(2, device=CARD),
        )
    )
    end = GeluQuantize(target, *fused_gelu_scale(gelu_reach(weights), target.smooth_factor))
    found = svdq_linear(act, arrange(weights, "w4a8", dtype, current_arch(), source), end)
    expected = svdq_linear_quantized(act, weights, "w4a8", end, dtype=dtype)
    assert isinstance(found, QuantizedAct)
    assert isinstance(expected, QuantizedAct)
    apart = difference(found, expected)
    assert apart.scales < 2**-22  # a product and a sum, rounded alike
    assert apart.low < 2 * RELATIVE[dtype]
    assert apart.fraction < CODES_FROM_SUMS, apart
