"""Launching: every kind of argument arrives, on the right stream, in a graph; wrong calls never get that far."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.jit import KernelError, Strided, Variant, current_arch, launch, load, noted, sources, synchronize
from engine.jit import compile as jit_compile

ROOT = Path(__file__).resolve().parents[3]
TELL = """
extern "C" __global__ void tell(int a, const float* x, float f, int b, const int* none, float g, float* out) {
    extern __shared__ float room[];
    int last = blockDim.x * blockDim.y * blockDim.z - 1;
    room[SHARED - 1] = f;
    if (threadIdx.x + threadIdx.y + threadIdx.z + blockIdx.x + blockIdx.y + blockIdx.z) return;
    float told[] = {(float)a, x[1], room[SHARED - 1], (float)b, none == nullptr, g, (float)gridDim.x,
                    (float)gridDim.y, (float)gridDim.z, (float)blockDim.x, (float)blockDim.y, (float)blockDim.z,
                    (float)last};
    for (int i = 0; i < 13; i++) out[i] = told[i];
}
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def add_to(variant: Variant, x: Tensor, s: float = 1.0) -> Tensor:
    """x + 2 s, by the kernel of the fixture `add`."""
    y = torch.full_like(x, torch.nan)
    launch(variant, ((x.numel() + 255) // 256,), (256,), x, y, x.numel(), s)
    return y


# ------------------------------------------------------------------------------------------------ without a card


def test_a_machine_without_a_card_is_told_so_and_no_driver_is_touched() -> None:
    code = """
import torch
from engine.jit import *
for call in (lambda: launch(Variant("x"), (1,), (1,), torch.zeros(1)), lambda: load([]), current_arch):
    try: call()
    except KernelError as error: print(error)
print("libcuda." in open("/proc/self/maps").read())
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells what a process has loaded")
    lines = run(code, CUDA_VISIBLE_DEVICES="").splitlines()
    assert lines[:3] == ["There is no graphics card that torch can use."] * 3
    assert torch.version.cuda or lines[3] == "False"  # torch for CUDA looks for the driver itself


def test_what_would_be_launched_can_be_noted() -> None:
    first, second = Variant("first"), Variant("second", (("N", 1),))
    with noted() as variants:
        for variant in (second, first, Variant("second", (("N", 1),))):
            launch(variant, (1,), (1,), torch.zeros(1), 5)
        with ThreadPoolExecutor() as another, pytest.raises(KernelError):
            another.submit(launch, Variant("other"), (1,), (1,)).result()
    assert list(variants) == [second, first]


# --------------------------------------------------------------------------------------------------- with a card


@pytest.mark.gpu
def test_every_kind_of_argument_arrives(write: Callable[..., str]) -> None:
    variant = Variant(write("tell.cu", TELL), (("SHARED", 12000),))  # 48,000 bytes: all that needs no asking
    x = torch.tensor([1.5, 2.5, 3.5], device="cuda")
    for grid, block in [((7,), (32,)), ((2, 3), (8, 4)), ((2, 3, 4), (4, 2, 8))]:
        out = torch.full((13,), torch.nan, device="cuda")
        launch(variant, grid, block, -7, x, 0.25, 2**24, None, -1.5, out, shared_bytes=48000)
        sizes = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
        assert out.tolist() == [-7, 2.5, 0.25, 2**24, 1, -1.5, *sizes, sizes[3] * sizes[4] * sizes[5] - 1]


@pytest.mark.gpu
def test_a_block_may_ask_for_more_than_48_kib_of_shared_memory(write: Callable[..., str]) -> None:
    variant = Variant(write("tell.cu", TELL), (("SHARED", 16000),))
    out = torch.full((13,), torch.nan, device="cuda")
    launch(variant, (1,), (1,), 1, out, 0.5, 2, None, 3.0, out, shared_bytes=64000)
    assert out[2] == 0.5


@pytest.mark.gpu
def test_it_runs_on_torchs_current_stream(add: Variant) -> None:
    load([add])
    x = torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        x.fill_(1)
        y = add_to(add, x)  # would see 0 on another stream
    side.synchronize()
    assert (y == 3).all()


@pytest.mark.gpu
def test_it_is_captured_in_a_graph(add: Variant) -> None:
    load([add])
    x = torch.zeros(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = add_to(add, add_to(add, x, 1.0), 10.0)
    for value in (5, 7):
        x.fill_(value)
        graph.replay()
        assert (y == value + 22).all()


@pytest.mark.gpu
def test_loading_inside_a_capture_is_refused(add: Variant) -> None:
    x = torch.zeros(10, device="cuda")
    words = f"{add.source}.*before a CUDA graph is captured"
    with pytest.raises(KernelError, match=words), torch.cuda.graph(torch.cuda.CUDAGraph()):
        add_to(add, x)
    assert (add_to(add, x) == 2).all()


@pytest.mark.gpu
def test_a_thread_that_has_not_met_the_card_can_launch(add: Variant) -> None:
    x = torch.zeros(10, device="cuda")
    y = add_to(add, x)
    with ThreadPoolExecutor() as another:
        another.submit(launch, add, (1,), (256,), x, y, 10, 4.0).result()
    assert (y == 8).all()


@pytest.mark.gpu
def test_threads_do_not_mix_their_arguments(add: Variant) -> None:
    load([add])

    def work(value: int) -> list[int]:
        x = torch.full((100,), float(value), device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.synchronize()
            results = [(s, add_to(add, x, float(s))) for s in range(200)]
            torch.cuda.current_stream().synchronize()
        return [s for s, y in results if not (y == value + 2 * s).all()]

    with ThreadPoolExecutor() as others:
        assert list(others.map(work, (1000, 2000, 3000))) == [[], [], []]


@pytest.mark.gpu
def test_wrong_calls_are_refused_before_anything_runs(add: Variant) -> None:
    x, y = torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8, device="cuda")
    with pytest.raises(
        TypeError, match=r"takes 4 arguments of \[8, 8, 4, 4\] bytes, got 3: \(8, 8\), \(8, 8\), 64"
    ):
        launch(add, (1,), (64,), x, y, 64)
    with pytest.raises(ValueError, match=r"argument 0, \(8, 8\) with strides \(1, 8\), is not contiguous"):
        launch(add, (1,), (64,), x.t(), y, 64, 1.0)
    with pytest.raises(ValueError, match=r"argument 1, \(8, 8\).* is on cpu, not on cuda:0"):
        launch(add, (1,), (64,), x, y.cpu(), 64, 1.0)
    launch(add, (1,), (64,), Strided(x.t()), y, 64, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        launch(add, (1,), (64,), x, y, 2**31, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        launch(add, (1,), (64,), x, y, 64.5, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        launch(add, (1, 1, 1, 1), (64,), x, y, 64, 1.0)
    assert (y == 2).all()


@pytest.mark.gpu
def test_an_impossible_launch_names_kernel_sizes_and_shapes_and_the_next_one_works(add: Variant) -> None:
    x, y = torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8, device="cuda")
    words = rf"{add} *, grid \(1,\), block \(4096,\), .*\(8, 8\), \(8, 8\), 64, 1\.0: CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(KernelError, match=words):
        launch(add, (1,), (4096,), x, y, 64, 1.0)
    with pytest.raises(KernelError, match="900000 bytes shared"):
        launch(add, (1,), (64,), x, y, 64, 1.0, shared_bytes=900000)
    launch(add, (1,), (64,), x, y, 64, 1.0)
    assert (y == 2).all()


@pytest.mark.gpu
@pytest.mark.parametrize("blocking", ["0", "1"], ids=["found at a later call", "CUDA_LAUNCH_BLOCKING"])
def test_a_kernel_that_crashes_is_named_and_the_process_can_say_so(
    write: Callable[..., str], blocking: str
) -> None:
    write("crash.cu", 'extern "C" __global__ void crash(float* x, int n) { x[n * 1000000000000ll] = 1; }')
    code = f"""
from pathlib import Path
import torch
from engine.jit import *
from engine.jit import sources
sources.KERNELS = Path({str(sources.KERNELS)!r}); set_cache_folder({str(jit_compile.cache_folder())!r})
x = torch.zeros(3, 5, device="cuda")
for call in (lambda: (launch(Variant("crash"), (2,), (32,), x, 7), synchronize()),
             lambda: launch(Variant("crash"), (4,), (32,), x, 0)):
    try: call()
    except KernelError as error: print("KernelError", error)
print("still here")
"""
    first, second, last = run(code, CUDA_LAUNCH_BLOCKING=blocking).splitlines()
    assert "llegal" in first or "ILLEGAL" in first
    assert "crash, grid (2,), block (32,)" in first
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in second
    assert "crash, grid (4,), block (32,), 0 bytes shared, arguments (3, 5), 0" in second
    assert last == "still here"


@pytest.mark.gpu
def test_a_loaded_kernel_needs_no_source_any_more(add: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    load([add])
    monkeypatch.setattr(jit_compile, "_compile", None)
    monkeypatch.setattr(jit_compile, "_read", None)
    load([add])
    assert (add_to(add, torch.zeros(3, device="cuda")) == 2).all()
    synchronize()
    assert current_arch() in {"75", "80", "86", "87", "89", "90a", "100a", "103a", "110a", "120a", "121a"}


@pytest.mark.gpu
def test_each_card_has_its_own_copy(add: Variant) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two graphics cards")
    for index in (1, 0):
        with torch.cuda.device(index):
            assert (add_to(add, torch.zeros(10, device=f"cuda:{index}")) == 2).all()
    with pytest.raises(ValueError, match="is on cuda:1, not on cuda:0"):
        add_to(add, torch.zeros(10, device="cuda:1"))
