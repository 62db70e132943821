"""Every kernel compiles for every architecture it runs on, without a card: no spills, within its limits, and with
the instruction that makes its plan fast.

What was compiled once is kept in .build/kernels; only what a change touches is compiled again. An architecture that
has the instructions of another one compiles one variant of each source; with TONFA_EVERY_VARIANT=1 in the
environment it compiles all of them, too, which takes half as long again.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

from engine.jit import ARCHITECTURES, Variant, compile, compiled
from engine.jit.sources import KERNELS, source_of

ROOT = Path(__file__).resolve().parents[3]
KEPT_ENTRIES = 3000
EVERY_VARIANT = os.environ.get("TONFA_EVERY_VARIANT") == "1"
# The first of a family compiles every variant. The others have the same instructions and get mostly the same
# machine code.
FAMILIES = (("75",), ("80", "86", "87"), ("89",), ("90a",), ("100a", "103a", "110a"), ("120a", "121a"))
KIB = 1024
MOST_SHARED = {  # bytes a block may have
    "75": 64 * KIB, "80": 163 * KIB, "86": 99 * KIB, "87": 163 * KIB, "89": 99 * KIB, "90a": 227 * KIB,
    "100a": 227 * KIB, "103a": 227 * KIB, "110a": 227 * KIB, "120a": 99 * KIB, "121a": 99 * KIB,
}  # fmt: skip
LIMITS = re.compile(r"^// Limits: *(\d+) registers.*?(\d+) (bytes|KiB)(?: of)? shared memory", re.MULTILINE)
LOW_RANK = 32  # HMMA, or twice as many half as large on sm_75, that low-rank products have at most: up and down
S4 = {"75": (r"IMMA\.8832\.SIGN4\.S4", 128)} | dict.fromkeys(
    ("80", "86", "87", "89"), (r"IMMA\.16864\.SIGN4\.S4", 32)
)
HMMA = {"75": (r"HMMA\.1688\.F32", 2 * LOW_RANK + 1)} | dict.fromkeys(
    ARCHITECTURES[1:], (r"HMMA\.16816\.F32", LOW_RANK + 1)
)
# source: architecture: what its machine code must contain, SIGN as its activations have it, and at least how often:
# a step over K of one warp, or more than the low-rank products have.
PROMISES: dict[str, dict[str, tuple[str, int]]] = {
    "svdq_linear.w4a4": S4,
    "svdq_linear.w4a8": dict.fromkeys(("89", "120a", "121a"), (r"QMMA\.\S*F32\.E4M3\.E4M3", 64)),
    "svdq_linear.w4a8_sm90": {"90a": (r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3", 4)},
    "svdq_linear.nvfp4": dict.fromkeys(("120a", "121a"), (r"OMMA\.\S*F32\.E2M1\.E2M1\.UE4M3\.4X", 32)),
    "svdq_linear.w4a16": HMMA,
    "linear_w4a16": HMMA,
    "attention_fp16": dict.fromkeys(ARCHITECTURES, (r"HMMA\.\d+\.F16", 80)),
}
SOURCES = sorted(file.name.removesuffix(".cu") for file in KERNELS.glob("*.cu"))


def wrapper(source: str) -> ModuleType:
    return importlib.import_module(f"engine.kernels.{source.partition('.')[0]}")


@cache
def launched(arch: str) -> list[Variant]:
    """Everything the wrappers can launch on an architecture."""
    operations = dict.fromkeys(source.partition(".")[0] for source in SOURCES)
    modules = [wrapper(name) for name in operations if find_spec(f"engine.kernels.{name}")]
    return list(dict.fromkeys(one for module in modules for one in getattr(module, "variants", nothing)(arch)))


def nothing(_: str) -> list[Variant]:
    return []


def chosen(arch: str) -> list[Variant]:
    variants = launched(arch)
    if EVERY_VARIANT or any(arch == family[0] for family in FAMILIES):
        return variants
    return list({variant.source: variant for variant in reversed(variants)}.values())


@pytest.fixture(scope="module", autouse=True)
def _kept() -> Iterator[None]:
    """A cache that outlives the run and does not grow for ever."""
    folder = ROOT / ".build" / "kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "_folder", folder)
        yield
        entries = sorted(folder.glob("*.cubin"), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in entries[KEPT_ENTRIES:]:
            entry.unlink(missing_ok=True)


def test_the_first_of_a_family_launches_whatever_the_others_do() -> None:
    assert [arch for family in FAMILIES for arch in family] == list(ARCHITECTURES)
    for first, *others in FAMILIES:
        assert all(set(launched(arch)) <= set(launched(first)) for arch in others)


def test_every_source_is_launched_somewhere() -> None:
    assert {variant.source for arch in ARCHITECTURES for variant in launched(arch)} == set(SOURCES)


def test_every_promise_is_about_a_source_and_is_kept_where_it_runs() -> None:
    assert set(PROMISES) <= set(SOURCES)
    for arch in ARCHITECTURES:
        sources = {variant.source for variant in launched(arch)}
        assert {source for source, promised in PROMISES.items() if arch in promised} <= sources, arch


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_states_its_limits_and_bounds_its_launch(source: str) -> None:
    text = (KERNELS / f"{source}.cu").read_text("utf-8")
    assert LIMITS.search(text), f'{source}.cu lacks a line "// Limits: 128 registers, 0 bytes of shared memory"'
    assert re.search(r"__launch_bounds__\(", text)


@pytest.mark.parametrize(
    ("arch", "variant"),
    [pytest.param(arch, variant, id=f"{arch}: {variant}") for arch in ARCHITECTURES for variant in chosen(arch)],
)
def test_it_compiles_without_spills_within_its_limits_and_keeps_its_promise(
    arch: str, variant: Variant, tmp_path: Path
) -> None:
    one = compiled(variant, arch)
    assert one.spilled_bytes == 0, one.log
    registers, shared, unit = LIMITS.findall((KERNELS / f"{variant.source}.cu").read_text("utf-8"))[0]
    assert one.registers <= int(registers)
    most = min(MOST_SHARED[member] for family in FAMILIES if arch in family for member in family)
    assert one.shared_bytes + dynamic_bytes(variant) <= min(int(shared) * (KIB if unit == "KiB" else 1), most)
    if promised := PROMISES.get(variant.source, {}).get(arch):
        instruction = promised[0].replace("SIGN", "U" if ("ACT_UNSIGNED", 1) in variant.defines else "S")
        found = len(re.findall(instruction, disassembled(one.cubin, tmp_path)))
        assert found >= promised[1], f"{found} of {promised[1]} {instruction}"


def dynamic_bytes(variant: Variant) -> int:
    """What its wrapper asks for at a launch. One whose source takes any must say it."""
    text, headers = source_of(variant)
    if not any("extern __shared__" in part for part in chain([text], headers.values())):
        return 0
    asked: int = wrapper(variant.source).shared_bytes(variant)
    return asked


def disassembled(cubin: bytes, folder: Path) -> str:
    from cuda import pathfinder

    (folder / "kernel.cubin").write_bytes(cubin)
    tool = pathfinder.find_nvidia_binary_utility("nvdisasm")
    assert tool, "pip install -e .[tests] brings nvdisasm"
    command = [tool, "--print-code", str(folder / "kernel.cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arch", ["75", "90a", "120a"])
def test_a_kernel_that_spills_would_be_seen(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """extern "C" __global__ void __launch_bounds__(1024) greedy(float* x) {
        float held[200];
        for (int i = 0; i < 200; i++) held[i] = x[threadIdx.x + i * 1024];
        __syncthreads();
        for (int i = 0; i < 200; i++) x[threadIdx.x + i * 1024] = held[i] * held[199 - i];
    }"""
    (tmp_path / "greedy.cu").write_text(text)
    monkeypatch.setattr("engine.jit.sources.KERNELS", tmp_path)
    assert compiled(Variant("greedy"), arch).spilled_bytes > 0


def test_the_machine_code_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.cu").write_text('extern "C" __global__ void plain(float* x, float s) { x[0] += s; }')
    monkeypatch.setattr("engine.jit.sources.KERNELS", tmp_path)
    code = disassembled(compiled(Variant("plain"), "90a").cubin, tmp_path)
    assert re.search(r"\bFADD\b", code)
    assert not any(re.search(words, code) for kept in PROMISES.values() for words, _ in kept.values())
