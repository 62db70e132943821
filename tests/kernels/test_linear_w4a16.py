"""linear_w4a16: the weight-only linear, and the golden T5 layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.checkpoints.svdquant_file import read_w4a16
from engine.jit import ARCHITECTURES, current_arch
from engine.kernels import linear_w4a16 as kernels
from engine.reference.linear_w4a16 import W4A16Weights, linear_w4a16
from tests.golden import golden
from tests.kernels.act_targets import poisoned  # noqa: F401
from tests.kernels.linears import differing, excess
from tests.tolerances import RELATIVE, REROUNDED, STORED_ZEROS, largest_error, relative_error


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
    assert largest_error(found, x.float() @ logical.view(16, 1024).T) < max(RELATIVE[dtype], STORED_ZEROS)


def test_another_width_is_refused(tmp_path: Path) -> None:
    packed = {k.replace(".packed.", "."): t for k, t in golden("awq_w4a16").items() if ".packed." in k}
    write_safetensors(tmp_path / "awq.safetensors", packed, {})
    weights = read_w4a16(open_safetensors(tmp_path / "awq.safetensors"), "t5_linear")
    with pytest.raises(ValueError, match="1024"):
        linear_w4a16(torch.zeros(1, 64), weights)


def random_weights(
    n: int, k: int, group: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", bias: bool = True
) -> W4A16Weights:
    """Results of about 1; zeros that are no whole number of steps."""
    scales = (0.5 + torch.rand(n, k // group, device=device)) * 0.2 / k**0.5
    zeros = -scales * (7 + torch.rand(n, k // group, device=device))
    return W4A16Weights(
        codes=torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device),
        scales=scales.to(dtype),
        zeros=zeros.to(dtype),
        bias=torch.randn(n, device=device).to(dtype) if bias else None,
        group_size=group,
    )


def test_rounding_the_weight_costs_what_its_last_place_is_worth() -> None:
    weights, x = random_weights(64, 256, 64), torch.randn(20, 256)
    error = relative_error(linear_w4a16(x, weights, torch.bfloat16), linear_w4a16(x, weights))
    assert 1e-4 < error < 2**-8


def test_on_a_cpu_the_wrapper_is_the_reference() -> None:
    weights, x = random_weights(64, 256, 64), torch.randn(2, 10, 256)
    linear = kernels.arrange(weights, torch.float32, None)
    assert torch.equal(kernels.linear_w4a16(x, linear), linear_w4a16(x, weights))


@pytest.mark.parametrize("group", [64, 128])
def test_records_hold_codes_scales_and_zeros_where_the_kernel_looks(group: int) -> None:
    weights = random_weights(200, 384, group)
    linear = kernels.arrange(weights, torch.bfloat16, "86")
    assert linear.qweight is not None
    for n, k in [(0, 0), (199, 383), (77, 130), (128, 63), (9, 64), (35, 24)]:
        j, g, q = n % 128 // 8, n % 8, k % 8 // 2
        record = linear.qweight[n // 128, k // group]
        codes, rest = record[: 64 * group].view(torch.int32), record[64 * group :].view(torch.bfloat16)
        word = codes.view(-1, 4, 32, 4)[k % group // 32, j // 4, 4 * g + q, j % 4]
        assert int(word) >> (16 * (k % 2) + 4 * (k % 32 // 8)) & 15 == int(weights.codes[n, k])
        scales, zeros = rest.view(2, 2, 8, 8)[:, j // 8, g, j % 8]
        assert scales == weights.scales[n, k // group]
        assert zeros == weights.zeros[n, k // group]


def test_what_no_kernel_takes_is_refused_when_it_is_arranged() -> None:
    with pytest.raises(ValueError, match="32"):
        kernels.arrange(random_weights(64, 64, 32), torch.bfloat16, "86")
    with pytest.raises(ValueError, match="sm_75"):
        kernels.arrange(random_weights(64, 64, 64), torch.bfloat16, "75")
    assert all(kernels.variants(arch) for arch in ARCHITECTURES)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_card_it_is_the_reference_with_weights_rounded(group: int, dtype: torch.dtype) -> None:
    t5, flux, mini = [(4096, 4096), (10240, 4096), (4096, 10240)], (18432, 3072), [(3072, 512), (1536, 512)]
    for n, k in [*t5, flux, *mini, (72, 384), (200, 128)]:
        weights = random_weights(n, k, group, dtype, "cuda", bias=n % 64 == 0)
        linear = kernels.arrange(weights, dtype, current_arch())
        for m in (1, 7, 256, 512, 4096, 4608, 4613) if k > 1000 else (1, 7, 77, 130, 256, 333):
            x = torch.randn(m, k, device="cuda").to(dtype)
            found, expected = kernels.linear_w4a16(x, linear), linear_w4a16(x, weights, dtype)
            assert excess(found, expected) <= 1
            assert found.numel() < 10_000 or differing(found, expected) < REROUNDED[dtype]


@pytest.mark.gpu
def test_on_a_card_fifty_runs_have_one_result_and_batches_keep_their_shape() -> None:
    weights = random_weights(512, 1024, 128, device="cuda")
    linear = kernels.arrange(weights, torch.bfloat16, current_arch())
    x = torch.randn(2, 77, 1024, device="cuda").bfloat16()
    first = kernels.linear_w4a16(x, linear)
    assert tuple(first.shape) == (2, 77, 512)
    assert all(torch.equal(kernels.linear_w4a16(x, linear), first) for _ in range(49))
    assert torch.equal(kernels.linear_w4a16(x[1], linear), first[1])
    assert tuple(kernels.linear_w4a16(x[:, :0], linear).shape) == (2, 0, 512)


@pytest.mark.gpu
def test_on_a_card_bad_calls_say_their_numbers() -> None:
    linear = kernels.arrange(random_weights(64, 128, 64, device="cuda"), torch.bfloat16, current_arch())
    for x in (
        torch.zeros(2, 64, device="cuda").bfloat16(),
        torch.zeros(2, 128, device="cuda").half(),
        torch.zeros(2, 128).bfloat16(),
    ):
        with pytest.raises(ValueError, match=r"\(\.\.\., 128\)"):
            kernels.linear_w4a16(x, linear)
