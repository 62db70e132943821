"""svdq_linear: every plan computes the dense linear that the weights stand for, as well as its precision allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.jit import ARCHITECTURES, current_arch, load, noted, sources
from engine.kernels import svdq_linear as kernels
from engine.reference.e2m1 import encode_e2m1
from engine.reference.quantize_act import (
    ActFormat,
    ActTarget,
    QuantizedAct,
    dequantize,
    quantize_act,
    quantize_act_e4m3,
    quantize_act_int4,
    quantize_act_nvfp4,
)
from engine.reference.svdq_linear import (
    LOW_FRACTION,
    Epilogue,
    GateResidual,
    Gelu,
    GeluQuantize,
    LinearPlan,
    Plain,
    Precision,
    QKNormRope,
    SVDQuantWeights,
    svdq_linear,
    svdq_linear_quantized,
)
from tests.golden import golden
from tests.kernels.act_targets import difference, poisoned, random_target  # noqa: F401
from tests.kernels.emulated_nvfp4 import emulated_kernels
from tests.kernels.golden_linears import GELU_SHIFT, golden_linear
from tests.kernels.linears import differing, excess, hash_of, random_input, random_linear, target_of
from tests.tolerances import (
    CODES_FROM_SUMS,
    PLAN_ERROR,
    RELATIVE,
    REROUNDED,
    REROUNDED_E4M3,
    SUMS,
    SUMS_E4M3,
    largest_error,
    relative_error,
)

PRECISIONS: list[Precision] = ["int4", "nvfp4"]
PLANS: list[LinearPlan] = ["w4a4", "w4a8", "w4a16"]
ACT_FORMATS: list[ActFormat] = ["int4", "uint4", "e4m3", "nvfp4", "half"]


def random_weights(precision: Precision, n: int = 96, k: int = 256, rank: int = 16) -> SVDQuantWeights:
    wcscales: Tensor | None = None
    wtscale: Tensor | None = None
    if precision == "int4":
        codes = torch.randint(-7, 8, (n, k), dtype=torch.int8)
        wscales = 0.01 + 0.01 * torch.rand(n, k // 64)
    else:
        codes = encode_e2m1(3 * torch.randn(n, k))
        wscales = (100 + 200 * torch.rand(n, k // 16)).to(torch.float8_e4m3fn)
        wtscale, wcscales = torch.tensor(1e-4), 0.5 + torch.rand(n)
    return SVDQuantWeights(
        precision=precision,
        codes=codes,
        wscales=wscales,
        smooth_factor=0.5 + torch.rand(k),
        bias=torch.randn(n),
        proj_down=torch.randn(k, rank) / k**0.5,
        proj_up=torch.randn(n, rank),
        wtscale=wtscale,
        wcscales=wcscales,
    )


def dense(x: Tensor, weights: SVDQuantWeights) -> Tensor:
    return F.linear(x, *weights.dense())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_near_the_dense_linear(plan: LinearPlan, precision: Precision) -> None:
    weights, x = random_weights(precision), torch.randn(40, 256)
    error = relative_error(svdq_linear(x, weights, plan), dense(x, weights))
    if plan == "w4a16":  # fp32 here: nothing is rounded
        assert error < RELATIVE[torch.float32]
    else:
        assert PLAN_ERROR[plan] / 10 < error < PLAN_ERROR[plan]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_what_is_exact_in_few_bits_comes_out_exact(plan: LinearPlan, precision: Precision) -> None:
    """Activations that are codes already: then only the low-rank branch and the sums are left to go wrong."""
    weights = random_weights(precision)
    weights = replace(weights, smooth_factor=torch.ones(256))
    x = torch.randint(-3, 4, (8, 256)).float()
    x[:, ::16] = (
        6 if (precision, plan) == ("nvfp4", "w4a4") else 7
    )  # the largest of every group: scale a power of 2
    found = svdq_linear(x, weights, plan)
    assert largest_error(found, dense(x, weights)) < RELATIVE[torch.float32]


@pytest.mark.parametrize("plan", PLANS)
def test_the_gelu_shift_changes_nothing_but_the_codes(plan: LinearPlan) -> None:
    """A bias that holds the correction for a shift: with it taken into account, the linear is the same one."""
    plain = random_weights("int4")
    assert plain.bias is not None
    folded = plain.bias - GELU_SHIFT * (plain.residual() / plain.smooth_factor).sum(1)
    shifted = replace(plain, bias=folded, input_shift=GELU_SHIFT)
    x = F.gelu(torch.randn(40, 256), approximate="tanh")
    assert relative_error(dense(x, shifted), dense(x, plain)) < RELATIVE[torch.float32]
    assert relative_error(svdq_linear(x, shifted, plan), dense(x, plain)) < PLAN_ERROR[plan]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outer_scales_do_not_touch_the_low_rank_branch(precision: Precision) -> None:
    weights = replace(random_weights(precision), bias=None)
    silent = replace(weights, wcscales=torch.zeros(96), wtscale=torch.tensor(1.0))
    x = torch.randn(4, 256)
    for plan in PLANS:
        low_rank = (x @ weights.proj_down) @ weights.proj_up.T
        assert relative_error(svdq_linear(x, silent, plan), low_rank) < RELATIVE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_sixteen_bit_activations_cost_one_rounding(
    plan: LinearPlan, precision: Precision, dtype: torch.dtype
) -> None:
    weights, x = random_weights(precision), torch.randn(40, 256).to(dtype)
    narrow, wide = svdq_linear(x, weights, plan), svdq_linear(x.float(), weights, plan)
    assert narrow.dtype == dtype
    assert largest_error(narrow, wide) < RELATIVE[dtype]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tonfa_numerics_are_the_sum_of_the_docstring(precision: Precision) -> None:
    """Group by group, as the formula has it, for one row and one out channel."""
    weights, x = random_weights(precision), torch.randn(1, 256)
    n, group = 5, weights.group_size
    w = weights.residual()[n].view(-1, group)  # scales of weights included
    if precision == "int4":
        codes, ascales = quantize_act_int4(x, weights.smooth_factor)
        p = codes.float()
    else:
        codes, ascales = quantize_act_nvfp4(x, weights.smooth_factor)
        p = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes.int()]
    assert weights.bias is not None
    rest = weights.bias[n] + (x @ weights.proj_down @ weights.proj_up.T)[0, n]
    expected = (ascales[0].float() * (p.view(-1, group) * w).sum(1)).sum() + rest
    assert float(svdq_linear(x, weights, "w4a4")[0, n]) == pytest.approx(
        float(expected), rel=RELATIVE[torch.float32]
    )
    codes, ascales = quantize_act_e4m3(x, weights.smooth_factor)
    expected = ascales[0] * (codes.float().view(-1, group) * w).sum() + rest
    assert float(svdq_linear(x, weights, "w4a8")[0, n]) == pytest.approx(
        float(expected), rel=RELATIVE[torch.float32]
    )


@pytest.mark.parametrize(("layer", "x"), [("fc1", "fc1.x"), ("fc2", "mlp.gelu")])
def test_public_numerics_are_the_golden_ones(layer: str, x: str, tmp_path: Path) -> None:
    tensors, weights = golden("svdq_numerics_int4"), golden_linear(layer, tmp_path)
    found, expected = svdq_linear(tensors[x], weights, "w4a4", "public"), tensors[f"{layer}.y_half_accum"]
    assert largest_error(found, expected) < RELATIVE[torch.bfloat16]
    assert (found != expected).float().mean() < 0.01


def test_without_intermediate_rounding_the_mlp_is_the_golden_one(tmp_path: Path) -> None:
    """Golden `y_fp32_accum`: public codes and scales, sums in fp32, and its fc2 reads its own fc1."""
    tensors = golden("svdq_numerics_int4")
    x = tensors["fc1.x"]
    for layer, shift in (("fc1", None), ("fc2", GELU_SHIFT)):
        weights, expected = golden_linear(layer, tmp_path), tensors[f"{layer}.y_fp32_accum"]
        codes, ascales = quantize_act_int4(x, weights.smooth_factor, unsigned_shift=shift, numerics="public")
        assert weights.bias is not None
        found = (codes.float() * ascales.float().repeat_interleave(64, 1)) @ weights.residual().T
        found += weights.bias.float() + x.float() @ weights.proj_down.float() @ weights.proj_up.float().T
        assert largest_error(found, expected) < RELATIVE[torch.float32]
        x = F.gelu(expected, approximate="tanh").bfloat16()


def test_public_nvfp4_is_near_ours() -> None:
    weights, x = random_weights("nvfp4"), torch.randn(40, 256).bfloat16()
    public, ours = (svdq_linear(x, weights, "w4a4", numerics) for numerics in ("public", "tonfa"))
    assert 0.001 < relative_error(public, ours) < 0.05  # codes of groups whose scale was rounded differ
    assert relative_error(ours, dense(x.float(), weights)) < relative_error(public, dense(x.float(), weights))


def test_what_does_not_exist_is_refused() -> None:
    weights = random_weights("int4")
    with pytest.raises(ValueError, match="256"):
        svdq_linear(torch.zeros(2, 64), weights, "w4a4")
    for plan in ("w4a8", "w4a16"):
        with pytest.raises(ValueError, match="public"):
            svdq_linear(torch.zeros(2, 256), weights, plan, "public")


# ---- what a linear does with its result ------------------------------------------------------------


def cpu_linear(plan: LinearPlan = "w4a4", n: int = 384, k: int = 128, shift: float = 0.0) -> SVDQuantWeights:
    return random_linear("int4", n, k, 16, dtype=torch.float32, device="cpu", shift=shift)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_from_quantized_input_it_is_the_same_linear(plan: LinearPlan, precision: Precision) -> None:
    weights, x = random_weights(precision), torch.randn(40, 256)
    act = quantize_act(x, target_of(weights, plan, torch.float32))
    found = svdq_linear_quantized(act, weights, plan, Plain(), dtype=torch.float32)
    assert isinstance(found, Tensor)
    assert relative_error(found, svdq_linear(x, weights, plan)) < RELATIVE[torch.float32]


def test_the_epilogues_are_what_a_network_would_do_with_the_plain_result() -> None:
    weights = cpu_linear()
    act = random_input(weights, "w4a4", 5, torch.float32)

    def run(epilogue: Epilogue) -> Tensor | QuantizedAct:
        return svdq_linear_quantized(act, weights, "w4a4", epilogue, dtype=torch.float32)

    y = run(Plain())
    assert isinstance(y, Tensor)
    assert torch.equal(run(Gelu()), F.gelu(y, approximate="tanh"))  # type: ignore[arg-type]
    stream, gate = torch.randn(5, 384), torch.randn(384)
    expected = stream + gate * y
    assert run(GateResidual(gate, stream, out=stream)) is stream
    assert torch.equal(stream, expected)
    norm_q, norm_k, angle = torch.rand(128) + 0.5, torch.rand(128) + 0.5, torch.randn(5, 64)
    q, k, v = y.chunk(3, dim=1)
    parts = []
    for head, weight in ((q, norm_q), (k, norm_k)):
        turned = torch.view_as_complex(F.rms_norm(head, (128,), weight, 1e-6).unflatten(1, (64, 2)))
        parts.append(torch.view_as_real(turned * torch.polar(torch.ones(5, 64), angle)).flatten(1))
    joint = torch.zeros(9, 384)
    run(QKNormRope(norm_q, norm_k, angle.cos(), angle.sin(), joint[2:7]))
    assert largest_error(joint[2:7], torch.cat([*parts, v], dim=1)) < RELATIVE[torch.float32]
    assert not joint[:2].any()
    assert not joint[7:].any()


@pytest.mark.parametrize("format", ACT_FORMATS)
def test_gelu_and_quantize_is_the_next_linears_quantize_act(format: ActFormat) -> None:
    weights, target = cpu_linear(), random_target(format, 384, 16, torch.float32, "cpu")
    act = random_input(weights, "w4a4", 5, torch.float32)
    x = svdq_linear_quantized(act, weights, "w4a4", Gelu(), dtype=torch.float32)
    assert isinstance(x, Tensor)
    made = svdq_linear_quantized(act, weights, "w4a4", GeluQuantize(target, 0.0, 0.01), dtype=torch.float32)
    assert isinstance(made, QuantizedAct)
    expected = quantize_act(x, target)
    assert made.low is not None
    assert made.low.dtype == torch.int64
    assert expected.low is not None
    assert largest_error(made.low * 2.0**-LOW_FRACTION, expected.low) < RELATIVE[torch.float32]
    if format == "e4m3":  # one scale for all rows, fixed beforehand
        assert made.scales is not None
        assert torch.equal(made.scales, torch.full((5,), 0.01))
        inside = x / target.smooth_factor
        assert relative_error(dequantize(made), inside.clamp(-4.48, 4.48)) < PLAN_ERROR["w4a8"]
    else:
        assert torch.equal(made.codes, expected.codes)
        assert made.scales is None or torch.equal(made.scales, expected.scales)  # type: ignore[arg-type]


def test_silent_ranks_are_not_read() -> None:
    """A LoRA at strength 0: its low-rank activations may hold anything."""
    weights = random_linear("int4", 64, 64, 48, dtype=torch.float32, device="cpu")
    act = random_input(weights, "w4a4", 3, torch.float32)
    assert act.low is not None
    base = replace(weights, proj_down=weights.proj_down[:, :32], proj_up=weights.proj_up[:, :32])
    expected = svdq_linear_quantized(replace(act, low=act.low[:, :32]), base, "w4a4", Plain(), dtype=torch.float32)
    act.low[:, 32:] = torch.nan
    scales = torch.tensor([1.0, 1.0, 0.0])
    found = svdq_linear_quantized(act, weights, "w4a4", Plain(), dtype=torch.float32, rank_scales=scales)
    assert isinstance(found, Tensor)
    assert largest_error(found, expected) < RELATIVE[torch.float32]  # type: ignore[arg-type]


def test_on_a_cpu_the_wrapper_is_the_reference_and_carries_branches() -> None:
    weights = cpu_linear()
    linear = kernels.arrange(weights, "w4a16", torch.float32, None)
    act = random_input(weights, "w4a16", 4, torch.float32)
    expected = svdq_linear_quantized(act, weights, "w4a16", Plain(), dtype=torch.float32)
    assert torch.equal(kernels.svdq_linear(act, linear, Plain()), expected)  # type: ignore[arg-type]
    down, up = torch.randn(128, 32), torch.randn(384, 32)
    branched = kernels.with_branches(linear, up, torch.tensor([1.0, 2.0, 0.5]))
    x = dequantize(act) * weights.smooth_factor
    assert act.low is not None
    both = replace(act, low=torch.cat([act.low, x @ down], dim=1))
    found = kernels.svdq_linear(both, branched, Plain())
    scaled = down * torch.tensor([2.0, 0.5]).repeat_interleave(16)
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert relative_error(found, expected + x @ scaled @ up.T) < RELATIVE[torch.float32]


# ---- the order in which kernels read weights -------------------------------------------------------


@pytest.mark.parametrize("lowest", [-8, -7])
def test_random_linears_have_all_codes_and_silent_groups(lowest: int) -> None:
    weights = random_linear("int4", 200, 192, 16, device="cpu", lowest=lowest)
    assert weights.codes.unique().tolist() == list(range(lowest, 8))
    assert 0 < int((weights.wscales == 0).sum()) < 60  # of 600


def test_records_of_w4a4_hold_codes_and_scales_where_the_kernel_looks() -> None:
    weights = random_linear("int4", 200, 192, 16, device="cpu")
    linear = kernels.arrange(weights, "w4a4", torch.bfloat16, "86")
    assert linear.qweight is not None
    assert tuple(linear.qweight.shape) == (2, 3, 4352)
    assert linear.outer is None
    for n, k in [(0, 0), (199, 191), (77, 130), (128, 63), (9, 64)]:
        j, g, q = n % 128 // 8, n % 8, k % 32 // 8
        record = linear.qweight[n // 128, k // 64]
        word = record[:4096].view(torch.int32).view(8, 32, 4)[j // 2, 4 * g + q, 2 * (j % 2) + k % 64 // 32]
        assert int(word) >> (4 * (k % 8)) & 15 == int(weights.codes[n, k]) & 15
        scales = record[4096:].view(torch.bfloat16).view(4, 4, 4, 2)
        assert scales[j // 4, n % 8 // 2, j % 4, n % 2] == weights.wscales[n, k // 64]
    assert not linear.qweight[1, :, :4096].view(3, 8, 32, 4, 4)[:, 5:].any()  # rows from 208 on are filled up


@pytest.mark.parametrize("precision", PRECISIONS)
def test_records_of_w4a16_hold_codes_and_scales_where_the_kernel_looks(precision: Precision) -> None:
    weights = random_linear(precision, 200, 192, 16, device="cpu")
    linear = kernels.arrange(weights, "w4a16", torch.bfloat16, "90a")
    assert linear.qweight is not None
    for n, k in [(0, 0), (199, 191), (77, 130), (128, 63), (9, 64), (35, 24)]:
        j, g, q = n % 128 // 8, n % 8, k % 8 // 2
        record = linear.qweight[n // 128, k // 64]
        step = k % 64 // 32
        word = record[:4096].view(torch.int32).view(2, 4, 32, 4)[step, j // 4, 4 * g + q, j % 4]
        half, place = int(word) >> (16 * (k % 2)), k % 32 // 8
        if precision == "int4":
            assert half >> (4 * place) & 15 == int(weights.codes[n, k]) + 8
            assert record[4096:].view(torch.bfloat16).view(2, 8, 8)[j // 8, g, j % 8] == weights.wscales[n, k // 64]
            continue
        wide = int(record[4096:].view(2, 2, 8, 8, 2)[step, j // 8, g, j % 8, k % 32 // 16])
        scale = float(weights.wscales[n, k // 16])
        sign, magnitude = ((15, 6), (12, 3), (14, 9), (13, 0))[place]  # of bf16
        code = (half >> sign & 1) * 8 + (half >> magnitude & 7)
        if scale:
            assert code == int(weights.codes[n, k])
            assert 2.0 ** (wide // 8 - 10) * (1 + wide % 8 / 8) == scale
        else:
            assert code == wide == 0


def test_every_e4m3_scale_has_a_wide_one() -> None:
    bits = torch.arange(127, dtype=torch.uint8).view(1, -1).repeat(8, 1)[:, :124]
    weights = SVDQuantWeights(
        "nvfp4",
        torch.ones(8, 124 * 16, dtype=torch.uint8),
        bits.view(torch.float8_e4m3fn),
        torch.ones(124 * 16),
        None,
        torch.zeros(124 * 16, 0),
        torch.zeros(8, 0),
    )
    linear = kernels.arrange(weights, "w4a16", torch.bfloat16, "90a")
    assert linear.qweight is not None
    wide = linear.qweight[0, :, 4096:].reshape(-1, 2, 8, 8, 2)[:, 0, 3, 0].flatten()  # tile 0, column 3
    values = torch.exp2((wide // 8).float() - 10) * (1 + wide % 8 / 8)
    values[0] = 0  # its codes are 0 instead
    assert torch.equal(values, bits[3].view(torch.float8_e4m3fn).float())


def test_small_scales_stay_exact_in_fp16() -> None:
    """bf16 files on an fp16 card: scales below fp16's normal range are moved up, and `outer` takes it back."""
    weights = random_linear("int4", 128, 64, 0, device="cpu")
    weights = replace(weights, wscales=weights.wscales * 2**-18)
    linear = kernels.arrange(weights, "w4a4", torch.float16, "75")
    assert linear.qweight is not None
    assert linear.outer is not None
    scales = linear.qweight[0, 0, 4096:].view(torch.float16).view(4, 4, 4, 2).permute(0, 2, 1, 3).flatten().float()
    assert torch.equal(scales * linear.outer, weights.wscales[:, 0].float())


def test_what_no_kernel_takes_is_refused_when_it_is_arranged() -> None:
    weights = random_linear("int4", 128, 64, 16, device="cpu")
    with pytest.raises(ValueError, match="sm_75"):
        kernels.arrange(weights, "w4a16", torch.bfloat16, "75")
    with pytest.raises(ValueError, match="sm_100a"):
        kernels.arrange(weights, "w4a8", torch.bfloat16, "100a")
    with pytest.raises(ValueError, match="w4a8 of nvfp4"):
        kernels.arrange(random_linear("nvfp4", 128, 64, 16, device="cpu"), "w4a8", torch.bfloat16, "90a")
    odd = replace(weights, proj_down=weights.proj_down[:, :8], proj_up=weights.proj_up[:, :8])
    with pytest.raises(ValueError, match="rank 8"):
        kernels.arrange(odd, "w4a4", torch.bfloat16, "86")
    linear = kernels.arrange(weights, "w4a4", torch.bfloat16, "86")
    with pytest.raises(ValueError, match=r"\(64, 16\)"):
        kernels.with_branches(linear, torch.zeros(64, 16), torch.ones(2))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        kernels.with_branches(linear, torch.zeros(128, 16), torch.ones(3))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_kernels_for_every_file(arch: str) -> None:
    sources = {variant.source for variant in kernels.variants(arch)}
    assert "svdq_linear.w4a16" in sources
    assert len(set(kernels.variants(arch))) == len(kernels.variants(arch))


# ---- on a card: as the reference, fed the same codes -----------------------------------------------

H = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """A kernel, and what it is given. Where its architecture lacks it, it is skipped; nvfp4's is emulated."""

    source: str
    plan: LinearPlan
    precision: Precision
    shift: float = 0.0


NVFP4 = "svdq_linear.nvfp4"
CASES = {
    "w4a4": Case("svdq_linear.w4a4", "w4a4", "int4"),
    "w4a4-shifted": Case("svdq_linear.w4a4", "w4a4", "int4", GELU_SHIFT),
    "w4a8": Case("svdq_linear.w4a8_sm90", "w4a8", "int4"),
    "w4a8-mma": Case("svdq_linear.w4a8", "w4a8", "int4"),
    "w4a16-int4": Case("svdq_linear.w4a16", "w4a16", "int4"),
    "w4a16-nvfp4": Case("svdq_linear.w4a16", "w4a16", "nvfp4"),
    "nvfp4": Case(NVFP4, "w4a4", "nvfp4"),
}
FLUX = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]
MINI = [(1536, 512), (512, 512), (2048, 512), (512, 2048)]
ODD = [(200, 192), (72, 64), (136, 320)]
every_case = pytest.mark.parametrize("case", list(CASES))
every_h = pytest.mark.parametrize("h", list(H))


def runs_here(source: str) -> bool:
    return source == NVFP4 or current_arch() in kernels.ARCHITECTURES_OF[source]


@cache
def on_card(
    case: str, h: str, n: int, k: int, rank: int = 32
) -> tuple[SVDQuantWeights, kernels.ArrangedLinear, LinearPlan]:
    source, plan, precision, shift = CASES[case]
    if not runs_here(source):
        pytest.skip(f"{source} does not run on sm_{current_arch()}")
    lowest = -7 if plan == "w4a8" else -8
    weights = random_linear(precision, n, k, rank, dtype=H[h], shift=shift, lowest=lowest)
    return weights, kernels.arrange(weights, plan, H[h], current_arch(), source), plan


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All at once, on several threads, before the first test that launches one."""
    if not torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        if current_arch() not in kernels.ARCHITECTURES_OF[NVFP4]:
            patch.setattr(sources, "KERNELS", emulated_kernels(tmp_path_factory.mktemp("emulated")))
        with noted() as variants:
            for case in (case for case in CASES if runs_here(CASES[case].source)):
                for h, dtype in H.items():
                    weights, linear, plan = on_card(case, h, 384, 64)
                    for fixed in (False, True):
                        act = random_input(weights, plan, 1, dtype, fixed=fixed)
                        for end, epilogue in ends(1, 384, dtype).items():
                            if not fixed or end in ("plain", "gate_residual"):
                                kernels.svdq_linear(act, linear, epilogue)
        load(variants)
        yield


def ends(m: int, n: int, dtype: torch.dtype) -> dict[str, Epilogue]:
    angle, norm = torch.rand(m, 64, device="cuda"), torch.rand(128, device="cuda")
    gated = GateResidual(torch.rand(n, device="cuda"), torch.randn(m, n, device="cuda").to(dtype))
    quantized = {
        f"gelu_quantize_{format}": GeluQuantize(random_target(format, n, 32, dtype, "cuda"), 0.25, 0.01)
        for format in ACT_FORMATS
    }
    turned = QKNormRope(norm, norm, angle.cos(), angle.sin())
    return {"plain": Plain(), "gelu": Gelu(), "qk_norm_rope": turned, "gate_residual": gated, **quantized}


def both_ways(
    case: str,
    h: str,
    m: int,
    n: int,
    k: int,
    epilogue: Callable[[], Epilogue] = Plain,
    *,
    rank: int = 32,
    fixed: bool = False,
) -> tuple[Tensor | QuantizedAct, Tensor | QuantizedAct]:
    """What the kernel makes, and the reference of the same codes. `epilogue` is asked twice: it may hold an out."""
    weights, linear, plan = on_card(case, h, n, k, rank)
    act = random_input(weights, plan, m, H[h], fixed=fixed)
    found = kernels.svdq_linear(act, linear, epilogue())
    expected = svdq_linear_quantized(act, weights, plan, epilogue(), dtype=H[h])
    return found, expected


def assert_as_reference(case: str, found: Tensor | QuantizedAct, expected: Tensor | QuantizedAct) -> None:
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert found.shape == expected.shape
    assert excess(found, expected, sums_of(case)) <= 1
    rerounded = REROUNDED_E4M3 if CASES[case].plan == "w4a8" else REROUNDED
    assert found.numel() < 10_000 or differing(found, expected) < rerounded[found.dtype]


def sums_of(case: str) -> float:
    return SUMS_E4M3 if CASES[case].plan == "w4a8" else SUMS


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@every_case
@every_h
@pytest.mark.parametrize("m", [1, 7, 256, 4096, 4608, 4613])
def test_on_a_card_flux_shapes_are_the_references(case: str, h: str, m: int) -> None:
    for n, k in FLUX:
        assert_as_reference(case, *both_ways(case, h, m, n, k))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@every_case
@every_h
def test_on_a_card_small_and_odd_shapes_are_the_references(case: str, h: str) -> None:
    for n, k in MINI + ODD:
        for m in (1, 16, 77, 128, 129, 256, 333):
            assert_as_reference(case, *both_ways(case, h, m, n, k))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@every_case
@every_h
@pytest.mark.parametrize("rank", [0, 16, 32, 80, 128, 1024])
@pytest.mark.parametrize("fixed", [False, True], ids=["fp32", "integers"])
def test_on_a_card_any_rank(case: str, h: str, rank: int, fixed: bool) -> None:
    for m, n, k in [(300, 640, 512), (77, 3072, 12288), (4613, 1536, 512)]:
        assert_as_reference(case, *both_ways(case, h, m, n, k, rank=rank, fixed=fixed))


@pytest.mark.gpu
@every_case
def test_on_a_card_low_rank_activations_may_be_columns_of_wider_ones(case: str) -> None:
    weights, linear, plan = on_card(case, "bf16", 512, 512)
    act = random_input(weights, plan, 100, torch.bfloat16)
    wide = torch.full((100, 96), torch.nan, device="cuda")
    wide[:, 48:80] = act.low
    found = kernels.svdq_linear(replace(act, low=wide[:, 48:80]), linear, Plain())
    assert torch.equal(found, kernels.svdq_linear(act, linear, Plain()))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@every_case
@every_h
@pytest.mark.parametrize(("m", "c"), [(77, 512), (256, 512), (4613, 3072)])
def test_on_a_card_q_and_k_are_normed_and_turned_into_their_place(case: str, h: str, m: int, c: int) -> None:
    norm_q, norm_k = (0.5 + torch.rand(128, device="cuda") for _ in range(2))
    angle = 6 * torch.rand(m, 64, device="cuda")
    joints = []

    def epilogue() -> QKNormRope:
        joints.append(torch.full((m + 40, 3 * c), 7.0, dtype=H[h], device="cuda"))
        return QKNormRope(norm_q, norm_k, angle.cos(), angle.sin(), joints[-1][30 : 30 + m])

    assert_as_reference(case, *both_ways(case, h, m, 3 * c, c, epilogue))
    assert_as_reference(case, joints[0], joints[1])
    assert bool((joints[0][:30] == 7).all())
    assert bool((joints[0][30 + m :] == 7).all())


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@every_case
@every_h
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("gate_type", ["h", "fp32"])
def test_on_a_card_the_gated_result_is_added(case: str, h: str, in_place: bool, gate_type: str) -> None:
    for m, n, k in [(333, 512, 2048), (77, 200, 192), (4608, 3072, 3072)]:
        stream = torch.randn(m, n, device="cuda").to(H[h])
        gate = torch.randn(n, device="cuda").to(torch.float32 if gate_type == "fp32" else H[h])

        def epilogue(stream: Tensor = stream, gate: Tensor = gate) -> GateResidual:
            residual = stream.clone()
            return GateResidual(gate, residual, residual if in_place else None)

        assert_as_reference(case, *both_ways(case, h, m, n, k, epilogue, fixed=True))


@pytest.mark.gpu
def test_on_a_card_an_fp16_residual_stream_stays_in_range() -> None:
    stream = torch.full((64, 512), 65000.0, dtype=torch.float16, device="cuda")
    stream[1::2] = -65000.0
    gate = torch.full((512,), 30000.0, device="cuda")
    found, expected = both_ways("w4a16-int4", "fp16", 64, 512, 512, lambda: GateResidual(gate, stream))
    assert isinstance(found, Tensor)
    assert bool(found.isfinite().all())
    assert float(found.max()) == 65504.0
    assert float(found.min()) == -65504.0
    assert_as_reference("w4a16-int4", found, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@every_case
@every_h
def test_on_a_card_gelu(case: str, h: str) -> None:
    found, expected = both_ways(case, h, 333, 2048, 512, Gelu)
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    # The two formulas of tanh differ in its far tail, by nothing in absolute terms, and round to other numbers.
    assert excess(found, expected, sums_of(case)) <= 1


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@every_case
@every_h
@pytest.mark.parametrize("format", ACT_FORMATS)
def test_on_a_card_gelu_and_quantize_is_bit_for_bit_what_comes_apart(case: str, h: str, format: ActFormat) -> None:
    for m, n, k, rank in [(333, 2048, 512, 48), (5, 192, 192, 112), (1100, 12288, 3072, 112)]:
        target = random_target(format, n, rank, H[h], "cuda", silent=(1,))
        weights, linear, plan = on_card(case, h, n, k)
        act = random_input(weights, plan, m, H[h])
        x = kernels.svdq_linear(act, linear, Gelu())
        assert isinstance(x, Tensor)
        made = kernels.svdq_linear(act, linear, GeluQuantize(target, 0.25, 0.01))
        assert isinstance(made, QuantizedAct)
        if format == "e4m3":
            own = act.scales if act.format == "e4m3" and act.scales is not None else torch.ones(m, device="cuda")
            codes, scales = quantize_act_e4m3(x, target.smooth_factor, scale=0.25 * own + 0.01)
            expected = QuantizedAct(format, codes.view(torch.uint8), scales, None)
        else:
            expected = quantize_act(x, target)
        apart = difference(replace(made, low=None), replace(expected, low=None))
        assert apart.steps == 0
        assert apart.scales == 0.0
        assert made.low is not None
        exact = x.double() @ target.proj_down.double()
        low = made.low.double() * 2.0**-LOW_FRACTION
        assert bool((made.low[:, 16:32] == 0).all())  # a scale of 0: not computed
        for ranks in (slice(first, first + 16) for first in range(0, rank, 16) if first != 16):
            assert largest_error(low[:, ranks], exact[:, ranks]) < RELATIVE[torch.float32]
        reference = svdq_linear_quantized(act, weights, plan, GeluQuantize(target, 0.25, 0.01), dtype=H[h])
        assert isinstance(reference, QuantizedAct)
        if format == "half":  # GELU and quotient are rounded one after the other; far out GELU is off by 1e-7
            assert excess(made.codes, reference.codes, sums_of(case)) <= 2
        else:
            assert difference(made, reference).fraction < CODES_FROM_SUMS


@pytest.mark.gpu
@every_case
@pytest.mark.parametrize("end", ["plain", "gelu", "qk_norm_rope", "gate_residual", "gelu_quantize"])
def test_on_a_card_fifty_runs_have_one_result(case: str, end: str) -> None:
    m, n, k = 4613, 3072, 1024  # several tiles for each multiprocessor
    weights, linear, plan = on_card(case, "bf16", n, k)
    act = random_input(weights, plan, m, torch.bfloat16)
    end = end if end != "gelu_quantize" else "gelu_quantize_" + ("uint4" if act.format == "int4" else act.format)
    epilogue = ends(m, n, torch.bfloat16)[end]
    assert len({hash_of(kernels.svdq_linear(act, linear, epilogue)) for _ in range(50)}) == 1


@pytest.mark.gpu
@every_case
def test_on_a_card_loras_at_strength_0_change_no_bit(case: str) -> None:
    weights, linear, plan = on_card(case, "bf16", 1536, 512)
    act = random_input(weights, plan, 4613, torch.bfloat16)
    assert act.low is not None
    expected = kernels.svdq_linear(act, linear, Plain())
    for loras in (1, 8):
        scales = torch.tensor([1.0, 1.0] + [0.0] * loras, device="cuda")
        branched = kernels.with_branches(linear, torch.randn(1536, 16 * loras, device="cuda"), scales)
        low = torch.full((4613, 32 + 16 * loras), torch.nan, device="cuda")
        low[:, :32] = act.low
        found = kernels.svdq_linear(replace(act, low=low), branched, Plain())
        assert torch.equal(found, expected)  # type: ignore[arg-type]


@pytest.mark.gpu
@every_case
def test_on_a_card_loras_have_strengths_of_their_own_read_when_the_kernel_runs(case: str) -> None:
    weights, linear, plan = on_card(case, "bf16", 1536, 512)
    act = random_input(weights, plan, 100, torch.bfloat16)
    up = torch.randn(1536, 48, device="cuda").bfloat16()
    scales = torch.tensor([1.0, 1.0, 0.5, -2.0, 0.0], device="cuda")
    branched = kernels.with_branches(linear, up, scales)
    low = torch.cat([act.low, torch.randn(100, 48, device="cuda")], dim=1)  # type: ignore[list-item]
    logical = replace(
        weights,
        proj_up=torch.cat([weights.proj_up, up], dim=1),
        proj_down=torch.cat([weights.proj_down, weights.proj_down.new_zeros(512, 48)], dim=1),
    )
    for _ in range(2):
        found = kernels.svdq_linear(replace(act, low=low), branched, Plain())
        expected = svdq_linear_quantized(
            replace(act, low=low), logical, plan, Plain(), dtype=torch.bfloat16, rank_scales=scales
        )
        assert_as_reference(case, found, expected)
        scales[2:] = torch.tensor([0.0, 1.5, 3.0], device="cuda")


@pytest.mark.gpu
def test_on_a_card_the_shift_is_part_of_w4a4_and_taken_out_of_the_bias_elsewhere() -> None:
    """One fc2 by every plan, each near the dense linear and the better the more bits it has; only w4a4 uses the
    stored bias and shifted codes."""
    plain = random_linear("int4", 512, 2048, 32, lowest=-7)
    assert plain.bias is not None
    folded = plain.bias.float() - GELU_SHIFT * (plain.residual() / plain.smooth_factor.float()).sum(1)
    weights = replace(plain, bias=folded.bfloat16(), input_shift=GELU_SHIFT)
    x = F.gelu(torch.randn(64, 2048, device="cuda"), approximate="tanh").bfloat16()
    truth = dense(x.float(), weights)
    found: dict[LinearPlan, Tensor] = {}
    for plan in PLANS:
        if plan == "w4a8" and current_arch() not in kernels.E4M3_ARCHITECTURES:
            continue
        linear = kernels.arrange(weights, plan, torch.bfloat16, current_arch())
        act = quantize_act(x, target_of(weights, plan, torch.bfloat16))
        assert act.format == linear.format == {"w4a4": "uint4", "w4a8": "e4m3", "w4a16": "half"}[plan]
        y = kernels.svdq_linear(act, linear, Plain())
        assert isinstance(y, Tensor)
        assert relative_error(y, truth) < PLAN_ERROR[plan]
        found[plan] = y
    for one, other in combinations(found, 2):  # from few bits to many
        assert relative_error(found[one], found[other]) < PLAN_ERROR[one] + PLAN_ERROR[other]
        assert relative_error(found[other], truth) < relative_error(found[one], truth)


@pytest.mark.gpu
@every_case
def test_on_a_card_outer_scales_do_not_touch_the_low_rank_branch(case: str) -> None:
    weights, arranged, plan = on_card(case, "bf16", 256, 256)
    silent = replace(weights, wcscales=torch.zeros(256, device="cuda").bfloat16(), input_shift=0.0, bias=None)
    linear = kernels.arrange(silent, plan, torch.bfloat16, current_arch(), arranged.source)
    act = random_input(silent, plan, 40, torch.bfloat16)
    assert act.low is not None
    y = kernels.svdq_linear(act, linear, Plain())
    assert_as_reference(case, y, (act.low.bfloat16().float() @ silent.proj_up.float().T).bfloat16())


@pytest.mark.gpu
def test_on_a_card_nvfp4_weights_are_exact_in_w4a16() -> None:
    """One in channel at a time: every product of a code and a scale comes out as it is, in bf16 and in fp16."""
    bits = torch.arange(128, dtype=torch.uint8)[:126]
    codes = torch.arange(16, dtype=torch.uint8)
    weights = SVDQuantWeights(
        "nvfp4",
        codes.repeat(126 * 16).view(126, 16, 16).permute(0, 2, 1).reshape(126 * 16, 16).repeat(1, 4).cuda(),
        bits.view(-1, 1, 1).expand(126, 16, 4).reshape(126 * 16, 4).contiguous().view(torch.float8_e4m3fn).cuda(),
        torch.ones(64).cuda(),
        None,
        torch.zeros(64, 0).cuda(),
        torch.zeros(126 * 16, 0).cuda(),
    )
    for dtype in H.values():
        linear = kernels.arrange(weights, "w4a16", dtype, current_arch())
        act = QuantizedAct("half", torch.eye(64, dtype=dtype, device="cuda"), None, None)
        y = kernels.svdq_linear(act, linear, Plain())
        assert torch.equal(y, weights.residual().T.to(dtype))  # type: ignore[arg-type]


# ---- calls that do not fit -------------------------------------------------------------------------


def arranged(
    plan: LinearPlan, device: str
) -> tuple[SVDQuantWeights, kernels.ArrangedLinear, QuantizedAct, Callable[..., object]]:
    """Of 384 x 64 and rank 16, for any card; 8 tokens for it; and the call."""
    weights = random_linear("int4", 384, 64, 16, device=device, lowest=-7)
    linear = kernels.arrange(weights, plan, torch.bfloat16, "89")
    return weights, linear, random_input(weights, plan, 8, torch.bfloat16), kernels.svdq_linear


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What would have been launched."""
    calls: list[object] = []
    monkeypatch.setattr(kernels, "launch", lambda variant, *_args, **_named: calls.append(variant))
    return calls


@pytest.mark.parametrize("plan", PLANS)
def test_input_of_another_kind_is_refused_with_its_numbers(plan: LinearPlan, launched: list[object]) -> None:
    _, linear, act, run = arranged(plan, "cpu")
    assert act.low is not None
    with pytest.raises(ValueError, match=r"width 64, got .* width 128"):
        run(
            random_input(random_linear("int4", 384, 128, 16, device="cpu"), plan, 8, torch.bfloat16),
            linear,
            Plain(),
        )
    for other in PLANS:
        if other != plan:
            with pytest.raises(ValueError, match=f'"{linear.format}".*"{arranged(other, "cpu")[2].format}"'):
                run(arranged(other, "cpu")[2], linear, Plain())
    wrong, name = (torch.float16, r"\(8, 64\).*float16") if plan == "w4a16" else (torch.int32, r"\(8, \d+\).*int32")
    with pytest.raises(ValueError, match=name):
        run(replace(act, codes=act.codes.to(wrong)), linear, Plain())
    with pytest.raises(ValueError, match="rank 16 takes low of that width, got 0"):
        run(replace(act, low=None), linear, Plain())
    wide = torch.zeros(8, 20)
    for low, name in (
        (wide[:, 1:17], r"strides \(20, 1\).*byte 4"),
        (torch.zeros(8, 18)[:, :16], r"strides \(18, 1\)"),
        (torch.zeros(16, 8).T, r"strides \(1, 8\)"),
    ):
        with pytest.raises(ValueError, match=rf"low.*\(8, 16\).*{name}"):
            run(replace(act, low=low), linear, Plain())
    assert not launched
    run(replace(act, low=wide[:, 4:]), linear, Plain())
    assert len(launched) == 1


def test_bias_and_strengths_of_another_kind_are_refused_with_their_numbers() -> None:
    _, linear, _, _ = arranged("w4a4", "cpu")
    for bias in (torch.zeros(384).bfloat16(), torch.zeros(8), torch.zeros(384, 1)):
        with pytest.raises(ValueError, match=r"N 384 .* bias \(384,\) fp32 .*, got \(\d+,( 1)?\)"):
            replace(linear, bias=bias)
    with pytest.raises(ValueError, match=r"bias .* multiple of 16 bytes, got \(384,\) .* 4 bytes off"):
        replace(linear, bias=torch.zeros(385)[1:])
    for scales in (torch.ones(1).half(), torch.ones(2), torch.ones(1, 1)):
        with pytest.raises(ValueError, match=r"rank 16 .*rank_scales \(1,\) fp32 .*, got \(\d+,( 1)?\)"):
            replace(linear, rank_scales=scales)


def test_what_comes_after_must_fit_too(launched: list[object]) -> None:
    _, linear, act, run = arranged("w4a4", "cpu")
    stream = torch.zeros(8, 384).bfloat16()
    for out, name in (
        (stream[:, :383], r"\(8, 383\)"),
        (stream.half(), "float16"),
        (torch.zeros(384, 8).bfloat16().T, r"strides \(1, 8\)"),
        (torch.zeros(8, 392).bfloat16()[:, 4:388], r"strides \(392, 1\)"),
    ):
        with pytest.raises(ValueError, match=rf"out must be \(8, 384\).*{name}"):
            run(act, linear, Plain(out))
        with pytest.raises(ValueError, match=rf"residual must be \(8, 384\).*{name}"):
            run(act, linear, GateResidual(torch.ones(384), out))
    for gate in (torch.ones(8), torch.ones(384).half(), torch.ones(1, 384)):
        with pytest.raises(ValueError, match=r"gate must be \(384,\).*got \("):
            run(act, linear, GateResidual(gate, stream))
    table, norm = torch.zeros(8, 64), torch.zeros(128)
    with pytest.raises(ValueError, match=r"gate .*\(384,\).* 4 bytes off"):
        run(act, linear, GateResidual(torch.ones(385)[1:], stream))
    with pytest.raises(ValueError, match=r"norm_k .*\(128,\).* 4 bytes off"):
        run(act, linear, QKNormRope(norm, torch.zeros(129)[1:], table, table))
    for bad in ((norm[:64], norm, table, table), (norm, norm, table.half(), table), (norm, norm, table, table[:7])):
        with pytest.raises(ValueError, match=r"must be \(.*\) fp32, got \("):
            run(act, linear, QKNormRope(*bad))
    for target, name in (
        (random_target("int4", 256, 16, torch.bfloat16, "cpu"), "width 384, got width 256"),
        (ActTarget("int4", torch.ones(384), torch.zeros(384, 16).bfloat16(), torch.ones(1)), "not arranged"),
        (random_target("int4", 384, 16, torch.float16, "cpu"), "float16"),
    ):
        with pytest.raises(ValueError, match=name):
            run(act, linear, GeluQuantize(target))
    assert not launched
    narrow = random_linear("int4", 128, 64, 16, device="cpu")
    with pytest.raises(ValueError, match="128 rows"):
        run(act, kernels.arrange(narrow, "w4a4", torch.bfloat16, "86"), QKNormRope(norm, norm, table, table))


@pytest.mark.gpu
def test_on_a_card_tensors_elsewhere_are_refused_by_name() -> None:
    _, linear, act, run = arranged("w4a16", "cuda")
    assert act.low is not None
    stream, gate = torch.zeros(8, 384, device="cuda").bfloat16(), torch.ones(384, device="cuda")
    norm, table = torch.ones(128, device="cuda"), torch.ones(8, 64, device="cuda")
    for bad, end, name in (
        (replace(act, codes=act.codes.cpu()), Plain(), r"\(8, 64\).* cpu"),
        (replace(act, low=act.low.cpu()), Plain(), r"low.*\(8, 16\).* cpu"),
        (act, Plain(stream.cpu()), r"out.*\(8, 384\).* cpu"),
        (act, GateResidual(gate, stream.cpu()), r"residual.*\(8, 384\).* cpu"),
        (act, GateResidual(gate.cpu(), stream), r"\(384,\).* cpu"),
        (act, QKNormRope(norm, norm, table, table.cpu()), r"\(8, 64\).* cpu"),
        (act, GeluQuantize(random_target("half", 384, 16, torch.bfloat16, "cpu")), r"\(384,\).* cpu"),
    ):
        with pytest.raises(ValueError, match=name):
            run(bad, linear, end)
    for name, elsewhere in (("bias", torch.ones(384)), ("rank_scales", torch.ones(1))):
        with pytest.raises(ValueError, match=rf"{name} \({elsewhere.shape[0]},\).* cpu"):
            replace(linear, **{name: elsewhere})  # type: ignore[arg-type]
    none = run(arranged("w4a16", "cuda")[2], linear, Plain())
    assert tuple(none.shape) == (8, 384)  # type: ignore[attr-defined]


@pytest.mark.gpu
@every_case
def test_on_a_card_no_tokens_make_an_empty_result(case: str) -> None:
    weights, linear, plan = on_card(case, "bf16", 512, 512)
    none = kernels.svdq_linear(random_input(weights, plan, 0, torch.bfloat16), linear, Plain())
    assert tuple(none.shape) == (0, 512)  # type: ignore[union-attr]
