"""What `bench` measures, against which ceiling. How long it takes only a card can say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.device import choose_device
from engine.jit import sources
from engine.layers.svdquant_linear import LayerPlan
from engine.pipelines import bench
from engine.pipelines.bench import Case, Ceilings, Workload, kernel_cases, measured_plans, workload

CEILINGS = Ceilings(copy_bytes_per_second=1e12, matrix_flops=1e14, fp8_flops=2e14)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Workload:
    """Tonfa Mini's network with one head and 24 tokens."""
    monkeypatch.setattr(bench, "ROTATED_BYTES", 2**16)
    mini = workload("mini")
    picture = replace(mini.picture, width=64, height=64)
    return replace(mini, config=replace(mini.config, num_attention_heads=1), picture=picture, text_tokens=8)


def cases(job: Workload, *plans: str, backend: str = "torch") -> list[Case]:
    chosen = list(plans), torch.device("cpu"), torch.float16, None, backend
    return list(kernel_cases(job, *chosen))  # type: ignore[arg-type]


def test_every_kernel_there_is_has_a_row(small: Workload) -> None:
    there = {file.name.partition(".")[0] for file in sources.KERNELS.glob("*.cu")}
    rows = [case.operation for case in cases(small, "w4a4", "w4a16")]
    assert {row.partition(",")[0].partition(".")[0] for row in rows} == there | {"attention"}
    assert len(set(zip(rows, [case.shape for case in cases(small, "w4a4", "w4a16")], strict=True))) == len(rows)


def test_rows_are_named_by_the_kernel_and_say_their_shape(small: Workload) -> None:
    told = [f"{case.operation} | {case.shape}" for case in cases(small, "w4a8", "w4a16", backend="cudnn")]
    assert len(told) == 8 + 8 + 2 + 1 + 3
    for row in (
        "quantize_act.w4a8 | fc2, 24 x 512, rank 32",
        "modulate_quantize.w4a16 | qkv, fc1, 24 x 128, rank 64",
        "svdq_linear.w4a8, q/k norm and RoPE | qkv, 24 x 128 -> 384, rank 32",
        "svdq_linear.w4a16, gate and residual | fc2, 24 x 512 -> 128, rank 32",
        "attention, cudnn | 1 heads x 24 x 128",
        "attention_fp16 | 1 heads x 24 x 128",
        "modulation_w4a16 | 1 x 128 -> 384",
        "linear_w4a16 | T5 wo, 8 x 768 -> 256",
    ):
        assert row in told


def test_where_our_attention_was_fastest_it_is_not_told_twice(small: Workload) -> None:
    told = [case.operation for case in cases(small, "w4a4", backend="fp16") if "attention" in case.operation]
    assert told == ["attention_fp16"]


@pytest.mark.parametrize("plan", ["w4a4", "w4a8", "w4a16"])
def test_all_of_it_runs_and_knows_what_it_moves(small: Workload, plan: str) -> None:
    for case in cases(small, plan):
        for index in (0, 1, 70):
            case.run(index)
        assert case.num_bytes > 0
        if case.is_linear:
            assert case.product is not None
            assert f"{case.product[2]} -> {case.product[1]}" in case.shape
        if case.by_torch is not None:
            case.by_torch(0)


@pytest.mark.parametrize(
    ("plan", "product", "us", "bound", "fraction"),
    [
        ("w4a8", None, 2.0, "memory", 0.5),
        ("w4a16", (1, 1000, 1000), 4.0, "memory", 0.25),
        ("w4a16", (1000, 1000, 1000), 40.0, "matrix", 0.5),
        ("w4a8", (1000, 1000, 1000), 40.0, "fp8", 0.25),
        ("w4a4", (1000, 1000, 1000), 10.0, "matrix", 2.0),  # torch has no 4-bit products to measure
    ],
)
def test_the_ceiling_is_the_one_that_is_met_first(
    plan: LayerPlan, product: tuple[int, int, int] | None, us: float, bound: str, fraction: float
) -> None:
    case = Case("one", "shape", plan, lambda _: None, 10**6, product, is_linear=product is not None)
    found = case.bound(us, CEILINGS)
    assert found[0] == bound
    assert found[1] == pytest.approx(fraction)
    assert replace(case, plan="w4a8").bound(us, replace(CEILINGS, fp8_flops=None))[0] in ("memory", "matrix")


@pytest.mark.parametrize(
    ("arch", "plans"),
    [
        (75, ["w4a4", "w4a16"]),
        (89, ["w4a4", "w4a8", "w4a16"]),
        (90, ["w4a8", "w4a16"]),  # no emulated w4a4
        (100, ["w4a16"]),
        (120, ["w4a8", "w4a16"]),
    ],
)
def test_linears_are_measured_by_the_plans_that_a_person_would_take(arch: int, plans: list[str]) -> None:
    assert measured_plans(arch) == plans


def test_shapes_are_those_of_the_models() -> None:
    flux, mini = workload("flux"), workload("mini")
    assert (flux.tokens, flux.config.hidden_size, flux.config.joint_attention_dim) == (4608, 3072, 4096)
    assert (mini.tokens, mini.config.hidden_size, mini.config.joint_attention_dim) == (288, 512, 256)


@pytest.mark.gpu
def test_on_a_card_every_row_has_its_times() -> None:
    told: list[float] = []
    card = choose_device("cuda")
    result = bench.bench(card, "mini", with_step=True, report=lambda _, fraction: told.append(fraction))
    assert min(told) >= 0
    assert max(told) <= 1
    kernels = result["kernels"]
    assert {one["plan"] for one in kernels} == {result["plan"], "w4a16"} | set(measured_plans(card.arch or 0))
    assert all(one["us"] > 0 and 0 < one["ceiling"] < 20 for one in kernels)
    for one in kernels:
        quantizes = one["operation"].startswith(("quantize_act", "modulate_quantize"))
        assert (one["torch_us"] is None) == quantizes
    assert all(one["ms"] > 0 for one in result["steps"])
