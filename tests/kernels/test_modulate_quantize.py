"""modulate_quantize: LayerNorm, shift and scale as FLUX's own blocks do them, then quantize_act."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.jit import current_arch, load
from engine.kernels import modulate_quantize as kernels
from engine.kernels import quantize_act as plain_kernel
from engine.kernels.quantize_act import arrange_target
from engine.reference.modulate_quantize import modulate, modulate_quantize
from engine.reference.quantize_act import ActFormat, ActTarget, dequantize, quantize_act
from tests.kernels import act_targets
from tests.kernels.act_targets import difference, fingerprint, poisoned, random_target  # noqa: F401
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


# ------------------------------------------------------------------------------------------ on a card


FORMATS: list[ActFormat] = ["int4", "e4m3", "nvfp4", "half"]
HALF = [torch.bfloat16, torch.float16]
SHAPES = [
    (1, 3072), (256, 3072), (4096, 3072), (4608, 3072), (4613, 3072), (261, 12288), (7, 512), (256, 512),
    (7, 15360), (33, 64), (40, 1088),
]  # fmt: skip


def modulation(k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(k, device="cuda").to(dtype), (1 + 0.3 * torch.randn(k, device="cuda")).to(dtype)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All at once, on several threads, before the first test that launches one."""
    if torch.cuda.is_available():
        load(kernels.variants(current_arch()) + plain_kernel.variants(current_arch()))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_a_card_modulates_up_to_ties(m: int, k: int, dtype: torch.dtype) -> None:
    """Smoothing by 1 leaves y itself: one unit of h apart where fp32 sums in another order fall beside a tie."""
    x, (shift, scale) = act_targets.activations(m, k, dtype, "cuda"), modulation(k, dtype)
    target = random_target("half", k, 16, dtype, "cuda")
    target = arrange_target(replace(target, smooth_factor=torch.ones(k, device="cuda")))
    found = difference(
        kernels.modulate_quantize(x, shift, scale, target), modulate_quantize(x, shift, scale, target)
    )
    # y near 0 is a difference of larger numbers: fp32's error there is many units of so small a number
    y, wanted = kernels.modulate_quantize(x, shift, scale, target).codes, modulate(x, shift, scale)
    assert ((y.float() - wanted.float()).abs() <= wanted.float().abs() * RELATIVE[dtype] + 1e-5).all()
    assert found.fraction < 2e-3, found


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_a_card_finds_the_references_codes(m: int, k: int, format: ActFormat, dtype: torch.dtype) -> None:
    """A y that fell on the other side of a tie may be a group's largest, and change its scale by a unit of h."""
    x, (shift, scale) = act_targets.activations(m, k, dtype, "cuda"), modulation(k, dtype)
    target = random_target(format, k, 32, dtype, "cuda")
    found = difference(
        kernels.modulate_quantize(x, shift, scale, target), modulate_quantize(x, shift, scale, target)
    )
    assert found.steps <= 1 or format == "half", found
    assert found.fraction < 2e-3, found
    assert found.scales <= (2**-3 if format == "nvfp4" else RELATIVE[dtype]), found  # nvfp4's is itself an e4m3
    assert found.low < RELATIVE[dtype], found


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rank", [0, 16, 128, 1024])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [3072, 15360])
def test_further_ranks_see_the_same_input(k: int, format: ActFormat, rank: int) -> None:
    """Every pass over x makes the same y of it: what quantize_act makes of that y, to the bit."""
    x, (shift, scale) = act_targets.activations(261, k, torch.bfloat16, "cuda"), modulation(k, torch.bfloat16)
    target = random_target(format, k, rank, torch.bfloat16, "cuda")
    plain = arrange_target(replace(target, format="half", smooth_factor=torch.ones(k, device="cuda")))
    y = kernels.modulate_quantize(x, shift, scale, plain).codes
    found = kernels.modulate_quantize(x, shift, scale, target)
    assert fingerprint(found) == fingerprint(plain_kernel.quantize_act(y, target))
    assert (found.low is None) == (rank == 0)
    assert difference(found, quantize_act(y, target)).low < RELATIVE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_base_ranks_and_rows_are_alone(format: ActFormat) -> None:
    """Neither ranks behind them, at 0 or not, nor rows around them change a bit."""
    x, (shift, scale) = (
        act_targets.activations(4613, 3072, torch.bfloat16, "cuda"),
        modulation(3072, torch.bfloat16),
    )
    target = random_target(format, 3072, 80, torch.bfloat16, "cuda", silent=(3,))
    base = replace(target, proj_down=target.proj_down[:, :32].contiguous(), rank_scales=target.rank_scales[:2])
    whole = kernels.modulate_quantize(x, shift, scale, target)
    part = kernels.modulate_quantize(x[4603:], shift, scale, arrange_target(base))
    assert whole.low is not None
    assert part.low is not None
    assert torch.equal(whole.codes[4603:], part.codes)
    assert torch.equal(whole.low[4603:, :32], part.low)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_fifty_runs_are_one(format: ActFormat) -> None:
    x, (shift, scale) = (
        act_targets.activations(4613, 3072, torch.bfloat16, "cuda"),
        modulation(3072, torch.bfloat16),
    )
    target = random_target(format, 3072, 80, torch.bfloat16, "cuda")
    runs = {fingerprint(kernels.modulate_quantize(x, shift, scale, target)) for _ in range(50)}
    assert len(runs) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("format", FORMATS)
def test_rows_far_from_zero_and_rows_without_any_width(format: ActFormat) -> None:
    x = act_targets.activations(6, 512, torch.bfloat16, "cuda")
    x[0] = 0
    x[1] = 300  # every number the mean
    x[2] = 1024 + 8 * torch.randint(-3, 4, (512,), device="cuda")  # hardly more than bf16 can tell apart
    x[3] *= 1e15
    x[4] = 0
    x[4, 77] = 60000
    shift, scale = modulation(512, torch.bfloat16)
    target = random_target(format, 512, 16, torch.bfloat16, "cuda")
    act = kernels.modulate_quantize(x, shift, scale, target)
    found = difference(act, modulate_quantize(x, shift, scale, target))
    assert found.steps <= 1 or format == "half", found
    assert found.fraction < 5e-3, found
    assert found.low < RELATIVE[torch.bfloat16]


@pytest.mark.gpu
def test_wrong_calls_are_refused_before_anything_is_launched() -> None:
    x, (shift, scale) = act_targets.activations(3, 128, torch.bfloat16, "cuda"), modulation(128, torch.bfloat16)
    target = random_target("e4m3", 128, 16, torch.bfloat16, "cuda")
    for wrong, words in (
        (shift[:64], r"\(128,\) torch.bfloat16, got \(64,\)"),
        (shift.float(), "got .*float32"),
        (shift.cpu(), r"\(128,\).*on cpu"),
        (shift.repeat(2)[::2], r"\(128,\) with strides \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.modulate_quantize(x, wrong, scale, target)
    with pytest.raises(ValueError, match=r"\(M, 128\), got \(3, 64\)"):
        kernels.modulate_quantize(x[:, :64], shift, scale, target)


def test_no_card_is_offered_a_kernel_for_unsigned_codes_here() -> None:
    assert not any("UNSIGNED" in str(variant) for variant in kernels.variants("89"))
