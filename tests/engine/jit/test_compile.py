"""Compiling needs no card; the cache is never wrong, whatever happened to its files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import folders
from engine.jit import KernelError, Variant, compile, compile_cubin, compiled, kernels_version, prepare, sources

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each that NVRTC does."""
    made: list[str] = []
    really = compile._compile

    def counted(variant: Variant, arch: str, *rest: object) -> compile.Compiled:
        made.append(f"{variant} {arch}")
        return really(variant, arch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(compile, "_compile", counted)
    return made


def entries() -> list[Path]:
    return sorted(compile.cache_folder().iterdir())


def test_a_kernel_becomes_a_cubin_and_says_what_it_takes(add: Variant) -> None:
    one = compiled(add, "89")
    assert one.cubin.startswith(b"\x7fELF")
    assert one.cubin == compile_cubin(add, "89")
    assert 0 < one.registers <= 255
    assert one.spilled_bytes == one.shared_bytes == 0


def test_shared_memory_and_spills_are_read_from_the_log() -> None:
    log = "Used 40 registers, used 1 barriers, 4096 bytes smem\n 8 bytes spill stores, 24 bytes spill loads"
    one = compile.Compiled(b"", log)
    assert (one.registers, one.shared_bytes, one.spilled_bytes) == (40, 4096, 24)
    assert compile.Compiled(b"", "800 bytes stack frame, 0 bytes spill stores").spilled_bytes == 800


def test_the_second_time_it_comes_from_the_cache(add: Variant, compilations: list[str]) -> None:
    assert compiled(add, "89") == compiled(add, "89")
    assert len(compilations) == 1
    assert len(entries()) == 1


def test_what_decides_the_bytes_makes_another_entry(
    add: Variant, write: Callable[..., str], compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_cubin(add, "80")
    compile_cubin(add, "89")
    compile_cubin(Variant(add.source, (("TIMES", 3),)), "89")
    write("common/what.cuh", "__device__ float what(float s) { return s * TIMES + 1; }")
    compile_cubin(add, "89")
    write(f"{add.source}.cu", (sources.KERNELS / f"{add.source}.cu").read_text() + "// newer")
    compile_cubin(add, "89")
    monkeypatch.setattr(compile, "OPTIONS", (*compile.OPTIONS, "--use_fast_math"))
    compile_cubin(add, "89")
    monkeypatch.setattr(compile, "_nvrtc_version", lambda: "99.0")
    compile_cubin(add, "89")
    assert len(compilations) == len(entries()) == 7


def test_headers_of_headers_and_of_nvidia_count(write: Callable[..., str]) -> None:
    write("common/a.cuh", '#include "common/b.cuh"\n#include <cuda_fp16.h>')
    write("common/b.cuh", '  #  include "common/a.cuh"  // each other')
    _, headers = sources.source_of(Variant(write("k.cu", '#include "common/a.cuh"\n#include <nowhere.h>')))
    assert {"common/a.cuh", "common/b.cuh", "cuda_fp16.h", "cuda_fp16.hpp"} <= set(headers)
    assert "nowhere.h" not in headers


@pytest.mark.parametrize("left", [0, 5, 33, 100, -1], ids=lambda n: f"cut to {n}")
def test_a_truncated_entry_is_made_again(add: Variant, compilations: list[str], left: int) -> None:
    cubin = compile_cubin(add, "89")
    (entry,) = entries()
    entry.write_bytes(entry.read_bytes()[:left])
    assert compile_cubin(add, "89") == compile_cubin(add, "89") == cubin
    assert len(compilations) == 2


@pytest.mark.parametrize("where", [0, 31, 33, 60, 1000, -1], ids=lambda n: f"byte {n}")
def test_an_entry_with_a_flipped_bit_is_made_again(add: Variant, compilations: list[str], where: int) -> None:
    cubin = compile_cubin(add, "89")
    (entry,) = entries()
    content = bytearray(entry.read_bytes())
    content[where] ^= 4
    entry.write_bytes(content)
    assert compile_cubin(add, "89") == compile_cubin(add, "89") == cubin
    assert len(compilations) == 2


@pytest.mark.parametrize("arch", ["89", "90a"], ids=["another kernel", "another architecture"])
def test_the_entry_of_another_is_not_taken(add: Variant, compilations: list[str], arch: str) -> None:
    cubin = compile_cubin(add, "89")
    (entry,) = entries()
    compile_cubin(Variant(add.source, (("TIMES", 5 if arch == "89" else 2),)), arch)
    (other,) = set(entries()) - {entry}
    shutil.copyfile(other, entry)
    assert compile_cubin(add, "89") == cubin
    assert len(compilations) == 3


def test_a_folder_that_cannot_be_written_costs_only_the_next_start(
    add: Variant, compilations: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    compile.set_cache_folder(tmp_path / "file" / "kernels")
    assert compile_cubin(add, "89") == compile_cubin(add, "89")
    assert len(compilations) == 1


def test_a_full_disk_leaves_no_half_entry(
    add: Variant, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert compile_cubin(add, "89") == compile_cubin(add, "89")
    assert entries() == []
    assert len(compilations) == 1


def grow_old(file: Path, days: float) -> None:
    then = time.time() - days * compile.DAY_S
    os.utime(file, (then, then))


def test_what_nobody_read_for_months_goes_when_something_new_was_compiled(add: Variant) -> None:
    variants = [Variant(add.source, (("TIMES", n),)) for n in range(4)]
    list(prepare(variants[:3], "89"))
    read, *unread = entries()
    half = compile.cache_folder() / "new-of-a-killed-process.cubin"
    half.write_bytes(b"half")
    foreign = compile.cache_folder() / "letter.txt"
    foreign.write_text("not ours")
    for file in (read, *unread, half, foreign):
        grow_old(file, 91)
    assert compile._read(read.stem) is not None
    list(prepare([], "89"))
    assert set(unread) < set(entries()), "a start with all in the cache looks no further"
    list(prepare(variants[3:], "89"))
    assert {read, foreign} < set(entries())
    assert len(entries()) == 3


def test_an_entry_is_as_old_as_its_last_use(add: Variant, compilations: list[str]) -> None:
    compile_cubin(add, "89")
    (entry,) = entries()
    for days in (89, -300):  # a clock that was wrong, too
        grow_old(entry, days)
        compile_cubin(add, "89")
        assert abs(compile._age_s(entry)) < 60
    grow_old(entry, 0.5)
    before = entry.stat().st_mtime
    compile_cubin(add, "89")
    assert entry.stat().st_mtime == before, "not written at every start"
    assert len(compilations) == 1


def test_an_old_entry_that_another_program_removed_or_holds_is_no_error(
    add: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_cubin(add, "89")
    (entry,) = entries()
    grow_old(entry, 91)

    def held(_: Path) -> None:
        raise PermissionError(13, "The file is used by another process")

    monkeypatch.setattr(Path, "unlink", held)
    compile._forget_old()
    monkeypatch.undo()
    monkeypatch.setattr(Path, "glob", lambda *_: iter([entry.with_name("gone.cubin")]))
    compile._forget_old()
    assert entry.exists()


def test_processes_that_compile_at_once_leave_whole_entries(add: Variant) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom engine.jit import *\nfrom engine.jit import sources\n"
        f"sources.KERNELS = Path({str(sources.KERNELS)!r})\nset_cache_folder({str(compile.cache_folder())!r})\n"
        f"variants = [Variant({add.source!r}, (('TIMES', n),)) for n in range(6)]\n"
        "for _ in prepare(variants, '89'): pass\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [one.wait(120) for one in running] == [0, 0, 0]
    assert len(entries()) == 6
    assert all(compile._read(entry.stem) for entry in entries())


def test_an_error_names_kernel_variant_architecture_and_line(write: Callable[..., str]) -> None:
    source = write("bad.w4a4.cu", 'extern "C" __global__ void bad(int* x) {\n    *x = TILE + missing;\n}')
    with pytest.raises(KernelError, match=r"(?s)bad\.w4a4 TILE=8 .*sm_90a.*bad\.w4a4\.cu\(2\): error.*missing"):
        compile_cubin(Variant(source, (("TILE", 8),)), "90a")
    with pytest.raises(KernelError, match=r"absent\.cu"):
        compile_cubin(Variant("absent"), "89")


def test_a_machine_without_nvrtc_is_told_so(add: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def absent() -> None:
        raise RuntimeError("Failure finding libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", absent)
    monkeypatch.setattr(compile, "_nvrtc_version", compile._nvrtc_version.__wrapped__)
    with pytest.raises(KernelError, match=r"is not installed: .*libnvrtc"):
        compile_cubin(add, "89")


def test_preparing_tells_how_far_it_is_and_only_of_what_was_missing(add: Variant, compilations: list[str]) -> None:
    variants = [Variant(add.source, (("TIMES", n),)) for n in range(4)]
    compile_cubin(variants[2], "86")
    assert list(prepare(variants + variants, "86")) == [(1, 3), (2, 3), (3, 3)]
    assert list(prepare(variants, "86")) == []
    assert len(compilations) == 4


def test_preparing_can_be_stopped_in_the_middle(add: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def slow(variant: Variant, *_: object) -> compile.Compiled:
        time.sleep(0.02)
        made.append(variant)
        return compile.Compiled(b"cubin", "")

    monkeypatch.setattr(compile, "_compile", slow)
    monkeypatch.setattr(compile, "MOST_THREADS", 2)
    variants = [Variant(add.source, (("TIMES", n),)) for n in range(40)]
    progress = prepare(variants, "86")
    assert next(progress) == (1, 40)
    progress.close()
    stopped_after = len(made)
    time.sleep(0.1)
    assert stopped_after == len(made) < 10
    assert len(list(prepare(variants, "86"))) == 40 - stopped_after


def test_preparing_stops_at_a_kernel_that_does_not_compile(write: Callable[..., str]) -> None:
    variants = [Variant(write("bad.cu", "int x = MISSING;"), (("N", n),)) for n in range(3)]
    with pytest.raises(KernelError, match="MISSING"):
        list(prepare(variants, "89"))


def test_the_version_of_the_kernels_follows_their_text(add: Variant, write: Callable[..., str]) -> None:
    before = kernels_version()
    assert before == kernels_version()
    write("common/what.cuh", "// other")
    assert kernels_version() != before


def test_the_cache_folder_is_the_environments_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile, "_folder", None)
    monkeypatch.setenv("TONFA_KERNEL_CACHE", str(tmp_path))
    assert compile.cache_folder() == tmp_path
    monkeypatch.delenv("TONFA_KERNEL_CACHE")
    assert compile.cache_folder() == folders.cache() / "kernels"
    monkeypatch.delenv("TONFA_HOME")
    assert compile.cache_folder() == folders.cache() / "kernels"


@pytest.mark.parametrize(
    ("capability", "arch"), [((7, 5), "75"), ((8, 9), "89"), ((9, 0), "90a"), ((12, 0), "120a"), ((12, 1), "121a")]
)
def test_a_card_has_one_architecture(capability: tuple[int, int], arch: str) -> None:
    assert sources.arch_of(*capability) == arch
