"""quantize_act: first what the result is good for, then edges, then the golden numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.jit import ARCHITECTURES, current_arch, load
from engine.kernels import quantize_act as kernels
from engine.kernels._quantize_rows import best_tiles
from engine.reference.e2m1 import decode_e2m1
from engine.reference.quantize_act import (
    ActFormat,
    ActTarget,
    Numerics,
    QuantizedAct,
    dequantize,
    pack_nibbles,
    project_down,
    quantize_act,
    quantize_act_e4m3,
    quantize_act_int4,
    quantize_act_nvfp4,
    saturated,
    smooth,
    unpack_nibbles,
)
from tests.golden import golden
from tests.kernels import act_targets
from tests.kernels.act_targets import difference, fingerprint, poisoned, random_target  # noqa: F401
from tests.kernels.golden_linears import GELU_SHIFT, golden_linear
from tests.tolerances import (
    CODES_AT_TIES,
    DIFFERENT_CODES,
    FORMAT_ERROR,
    RELATIVE,
    largest_error,
    relative_error,
)

NUMERICS: list[Numerics] = ["public", "tonfa"]


def activations(m: int = 33, k: int = 192, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """x with a few outlier channels, which smooth_factor tames."""
    outliers = torch.ones(k)
    outliers[::37] = 20
    return (torch.randn(m, k) * outliers).to(dtype), (outliers.sqrt() * (0.5 + torch.rand(k))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_undoing_int4_is_off_by_half_a_level_at_most(dtype: torch.dtype) -> None:
    x, smooth_factor = activations(dtype=dtype)
    codes, ascales = quantize_act_int4(x, smooth_factor)
    level = ascales.repeat_interleave(64, dim=1)
    error = codes.float() * level - x.float() / smooth_factor.float()
    assert codes.dtype == torch.int8
    assert ascales.dtype == torch.float32
    assert int(codes.min()) == -7  # never -8: the grid stays symmetric around zero
    assert (error.abs() <= level / 2 * 1.001).all()


def test_undoing_unsigned_int4_gives_the_shifted_gelu() -> None:
    x = F.gelu(torch.randn(16, 128), approximate="tanh")
    smooth_factor = 0.5 + torch.rand(128)
    codes, ascales = quantize_act_int4(x, smooth_factor, unsigned_shift=GELU_SHIFT)
    level = ascales.repeat_interleave(64, dim=1)
    error = codes.float() * level - (x + GELU_SHIFT) / smooth_factor
    assert codes.dtype == torch.uint8
    assert int(codes.max()) == 15
    assert (error.abs() <= level / 2 * 1.001).all()


FORMATS: list[ActFormat] = ["int4", "uint4", "e4m3", "nvfp4", "half"]


def target_for(format: ActFormat, smooth_factor: Tensor, proj_down: Tensor) -> ActTarget:
    return ActTarget(
        format=format,
        smooth_factor=smooth_factor.float(),
        proj_down=proj_down,
        rank_scales=torch.ones(proj_down.shape[1] // 16, device=proj_down.device),
        shift=GELU_SHIFT if format == "uint4" else 0.0,
    )


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_stands_for_the_smoothed_input(format: ActFormat) -> None:
    x, smooth_factor = activations(m=33, k=256)
    if format == "uint4":
        x = F.gelu(x, approximate="tanh")
    target = target_for(format, smooth_factor, torch.randn(256, 32).bfloat16())
    act = quantize_act(x, target)
    wanted = smooth(x, target.smooth_factor, shift=target.shift)
    assert (act.format, act.num_tokens, act.in_features) == (format, 33, 256)
    assert relative_error(dequantize(act), wanted) < FORMAT_ERROR[format]
    assert act.low is not None
    assert relative_error(act.low, x.float() @ target.proj_down.float()) < 1e-6


def test_two_codes_a_byte_the_even_column_low() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    assert pack_nibbles(torch.tensor([[-1, -7]], dtype=torch.int8)).tolist() == [[0x9F]]


def test_what_does_not_fit_together_is_refused() -> None:
    ones, none = torch.ones(128), torch.ones(0)
    with pytest.raises(ValueError, match=r"R a multiple of 16 up to 1024, got \(128, 24\)"):
        ActTarget("int4", ones, torch.ones(128, 24), none)
    with pytest.raises(ValueError, match=r"multiple of 64.*\(100,\)"):
        ActTarget("int4", torch.ones(100), torch.ones(100, 0), none)
    with pytest.raises(ValueError, match=r"rank_scales must be \(2,\)"):
        ActTarget("int4", ones, torch.ones(128, 32), torch.ones(1))
    with pytest.raises(ValueError, match=r"fp32.*bfloat16"):
        ActTarget("int4", ones.bfloat16(), torch.ones(128, 0), none)
    with pytest.raises(ValueError, match=r"shift.*0.5"):
        ActTarget("int4", ones, torch.ones(128, 0), none, shift=0.5)
    with pytest.raises(ValueError, match=r"scales .*\(2, 3\)"):
        QuantizedAct("int4", torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 2), None)
    with pytest.raises(ValueError, match=r"low must be \(3, R\)"):
        QuantizedAct("half", torch.zeros(3, 64), None, torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"\(M, 128\), got \(3, 64\)"):
        quantize_act(torch.ones(3, 64), ActTarget("half", ones, torch.ones(128, 0), none))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_undoing_nvfp4_is_off_by_a_tenth(numerics: Numerics) -> None:
    x, smooth_factor = activations(m=64, k=1024)
    codes, ascales = quantize_act_nvfp4(x, smooth_factor, numerics=numerics)
    undone = decode_e2m1(codes) * ascales.float().repeat_interleave(16, dim=1)
    assert 0.05 < relative_error(undone, x.float() / smooth_factor.float()) < 0.11


def test_undoing_e4m3_is_off_by_a_thirtieth() -> None:
    x, smooth_factor = activations(m=64, k=1024)
    codes, ascales = quantize_act_e4m3(x, smooth_factor)
    undone = codes.float() * ascales.unsqueeze(-1)
    assert 0.01 < relative_error(undone, x.float() / smooth_factor.float()) < 0.035
    assert codes.float().abs().max() == 448


def test_a_fixed_e4m3_scale_saturates_and_never_overflows() -> None:
    x = torch.tensor([[1.0, 1000.0, -1e30, 0.25]])
    codes, ascales = quantize_act_e4m3(x, torch.ones(4), scale=torch.tensor(0.5))
    assert codes.float().tolist() == [[2.0, 448.0, -448.0, 0.5]]
    assert ascales.tolist() == [0.5]


def test_codes_at_the_end_of_the_grid_can_be_counted() -> None:
    codes = torch.tensor([[448.0, -448.0, 416.0, 0.0] * 16]).to(torch.float8_e4m3fn).view(torch.uint8)
    assert int(saturated(QuantizedAct("e4m3", codes, torch.ones(1), None))) == 32
    with pytest.raises(ValueError, match="half"):
        saturated(QuantizedAct("half", torch.ones(1, 64), None, None))


@pytest.mark.parametrize("tiny", [0.0, 1e-42])
def test_rows_of_nothing_become_codes_of_nothing(tiny: float) -> None:
    x = torch.full((2, 64), tiny)
    assert not quantize_act_int4(x, torch.ones(64))[0].any()
    assert not quantize_act_nvfp4(x, torch.ones(64))[0].any()
    assert not quantize_act_e4m3(x, torch.ones(64))[0].float().any()


def test_rows_do_not_see_each_other() -> None:
    x, smooth_factor = activations()
    codes, ascales = quantize_act_int4(x, smooth_factor)
    one, scale = quantize_act_int4(x[7:8], smooth_factor)
    assert torch.equal(one[0], codes[7])
    assert torch.equal(scale[0], ascales[7])


def test_a_width_that_is_no_whole_number_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 64.*\(2, 100\)"):
        quantize_act_int4(torch.zeros(2, 100), torch.ones(100))
    with pytest.raises(ValueError, match="smooth_factor"):
        quantize_act_e4m3(torch.zeros(2, 64), torch.ones(65))


@pytest.mark.parametrize(
    ("layer", "x", "codes"), [("fc1", "fc1.x", "act_codes"), ("fc2", "mlp.gelu", "act_codes_unsigned")]
)
def test_public_numerics_are_the_golden_ones(layer: str, x: str, codes: str, tmp_path: Path) -> None:
    tensors, weights = golden("svdq_numerics_int4"), golden_linear(layer, tmp_path)
    shift = GELU_SHIFT if layer == "fc2" else None
    found, ascales = quantize_act_int4(tensors[x], weights.smooth_factor, unsigned_shift=shift, numerics="public")
    expected = tensors[f"{layer}.{codes}"]
    assert (found.int() - expected.int()).abs().max() <= CODES_AT_TIES
    assert (found != expected).float().mean() < 0.005
    assert torch.equal(ascales, tensors[f"{layer}.act_scales"])
    low_rank = project_down(tensors[x], weights.proj_down)
    assert largest_error(low_rank, tensors[f"{layer}.lowrank_act"]) < 1e-6


# ------------------------------------------------------------------------------------------ on a card


HALF = [torch.bfloat16, torch.float16]
# FLUX: K 3072 and 12288; Tonfa Mini: 512 and 2048; the narrowest and the widest; one that no 8 warps share evenly
SHAPES = [
    (1, 3072), (7, 3072), (256, 3072), (4096, 3072), (4608, 3072), (4613, 3072), (4096, 12288), (4608, 12288),
    (4613, 12288), (7, 512), (256, 512), (256, 2048), (7, 15360), (33, 64), (40, 1088),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All at once, on several threads, before the first test that launches one."""
    if torch.cuda.is_available():
        load(kernels.variants(current_arch()))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_a_card_finds_the_references_codes(m: int, k: int, format: ActFormat, dtype: torch.dtype) -> None:
    """Up to ties: x times a reciprocal is at most a unit of fp32 from x / smooth_factor, and so is each scale."""
    target = random_target(format, k, 32, dtype, "cuda")
    x = act_targets.activations(m, k, dtype, "cuda", positive=format == "uint4")
    found = difference(kernels.quantize_act(x, target), quantize_act(x, target))
    assert found.steps <= CODES_AT_TIES, found
    assert found.fraction < DIFFERENT_CODES, found
    assert found.scales < 2**-21 or (format == "nvfp4" and found.scales <= 2**-3), found  # e4m3 has ties of its own
    assert found.low < RELATIVE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["int4", "e4m3", "nvfp4", "half"])
def test_without_smoothing_ties_are_common_and_still_one_step(format: ActFormat) -> None:
    """bf16 over bf16 is often halfway between two codes: there, 1 in 1000 is the other one."""
    target = random_target(format, 3072, 0, torch.bfloat16, "cuda")
    target = kernels.arrange_target(replace(target, smooth_factor=torch.ones(3072, device="cuda")))
    x = torch.randn(512, 3072, device="cuda").bfloat16()
    found = difference(kernels.quantize_act(x, target), quantize_act(x, target))
    assert found.steps <= CODES_AT_TIES, found
    assert found.fraction < 2e-3, found
    assert found.scales < 2**-21, found


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rank", [0, 16, 32, 128, 1024])
@pytest.mark.parametrize("format", FORMATS)
def test_any_rank_that_is_a_multiple_of_16(format: ActFormat, rank: int) -> None:
    target = random_target(format, 3072, rank, torch.bfloat16, "cuda")
    x = act_targets.activations(261, 3072, torch.bfloat16, "cuda", positive=format == "uint4")
    act = kernels.quantize_act(x, target)
    found = difference(act, quantize_act(x, target))
    assert found.steps <= CODES_AT_TIES
    assert (act.low is None) == (rank == 0)
    assert found.low < RELATIVE[torch.float32]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("format", FORMATS)
def test_ranks_at_strength_0_are_skipped_and_change_nothing(format: ActFormat) -> None:
    """Rank 32 + 3 x 16, each of the three at 0 or not: the base ranks never change by a bit."""
    target = random_target(format, 3072, 80, torch.bfloat16, "cuda")
    base = replace(target, proj_down=target.proj_down[:, :32].contiguous(), rank_scales=target.rank_scales[:2])
    x = act_targets.activations(261, 3072, torch.bfloat16, "cuda", positive=format == "uint4")
    alone, whole = kernels.quantize_act(x, kernels.arrange_target(base)), quantize_act(x, target)
    assert alone.low is not None
    assert whole.low is not None
    for silent in ([], [2], [3], [2, 3, 4]):
        scales = target.rank_scales.clone()
        scales[silent] = 0
        act = kernels.quantize_act(x, replace(target, rank_scales=scales))
        assert act.low is not None
        assert torch.equal(act.low[:, :32], alone.low)
        assert torch.equal(act.codes, alone.codes)
        for slice in range(5):
            columns = act.low[:, 16 * slice : 16 * slice + 16]
            if slice in silent:
                assert columns.isnan().all()  # the poison is still there
            else:
                expected = whole.low[:, 16 * slice : 16 * slice + 16]
                assert largest_error(columns, expected) < RELATIVE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_know_how_many_there_are(format: ActFormat) -> None:
    """So a picture does not change by a bit when it is made beside others."""
    target = random_target(format, 3072, 48, torch.bfloat16, "cuda")
    x = act_targets.activations(4613, 3072, torch.bfloat16, "cuda", positive=format == "uint4")
    many, few = kernels.quantize_act(x, target), kernels.quantize_act(x[4603:], target)
    assert many.low is not None
    assert few.low is not None
    assert torch.equal(many.codes[4603:], few.codes)
    assert torch.equal(many.low[4603:], few.low)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_fifty_runs_are_one(format: ActFormat) -> None:
    target = random_target(format, 3072, 80, torch.bfloat16, "cuda")
    x = act_targets.activations(4613, 3072, torch.bfloat16, "cuda", positive=format == "uint4")
    assert len({fingerprint(kernels.quantize_act(x, target)) for _ in range(50)}) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_huge_numbers_and_lonely_outliers(format: ActFormat, dtype: torch.dtype) -> None:
    x = act_targets.activations(6, 512, dtype, "cuda", positive=format == "uint4")
    x[0] = 0
    x[1] *= 500
    x[2] = 0
    x[2, 77] = 60000
    x[3] = 2.0**-24  # subnormal in fp16
    x[4, :64] = 0
    target = random_target(format, 512, 16, dtype, "cuda")
    act = kernels.quantize_act(x, target)
    found = difference(act, quantize_act(x, target))
    assert found.steps <= CODES_AT_TIES, found
    assert found.fraction < 1e-3, found
    assert found.scales < 2**-21 or (format == "nvfp4" and found.scales <= 2**-3), found
    assert found.low < RELATIVE[torch.float32]
    if format != "uint4":  # there the shift is what is left of a zero
        assert not dequantize(act)[0].any()


@pytest.mark.parametrize("name", ["smooth_factor", "inverse_smooth", "factors"])
def test_a_target_that_no_kernel_can_read_is_refused(name: str) -> None:
    target = random_target("int4", 128, 16, torch.bfloat16, "cpu")
    whole = getattr(target, name)
    off = torch.cat([whole.flatten()[:1], whole.flatten()])[1:].view(whole.shape)
    with pytest.raises(ValueError, match=rf"{name} must start at a multiple of 16 bytes.*[24] bytes off"):
        replace(target, **{name: off})
    if name != "smooth_factor":
        with pytest.raises(ValueError, match=f"{name} is missing"):
            replace(target, **{name: None})


@pytest.mark.gpu
def test_wrong_calls_are_refused_before_anything_is_launched() -> None:
    target = random_target("int4", 128, 16, torch.bfloat16, "cuda")
    x = torch.ones(3, 128, dtype=torch.bfloat16, device="cuda")
    for wrong, words in (
        (x[:, :64], r"\(M, 128\), got \(3, 64\)"),
        (x.half(), "float16 and torch.bfloat16"),
        (x.float(), "float32"),
        (x.repeat(1, 2)[:, ::2], r"\(3, 128\) with strides \(256, 2\)"),
        (x.flatten()[1:129].view(1, 128), r"\(1, 128\) must start at a multiple of 16 bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.quantize_act(wrong, target)
    with pytest.raises(ValueError, match="arrange_target"):
        kernels.quantize_act(x, target_for("int4", torch.ones(128, device="cuda"), target.proj_down))
    with pytest.raises(ValueError, match=r"contiguous on cuda:0, got \(128,\).*on cpu"):
        kernels.quantize_act(x, replace(target, inverse_smooth=target.smooth_factor.cpu()))
    with pytest.raises(ValueError, match=r"R a multiple of 16 up to 1024, got \(128, 24\)"):
        random_target("int4", 128, 24, torch.bfloat16, "cuda")
    assert kernels.quantize_act(x[:0], target).codes.shape == (0, 64)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_card_quantizes_for_the_fallback(arch: str) -> None:
    sources = {variant.source for variant in kernels.variants(arch)}
    assert "quantize_act.w4a16" in sources
    assert ("quantize_act.w4a4" in sources) == (arch in ("75", "80", "86", "87", "89", "90a"))


@pytest.mark.parametrize(("m", "tiles"), [(1, 1), (512, 1), (1056, 1), (4096, 4), (4608, 5), (4613, 5), (9216, 5)])
def test_blocks_own_as_many_rows_as_keep_132_sms_busy(m: int, tiles: int) -> None:
    assert best_tiles(m, 132, (1, 4, 5)) == tiles
