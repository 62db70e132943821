"""Small kernels of a test's own, in a folder of its own, with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.jit import Variant, compile, sources

ADD = """
#include "common/what.cuh"
extern "C" __global__ void __launch_bounds__(256) NAME(const float* x, float* y, int n, float s) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + what(s);
}
"""
WHAT = "__device__ float what(float s) { return s * TIMES; }"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a file among the kernels: write("add.cu", text). Its kernels and their cache are this test's own."""
    monkeypatch.setattr(sources, "KERNELS", tmp_path / "kernels_cu")
    monkeypatch.setattr(compile, "_folder", tmp_path / "cache")
    monkeypatch.setattr(compile, "_unwritten", {})

    def write(name: str, text: str) -> str:
        file = tmp_path / "kernels_cu" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return name.removesuffix(".cu")

    return write


@pytest.fixture
def add(write: Callable[..., str], request: pytest.FixtureRequest) -> Variant:
    """y = x + 2 s. Its name is the test's own, so that what one test loaded is not another's."""
    name = f"add_{abs(hash(request.node.nodeid)):x}"
    write("common/what.cuh", WHAT)
    return Variant(write(f"{name}.cu", ADD.replace("NAME", name)), (("TIMES", 2),))
