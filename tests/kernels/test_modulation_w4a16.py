"""modulation_w4a16: shifts, scales and gates in the order that layers use, from the golden modulation layers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels import modulation_w4a16 as kernel
from engine.kernels.modulation_w4a16 import ArrangedModulation, arrange_modulation
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.modulation_w4a16 import modulation_w4a16
from tests.golden import GOLDEN, golden
from tests.tolerances import CANCELLED, RELATIVE, REROUNDED_GEMV, largest_error

FLUX, MINI = 3072, 512


def stored(file: Path, prefix: str, splits: int) -> W4A16Weights:
    """A modulation as a file has it. Imports here: machines that only run kernels have no folders of a person."""
    from engine.checkpoints.safetensors_file import open_safetensors
    from engine.checkpoints.svdquant_file import read_w4a16

    return read_w4a16(open_safetensors(file), prefix, splits=splits)


def made(rows: int, channels: int, device: str, dtype: torch.dtype) -> W4A16Weights:
    """Weights as a quantizer makes them: zeros near -7.5 scales, scales of one group unlike its neighbours'."""
    scales = (0.005 * torch.rand(rows, channels // 64, device=device) + 1e-4).to(dtype)
    zeros = (-7.5 * scales.float() * (1 + 0.2 * torch.randn(scales.shape, device=device))).to(dtype)
    codes = torch.randint(0, 16, (rows, channels), dtype=torch.uint8, device=device)
    return W4A16Weights(codes, scales, zeros, torch.randn(rows, device=device).to(dtype), 64)


def poisoned_modulation(x: Tensor, weights: ArrangedModulation, splits: int) -> Tensor:
    """The kernel's result, in memory that held NaN."""
    poison = torch.full((len(x), weights.out_features), math.nan, dtype=x.dtype, device=x.device)
    del poison  # torch's allocator hands the same memory out again
    return kernel.modulation_w4a16(x, weights, splits)


@pytest.mark.parametrize(("case", "splits", "scales"), [("adanorm_zero", 6, (1, 4)), ("adanorm_single", 3, (1,))])
def test_parts_come_in_logical_order_and_scales_contain_their_one(
    case: str, splits: int, scales: tuple[int, ...], tmp_path: Path
) -> None:
    from engine.checkpoints.safetensors_file import write_safetensors

    tensors = golden("awq_w4a16")
    packed = {k.replace(".packed.", "."): t for k, t in tensors.items() if k.startswith(f"{case}.packed.")}
    write_safetensors(tmp_path / "layer.safetensors", packed, {})
    weights = stored(tmp_path / "layer.safetensors", case, splits)
    codes, group_scale = tensors[f"{case}.logical.codes_signed"].float(), tensors[f"{case}.logical.group_scale"]
    dense = (codes.view(24, 16, 64) * group_scale.float().unsqueeze(-1)).view(24, 1024)
    bias = tensors[f"{case}.logical.bias"].float().view(splits, -1).clone()
    bias[list(scales)] += 1
    x = torch.randn(5, 1024)
    expected = (x @ dense.T).view(5, splits, -1) + bias
    # The stored zeros are -7 scales rounded to bf16, and so is the bias with its one.
    assert largest_error(modulation_w4a16(x, weights, splits), expected) < 2 * RELATIVE[torch.bfloat16]
    assert torch.equal(
        kernel.modulation_w4a16(x, arrange_modulation(weights), splits), modulation_w4a16(x, weights, splits)
    )


def test_the_golden_block_is_reproduced() -> None:
    probes = golden("mini_flux_single_block_int4_probes")
    file = GOLDEN / "mini_flux_single_block_int4.safetensors"
    weights = stored(file, "single_transformer_blocks.0.norm.linear", 3)
    shift, scale, gate = modulation_w4a16(probes["norm.linear.x_after_silu"], weights, 3).unbind(1)
    assert largest_error(shift, probes["norm.linear.shift"]) < RELATIVE[torch.float32]
    assert largest_error(scale, probes["norm.linear.scale_plus_one"]) < RELATIVE[torch.float32]
    assert largest_error(gate, probes["norm.linear.gate"]) < RELATIVE[torch.float32]


def test_rows_that_do_not_split_are_refused() -> None:
    weights = made(24, 128, "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="multiple of 5"):
        modulation_w4a16(torch.zeros(1, 128), weights, 5)
    with pytest.raises(ValueError, match="multiple of 5"):
        kernel.modulation_w4a16(torch.zeros(1, 128), arrange_modulation(weights), 5)


@pytest.mark.parametrize(("rows", "channels"), [(96, 128), (24, 192), (1, 64)])
def test_arranging_keeps_every_code_scale_and_zero(device: str, rows: int, channels: int) -> None:
    weights = made(rows, channels, device, torch.float16)
    back = arrange_modulation(weights).logical()
    for name in ("codes", "scales", "zeros", "bias"):
        assert torch.equal(getattr(back, name), getattr(weights, name)), name


def test_a_lane_finds_its_codes_where_the_kernel_says() -> None:
    weights = made(48, 192, "cpu", torch.bfloat16)
    arranged = arrange_modulation(weights)
    words = arranged.codes.to(torch.int64) & 0xFFFFFFFF
    for tile, half, group, lane, i, e, s, r in [
        (0, 0, 0, 0, 0, 0, 0, 0),
        (0, 1, 2, 13, 1, 1, 0, 1),
        (1, 0, 1, 31, 3, 0, 1, 1),
    ]:
        code = words[tile, group, half, lane, i] >> 4 * (4 * e + 2 * s + r) & 15
        row, channel = 32 * tile + 16 * half + lane // 4 + 8 * r, 64 * group + 16 * (lane % 4) + 4 * i + 2 * s + e
        assert code == weights.codes[row, channel]
        assert arranged.scales[tile, group, half, lane // 4, 2 * r] == weights.scales[row, group]
        assert arranged.scales[tile, group, half, lane // 4, 2 * r + 1] == weights.zeros[row, group]


CASES = [
    (6 * FLUX, FLUX, 6, 1), (3 * FLUX, FLUX, 3, 1), (2 * FLUX, FLUX, 2, 2), (6 * FLUX, FLUX, 6, 8),
    (6 * MINI, MINI, 6, 1), (3 * MINI, MINI, 3, 3), (2 * MINI, MINI, 2, 1),
    (3 * 128, 128, 3, 5), (6 * 9, 64, 6, 17), (24, 3136, 1, 7),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("halves", ["bf16", "fp16", "fp16 with scales of bf16", "bf16 with scales of fp16"])
@pytest.mark.parametrize(("rows", "channels", "splits", "batch"), CASES)
def test_agrees_with_the_reference(rows: int, channels: int, splits: int, batch: int, halves: str) -> None:
    dtype = torch.bfloat16 if halves.startswith("bf16") else torch.float16
    of_scales = torch.bfloat16 if halves.endswith("bf16") else torch.float16
    weights = made(rows, channels, "cuda", of_scales)
    x = torch.nn.functional.silu(2 * torch.randn(batch, channels, device="cuda")).to(dtype)
    found = poisoned_modulation(x, arrange_modulation(weights), splits)
    wanted = modulation_w4a16(x, weights, splits)
    assert found.shape == wanted.shape == (batch, splits, rows // splits)
    assert torch.isfinite(found).all()
    assert largest_error(found, wanted) < RELATIVE[dtype]
    assert float((found != wanted).float().mean()) < REROUNDED_GEMV


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_are_exact_where_codes_and_zeros_cancel(dtype: torch.dtype) -> None:
    weights = made(48, 256, "cuda", dtype)
    weights = replace(weights, codes=torch.full_like(weights.codes, 8), zeros=-8 * weights.scales, bias=None)
    x = torch.randn(3, 256, device="cuda").to(dtype)
    found = poisoned_modulation(x, arrange_modulation(weights), 6)
    assert float(found.abs().max()) < CANCELLED * float(
        (8 * weights.scales.float()).max() * x.float().abs().sum(1).max()
    )


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    arranged = arrange_modulation(made(3 * MINI, MINI, "cuda", torch.bfloat16))
    x = torch.randn(11, MINI, device="cuda").bfloat16()
    together = poisoned_modulation(x, arranged, 3)
    for i in range(11):
        assert torch.equal(kernel.modulation_w4a16(x[i : i + 1], arranged, 3)[0], together[i])


@pytest.mark.gpu
def test_fifty_runs_are_one() -> None:
    arranged = arrange_modulation(made(3 * FLUX, FLUX, "cuda", torch.bfloat16))
    x = torch.randn(2, FLUX, device="cuda").bfloat16()
    first = poisoned_modulation(x, arranged, 3)
    assert all(torch.equal(poisoned_modulation(x, arranged, 3), first) for _ in range(49))


def test_weights_of_another_kind_are_refused_with_their_numbers() -> None:
    weights = made(48, 128, "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="of 64 channels, got 128"):
        arrange_modulation(
            replace(weights, group_size=128, scales=weights.scales[:, :1], zeros=weights.zeros[:, :1])
        )
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        arrange_modulation(replace(weights, scales=weights.scales.float()))


def test_a_wrong_input_is_refused_with_its_numbers(device: str) -> None:
    arranged = arrange_modulation(made(48, 128, device, torch.bfloat16))
    for shape in [(1, 64), (0, 128), (1, 1, 128)]:
        with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
            kernel.modulation_w4a16(torch.zeros(shape, device=device).bfloat16(), arranged, 6)


@pytest.mark.gpu
def test_what_the_kernel_cannot_read_is_refused_with_its_numbers() -> None:
    arranged = arrange_modulation(made(48, 128, "cuda", torch.bfloat16))
    x = torch.zeros(4, 256, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32"):
        kernel.modulation_w4a16(x[:, :128].float(), arranged, 6)
    with pytest.raises(ValueError, match=r"strides \(256, 1\)"):
        kernel.modulation_w4a16(x[:, :128], arranged, 6)
    with pytest.raises(ValueError, match="at byte 2 of 256"):
        kernel.modulation_w4a16(x.flatten()[1:129].view(1, 128), arranged, 6)
    with pytest.raises(ValueError, match="cpu"):
        kernel.modulation_w4a16(
            x[:1, :128].contiguous(), arrange_modulation(made(48, 128, "cpu", torch.bfloat16)), 6
        )


def test_sm_75_has_no_bf16() -> None:
    assert [dict(variant.defines)["H_BF16"] for variant in kernel.variants("75")] == [0, 0]
    assert len(kernel.variants("90a")) == 4
