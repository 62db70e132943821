"""attention_fp16: what attention is for, first; then edges, then agreement with the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import attention_fp16 as kernel
from engine.kernels.attention_fp16 import attention_fp16
from engine.reference import attention_fp16 as reference
from tests.tolerances import FP16_ROUNDING as U
from tests.tolerances import RELATIVE, SCORE_SUMS, relative_error

SHAPES = [
    (1, 2, 1), (2, 3, 77), (1, 1, 31), (1, 1, 33), (3, 1, 127), (1, 2, 129), (1, 2, 256), (1, 4, 320),
    (1, 24, 4608), (2, 3, 4613),
]  # fmt: skip


def heads(batch: int, num_heads: int, length: int, device: str, *, spread: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v (B, H, L, 128) as the engine has them: views into one (B, L, 3 C) tensor, with NaN behind it."""
    behind = torch.full((batch, length + 64, 3 * num_heads * 128), math.nan, dtype=torch.float16, device=device)
    joint = behind[:, :length]
    joint.copy_(torch.randn(joint.shape, device=device))
    joint[..., : num_heads * 128] *= spread
    q, k, v = joint.view(batch, length, 3, num_heads, 128).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def poisoned_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attention_fp16 into memory that held NaN."""
    b, h, length, d = q.shape
    poison = torch.full((b, length, h * d), math.nan, dtype=torch.float16, device=q.device)
    del poison  # torch's allocator hands the same memory out again
    return attention_fp16(q, k, v)


def tolerance(q: Tensor, k: Tensor) -> float:
    """Relative (Frobenius) error of the kernel on random data.

    Probabilities, sums of 32 of them times v (two or four roundings) and the result are rounded: 4 U. A logit of
    size s is rounded SCORE_SUMS times while it grows, independently, each by up to U s, and moves its probability
    by as much.
    """
    logits = (q[0, 0, :512].float() @ k[0, 0].float().T) * 128**-0.5
    return 4 * U + math.sqrt(SCORE_SUMS) * U * float(logits.square().mean().sqrt())


def largest_allowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(L, D) fp64 for one head (L, D): what no rounding can exceed. Tensor cores may cut instead, so 2 U."""
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.T * 128**-0.5
    moved = (SCORE_SUMS * 2 * U * 128**-0.5) * (q.abs() @ k.abs().T)  # each partial sum is at most that of sizes
    p = logits.softmax(dim=-1)
    spread = p * (2 * moved.amax(dim=-1, keepdim=True)).expm1() + p * 8 * U
    return spread @ v.abs() + 2 * U * (p @ v).abs() + 2**-18 * v.abs().amax()  # and probabilities below 2^-20


def test_a_key_that_dominates_is_what_comes_out(device: str) -> None:
    q, k, v = heads(1, 2, 333, device)
    k[:, :, 217] = q[:, :, 5] * 4  # q q / sqrt(128) * 4 is about 45: e^-40 is left for the others
    assert torch.allclose(poisoned_attention(q, k, v).view(333, 2, 128)[5], v[0, :, 217], rtol=2 * U, atol=0)


def test_keys_that_are_all_alike_give_the_mean(device: str) -> None:
    q, k, v = heads(2, 2, 77, device)
    k.zero_()
    found = poisoned_attention(q, k, v).view(2, 77, 2, 128).float()
    mean = v.float().mean(dim=2)[:, None].expand_as(found)
    assert float((found - mean).abs().max()) < 4 * U * float(v.abs().float().mean())


def test_the_order_of_keys_hardly_matters(device: str) -> None:
    q, k, v = heads(1, 2, 200, device)
    order = torch.randperm(200, device=device)
    assert relative_error(attention_fp16(q, k[:, :, order], v[:, :, order]), attention_fp16(q, k, v)) < 8 * U


@pytest.mark.parametrize("top", [30, 1000, 20_000], ids=lambda top: f"logits up to {top}")
def test_large_logits_stay_finite_and_choose_the_right_key(device: str, top: int) -> None:
    length = 100
    q = torch.zeros(1, 1, length, 128, dtype=torch.float16, device=device)
    k, v = torch.zeros_like(q), torch.randn_like(q)
    q[..., 0] = top**0.5 * 128**0.25
    k[0, 0, :, 0] = torch.linspace(-1, 1, length, device=device) * top**0.5 * 128**0.25
    found = poisoned_attention(q, k, v)
    assert torch.isfinite(found).all()
    if top >= 1000:
        assert torch.allclose(found[0, 7], v[0, 0, -1], rtol=0.01, atol=1e-3)


def test_large_values_stay_in_range(device: str) -> None:
    q, k, v = heads(1, 1, 500, device)
    v.fill_(30_000.0)
    assert torch.allclose(poisoned_attention(q, k, v).float(), torch.tensor(30_000.0, device=device), rtol=8 * U)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape: tuple[int, int, int]) -> None:
    q, k, v = heads(*shape, "cuda")
    found, wanted = poisoned_attention(q, k, v), reference.attention_fp16(q, k, v)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    assert torch.isfinite(found).all()
    assert relative_error(found, wanted) < tolerance(q, k)
    last = q.shape[1] - 1
    error = (found[-1, :, last * 128 :].double() - wanted[-1, :, last * 128 :].double()).abs()
    worst = (error / largest_allowed(q[-1, last], k[-1, last], v[-1, last])).amax()
    assert float(worst) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.01, 4.0, 16.0], ids=lambda spread: f"logits of {spread}")
def test_agrees_with_the_reference_for_flat_and_sharp_attention(spread: float) -> None:
    q, k, v = heads(1, 2, 1000, "cuda", spread=spread)
    found, wanted = poisoned_attention(q, k, v), reference.attention_fp16(q, k, v)
    assert relative_error(found, wanted) < tolerance(q, k)


@pytest.mark.gpu
def test_any_strides_give_the_same_numbers() -> None:
    q, k, v = heads(2, 3, 200, "cuda")
    wanted = attention_fp16(q, k, v)
    assert torch.equal(attention_fp16(q.contiguous(), k.contiguous(), v.contiguous()), wanted)
    one_head = k[:, :1].expand(2, 3, 200, 128)
    assert torch.equal(attention_fp16(q, one_head, v), attention_fp16(q, one_head.contiguous(), v))


@pytest.mark.gpu
def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    q, k, v = heads(3, 2, 205, "cuda")
    together = attention_fp16(q, k, v)
    for i in range(3):
        assert torch.equal(attention_fp16(q[i : i + 1], k[i : i + 1], v[i : i + 1])[0], together[i])


@pytest.mark.gpu
def test_fifty_runs_are_one() -> None:
    q, k, v = heads(1, 24, 1301, "cuda")
    first = poisoned_attention(q, k, v)
    assert all(torch.equal(poisoned_attention(q, k, v), first) for _ in range(49))


def test_the_reference_is_torchs_attention() -> None:
    q, k, v = heads(2, 3, 77, "cpu")
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2).flatten(2)
    found = reference.attention_fp16(q, k, v)
    assert found.dtype == torch.float16
    assert relative_error(found, wanted) < RELATIVE[torch.float16]
    assert (
        relative_error(reference.attention_fp16(q.float(), k.float(), v.float()), wanted) < RELATIVE[torch.float32]
    )


def test_what_the_kernel_cannot_take_is_refused_with_its_numbers(device: str) -> None:
    q, k, v = heads(1, 2, 16, device)
    with pytest.raises(ValueError, match="bfloat16"):
        attention_fp16(q, k, v.bfloat16())
    with pytest.raises(ValueError, match=r"\(1, 2, 15, 128\)"):
        attention_fp16(q, k[:, :, :15], v)
    with pytest.raises(ValueError, match=r"\(1, 2, 16, 64\)"):
        attention_fp16(q[..., :64], k[..., :64], v[..., :64])
    with pytest.raises(ValueError, match=r"\(1, 2, 0, 128\)"):
        attention_fp16(q[:, :, :0], k[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match=r"v with strides \(.*, 256, 2\)"):
        attention_fp16(q, k, torch.zeros(1, 2, 16, 256, dtype=torch.float16, device=device)[..., ::2])
    with pytest.raises(ValueError, match=r"k with strides \(.*, 129, 1\)"):
        attention_fp16(q, torch.zeros(1, 2, 16, 129, dtype=torch.float16, device=device)[..., :128], v)
    with pytest.raises(ValueError, match=r"start at multiples of 16 bytes.*byte \d+ of 256"):
        attention_fp16(q, k, torch.zeros(1, 2, 16, 136, dtype=torch.float16, device=device)[..., 1:129])


@pytest.mark.gpu
def test_another_device_is_refused() -> None:
    q, k, v = heads(1, 2, 16, "cuda")
    with pytest.raises(ValueError, match="on cpu"):
        attention_fp16(q, k.cpu(), v)


def test_it_is_one_kernel_everywhere() -> None:
    assert kernel.variants("75") == kernel.variants("120a") == [kernel.VARIANT]


def test_the_reference_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8, 128\)"):
        reference.attention_fp16(torch.zeros(2, 8, 128), torch.zeros(2, 8, 128), torch.zeros(2, 8, 128))
