"""Measure what a launch costs on the CPU, what compiling every kernel costs, and loading them from the cache.

    python tests/measure/launch_time.py

Needs a card. Prints one Markdown table. Launch times are medians over bursts of 200 launches that the card follows
easily; nothing waits for it. The target is for `launch` with the arguments of a kernel, outside a CUDA graph.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.device import best_plan
from engine.jit import Variant, compiled, current_arch, launch, load, prepare, set_cache_folder, sources
from engine.kernels.quantize_act import quantize_act
from engine.kernels.svdq_linear import svdq_linear
from engine.layers.fused_linear import FusedLinear
from engine.models.flux import FluxConfig
from engine.models.random_flux import random_layer
from engine.reference.svdq_linear import Plain

BURST, BURSTS = 200, 100
EMPTY = 'extern "C" __global__ void {name}({parameters}) {{}}'
SHAPES = {  # name: tensors, ints, floats
    "no argument": (0, 0, 0),
    "4 tensors, 2 ints": (4, 2, 0),
    "8 tensors, 4 ints, 1 float": (8, 4, 1),
    "16 tensors, 8 ints, 2 floats": (16, 8, 2),
}
BF16 = ("H_BF16", 1)
TARGET_US = 5.0


def microseconds(call: Callable[[], object]) -> float:
    """Median time of one call on the CPU."""
    times = []
    for _ in range(BURSTS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(BURST):
            call()
        times.append((time.perf_counter() - began) / BURST)
    return statistics.median(times[BURSTS // 10 :]) * 1e6


def raw(variant: Variant) -> Callable[[], object]:
    """cuLaunchKernel by ctypes with everything prepared: what no launch from Python gets below."""
    from cuda.bindings import driver

    _, module = driver.cuModuleLoadData(compiled(variant, current_arch()).cubin)
    _, function = driver.cuModuleGetFunction(module, variant.entry.encode())
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    stream = torch.cuda.current_stream().cuda_stream
    ints, pointer = [ctypes.c_uint(1)] * 6 + [ctypes.c_uint(0)], ctypes.c_void_p
    words = [pointer(int(function)), *ints, pointer(stream), pointer(), pointer()]
    return lambda: library.cuLaunchKernel(*words)


def launches(folder: Path) -> list[tuple[str, float]]:
    sources.KERNELS = folder
    x, rows = torch.zeros(16, device="cuda"), []
    rows.append(("torch: `x.add_(1)`", microseconds(lambda: x.add_(1))))
    rows.append(("torch: `torch.empty` of a small tensor", microseconds(lambda: torch.empty(16, device="cuda"))))
    for number, (what, (tensors, ints, floats)) in enumerate(SHAPES.items()):
        kinds = ["float* p"] * tensors + ["int i"] * ints + ["float f"] * floats
        name = f"empty{number}"
        parameters = ", ".join(f"{kind}{place}" for place, kind in enumerate(kinds))
        (folder / f"{name}.cu").write_text(EMPTY.format(name=name, parameters=parameters))
        variant, args = Variant(name, (("TILE", 128), BF16)), [x] * tensors + [1] * ints + [0.5] * floats
        if not number:
            rows.append(("ctypes: an empty kernel, all prepared", microseconds(raw(variant))))

        def call(variant: Variant = variant, args: list[torch.Tensor | int | float] = args) -> None:
            launch(variant, (1, 1), (32,), *args)

        call()
        rows.append((f"`launch`: {what}", microseconds(call)))
    return rows


def wrappers() -> list[tuple[str, float]]:
    """Whole calls: checks, memory for results, launch. 16 rows, 128 channels, so that the card is soon done."""
    major, minor = torch.cuda.get_device_capability()
    dtype = torch.bfloat16 if major >= 8 else torch.float16
    weights = random_layer("single_blocks.0.out", FluxConfig(num_attention_heads=1), torch.device("cuda"))
    linear = FusedLinear(weights, best_plan(10 * major + minor, "int4").plan, dtype, current_arch())
    x = torch.randn(16, linear.in_features, device="cuda", dtype=dtype)
    act, end = quantize_act(x, linear.target), Plain()
    calls: dict[str, Callable[[], object]] = {
        "`quantize_act`": lambda: quantize_act(x, linear.target),
        "`svdq_linear`": lambda: svdq_linear(act, linear.layout.linear, end),
    }
    return [(f"{name}, {linear.plan}, the whole call", microseconds(call)) for name, call in calls.items()]


def verdict(what: str, time_us: float) -> str:
    return "" if not what.startswith("`launch`") else "kept" if time_us <= TARGET_US else "missed"


def all_variants(arch: str) -> list[Variant]:
    """What the wrappers can launch on an architecture, with the h that a card of it uses."""
    operations = sorted({file.name.split(".")[0] for file in sources.KERNELS.glob("*.cu")})
    found = [
        variant
        for operation in operations
        for variant in importlib.import_module(f"engine.kernels.{operation}").variants(arch)
    ]
    unwanted = ("H_BF16", 0 if arch != "75" else 1)
    return [variant for variant in dict.fromkeys(found) if unwanted not in variant.defines]


def cached_start(folder: str) -> None:
    """In a process of its own: print seconds for reading, checking and loading what the cache has."""
    set_cache_folder(folder)
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    variants = all_variants(current_arch())
    began = time.perf_counter()
    load(variants)
    print(len(variants), time.perf_counter() - began)


def compilations(folder: str) -> list[tuple[str, str]]:
    set_cache_folder(folder)
    arch = current_arch()
    variants = all_variants(arch)
    began = time.perf_counter()
    for _ in prepare(variants, arch):
        pass
    elapsed = time.perf_counter() - began
    rows = [(f"compile {len(variants)} kernels for sm_{arch}, {os.cpu_count()} cores", f"{elapsed:.2f} s")]
    loads = []
    for _ in range(3):
        command = [sys.executable, __file__, "--cached-start", folder]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        loads.append(float(said[1]))
    rows.append(("load these from the cache, a process of its own", f"{statistics.median(loads) * 1e3:.0f} ms"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cached-start", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cached_start:
        cached_start(arguments.cached_start)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}\n")
    print(f"| what | time | target {TARGET_US:.0f} us |\n|---|---|---|")
    kernels = sources.KERNELS
    with tempfile.TemporaryDirectory() as folder:
        set_cache_folder(f"{folder}/cache")
        for what, time_us in launches(Path(folder)):
            print(f"| {what} | {time_us:.2f} us | {verdict(what, time_us)} |")
        sources.KERNELS = kernels
        for what, time_us in wrappers():
            print(f"| {what} | {time_us:.2f} us | |")
        for what, words in compilations(f"{folder}/cache"):
            print(f"| {what} | {words} | |")


if __name__ == "__main__":
    main()
