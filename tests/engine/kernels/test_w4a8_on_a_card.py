"""svdq_linear's w4a8 kernels on a card, against the reference fed with the same codes.

On Hopper both sources run: wgmma, which serves there, and mma.sync, only to be checked for sm_89 and sm_120.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.jit import arch_of
from engine.kernels._fused_scale import fused_gelu_scale, gelu_reach
from engine.kernels.quantize_act import arrange_target, quantize_act
from engine.kernels.svdq_linear import ARCHITECTURES_OF, ArrangedLinear, arrange, svdq_linear, with_branches
from engine.reference.quantize_act import ActTarget, QuantizedAct
from engine.reference.svdq_linear import (
    Epilogue,
    GateResidual,
    Gelu,
    GeluQuantize,
    Plain,
    QKNormRope,
    SVDQuantWeights,
    svdq_linear_quantized,
)
from tests.tolerances import RELATIVE, largest_error, relative_error

pytestmark = pytest.mark.gpu
CARD = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [  # N, K
    pytest.param(9216, 3072, id="FLUX qkv"),
    pytest.param(3072, 3072, id="FLUX out"),
    pytest.param(12288, 3072, id="FLUX fc1"),
    pytest.param(3072, 12288, id="FLUX fc2"),
    pytest.param(1536, 512, id="Mini qkv"),
    pytest.param(512, 2048, id="Mini fc2"),
    pytest.param(520, 192, id="odd"),
]
TOKENS = [1, 7, 256, 4096, 4608, 4613]


@pytest.fixture(params=["svdq_linear.w4a8_sm90", "svdq_linear.w4a8"])
def source(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if arch() not in ARCHITECTURES_OF[name]:
        pytest.skip(f"{name} does not run on sm_{arch()}")
    return name


def arch() -> str:
    return arch_of(*torch.cuda.get_device_capability())


def random_weights(
    n: int, k: int, rank: int, dtype: torch.dtype = BF16, *, shift: float = 0.0, scales: torch.dtype | None = None
) -> SVDQuantWeights:
    size = 1 / (4.3 * k**0.5)  # so that y is about 1 where x is
    return SVDQuantWeights(
        precision="int4",
        codes=torch.randint(-7, 8, (n, k), dtype=torch.int8, device=CARD),
        wscales=((0.5 + torch.rand(n, k // 64, device=CARD)) * size).to(scales or dtype),
        smooth_factor=(0.5 + torch.rand(k, device=CARD)).to(dtype),
        bias=torch.randn(n, device=CARD).to(dtype),
        proj_down=(torch.randn(k, rank, device=CARD) / k**0.5).to(dtype),
        proj_up=(torch.randn(n, rank, device=CARD) / max(rank, 1) ** 0.5).to(dtype),
        input_shift=shift,
    )


def random_act(m: int, k: int, rank: int) -> QuantizedAct:
    """Codes all over e4m3's range, rows four octaves apart."""
    codes = (150 * torch.randn(m, k, device=CARD)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.exp2(4 * torch.rand(m, device=CARD) - 2) / 150
    return QuantizedAct("e4m3", codes, scales, torch.randn(m, rank, device=CARD) if rank else None)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=CARD)


def digest(result: Tensor | QuantizedAct) -> str:
    parts = [result] if isinstance(result, Tensor) else [result.codes, result.scales, result.low]
    whole = hashlib.sha256()
    for part in parts:
        if part is not None:
            whole.update(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()


def compare(act: QuantizedAct, weights: SVDQuantWeights, linear: ArrangedLinear, dtype: torch.dtype) -> None:
    out = poisoned(act.num_tokens, weights.out_features, dtype=dtype)
    svdq_linear(act, linear, Plain(out))
    expected = svdq_linear_quantized(act, weights, "w4a8", Plain(), dtype=dtype)
    assert isinstance(expected, Tensor)
    assert largest_error(out, expected) < RELATIVE[dtype]


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_shape_is_the_reference(source: str, n: int, k: int, m: int) -> None:
    weights = random_weights(n, k, 32)
    compare(random_act(m, k, 32), weights, arrange(weights, "w4a8", BF16, arch(), source), BF16)


@pytest.mark.parametrize("rank", [0, 16, 32, 128, 80])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_rank_and_both_types(source: str, dtype: torch.dtype, rank: int) -> None:
    weights = random_weights(1536, 512, rank, dtype)
    compare(random_act(300, 512, rank), weights, arrange(weights, "w4a8", dtype, arch(), source), dtype)


@pytest.mark.parametrize("scales", [torch.float32, FP16, BF16])
def test_group_scales_are_exactly_those_of_the_file(source: str, scales: torch.dtype) -> None:
    weights = random_weights(264, 512, 0, FP16, scales=scales)
    compare(random_act(40, 512, 0), weights, arrange(weights, "w4a8", FP16, arch(), source), FP16)


def test_outer_scales_touch_only_the_low_bit_product(source: str) -> None:
    weights = replace(
        random_weights(256, 512, 32), wtscale=torch.tensor(0.25, device=CARD), wcscales=torch.rand(256, device=CARD)
    )
    compare(random_act(40, 512, 32), weights, arrange(weights, "w4a8", BF16, arch(), source), BF16)


def test_a_tokens_scale_comes_before_the_low_rank_product_and_the_bias(source: str) -> None:
    weights, act = random_weights(256, 512, 32), random_act(40, 512, 32)
    assert act.scales is not None
    assert act.low is not None
    assert weights.bias is not None
    silent = replace(act, scales=torch.zeros_like(act.scales))
    found = svdq_linear(silent, arrange(weights, "w4a8", BF16, arch(), source), Plain())
    expected = act.low.bfloat16().float() @ weights.proj_up.float().T + weights.bias.float()
    assert isinstance(found, Tensor)
    assert largest_error(found, expected) < RELATIVE[BF16]


def test_a_shifted_bias_is_unfolded(source: str) -> None:
    weights = random_weights(256, 2048, 16, shift=11 / 64)
    compare(random_act(40, 2048, 16), weights, arrange(weights, "w4a8", BF16, arch(), source), BF16)


def test_whole_numbers_come_out_whole(source: str) -> None:
    """Small integers through e4m3, its subnormals and the scaling of each group: nothing is rounded."""
    weights = replace(
        random_weights(256, 1024, 0, scales=torch.float32),
        wscales=torch.ones(256, 16, device=CARD),
        bias=None,
    )
    codes = torch.randint(-4, 5, (200, 1024), device=CARD).float()
    act = QuantizedAct(
        "e4m3", codes.to(torch.float8_e4m3fn).view(torch.uint8), torch.full((200,), 1 / 64, device=CARD), None
    )
    found = svdq_linear(act, arrange(weights, "w4a8", BF16, arch(), source), Plain())
    assert isinstance(found, Tensor)
    assert torch.equal(found, (codes.double() @ weights.codes.double().T / 64).to(BF16))


def epilogues(m: int, n: int, dtype: torch.dtype) -> list[Epilogue]:
    angles = torch.rand(m, 64, device=CARD) * 6
    norms = [1 + torch.rand(128, device=CARD) for _ in range(2)]
    stream = torch.randn(m, n, device=CARD).to(dtype)
    return [
        Plain(poisoned(m, n, dtype=dtype)),
        Gelu(poisoned(m, n, dtype=dtype)),
        QKNormRope(*norms, angles.cos(), angles.sin(), out=poisoned(m, n, dtype=dtype)),
        GateResidual(torch.randn(n, device=CARD), stream, out=poisoned(m, n, dtype=dtype)),
    ]


@pytest.mark.parametrize("index", range(4), ids=["plain", "gelu", "norm and rope", "gate and residual"])
def test_every_end_is_the_reference(source: str, index: int) -> None:
    m, n, k = 333, 1536, 512
    weights, act = random_weights(n, k, 32), random_act(m, k, 32)
    epilogue = epilogues(m, n, BF16)[index]
    found = svdq_linear(act, arrange(weights, "w4a8", BF16, arch(), source), epilogue)
    expected = svdq_linear_quantized(act, weights, "w4a8", replace(epilogue, out=None), dtype=BF16)
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert largest_error(found, expected) < RELATIVE[BF16]


def next_target(n: int, rank: int) -> ActTarget:
    return arrange_target(
        ActTarget(
            format="e4m3",
            smooth_factor=0.5 + torch.rand(n, device=CARD),
            proj_down=(torch.randn(n, rank, device=CARD) / n**0.5).to(BF16),
            rank_scales=torch.ones(rank // 16, device=CARD),
        )
    )


@pytest.mark.parametrize(("m", "n", "k"), [(4613, 12288, 3072), (77, 2048, 512)], ids=["FLUX", "Mini"])
def test_a_fused_gelu_gives_fc2_what_the_reference_gives(source: str, m: int, n: int, k: int) -> None:
    """Codes within one step in a hundredth of the places: the sum before GELU is rounded in another order."""
    weights, act, target = random_weights(n, k, 32), random_act(m, k, 32), next_target(n, 32)
    slope, offset = fused_gelu_scale(gelu_reach(weights), target.smooth_factor)
    end = GeluQuantize(target, slope, offset)
    found = svdq_linear(act, arrange(weights, "w4a8", BF16, arch(), source), end)
    expected = svdq_linear_quantized(act, weights, "w4a8", end, dtype=BF16)
    assert isinstance(found, QuantizedAct)
    assert isinstance(expected, QuantizedAct)
    for part in (found.scales, expected.scales, found.low, expected.low):
        assert part is not None
    assert largest_error(found.scales, expected.scales) < 1e-6
    assert largest_error(found.low, expected.low) < 2 * RELATIVE[BF16]
    # Sign and magnitude: neighbouring numbers are neighbouring codes, and both zeros are one number.
    steps = [torch.where(codes < 128, codes.int(), 128 - codes.int()) for codes in (found.codes, expected.codes)]
    apart = (steps[0] - steps[1]).abs()
    assert (apart > 1).float().mean() < 1e-4  # where GELU crosses 0, a last place of y is many steps of e4m3
    assert (apart > 0).float().mean() < 0.05
    values = [codes.view(torch.float8_e4m3fn).float() for codes in (found.codes, expected.codes)]
    assert relative_error(values[0], values[1]) < 2 * RELATIVE[BF16]


def test_fifty_runs_are_one(source: str) -> None:
    m, n, k = 4613, 3072, 3072
    weights, act = random_weights(n, k, 32), random_act(m, k, 32)
    linear, target = arrange(weights, "w4a8", BF16, arch(), source), next_target(n, 32)
    for end in (Plain(), GeluQuantize(target, 0.01, 0.001)):
        assert len({digest(svdq_linear(act, linear, end)) for _ in range(50)}) == 1


def test_a_branch_at_strength_0_changes_no_bit(source: str) -> None:
    m, n, k = 300, 1536, 512
    weights, act = random_weights(n, k, 32), random_act(m, k, 32)
    plain = arrange(weights, "w4a8", BF16, arch(), source)
    extra = torch.randn(n, 48, device=CARD).to(BF16)
    branched = with_branches(plain, extra, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], device=CARD))
    assert act.low is not None
    wide = replace(act, low=torch.cat([act.low, torch.full((m, 48), float("nan"), device=CARD)], dim=1))
    assert digest(svdq_linear(act, plain, Plain())) == digest(svdq_linear(wide, branched, Plain()))


def test_all_plans_of_one_fc2_agree_within_their_precision() -> None:
    """A GELU's output through unsigned 4-bit codes, e4m3 and 16 bit: how far each is from the dense linear."""
    m, n, k = 300, 512, 2048
    weights = random_weights(n, k, 32, shift=11 / 64)
    x = torch.nn.functional.gelu(torch.randn(m, k, device=CARD), approximate="tanh").to(BF16)
    weight, bias = weights.dense()
    exact = torch.nn.functional.linear(x.float(), weight, bias)
    errors = {}
    for plan, error in (("w4a4", 0.12), ("w4a8", 0.04), ("w4a16", 0.01)):
        linear = arrange(weights, plan, BF16, arch())  # type: ignore[arg-type]
        target = arrange_target(
            ActTarget(
                format=linear.format,
                smooth_factor=weights.smooth_factor.float(),
                proj_down=weights.proj_down,
                rank_scales=linear.rank_scales,
                shift=weights.input_shift if linear.format == "uint4" else 0.0,
            )
        )
        found = svdq_linear(quantize_act(x, target), linear, Plain())
        assert isinstance(found, Tensor)
        errors[plan] = relative_error(found, exact)
        assert errors[plan] < error, errors
    assert errors["w4a16"] < errors["w4a8"] < errors["w4a4"]
