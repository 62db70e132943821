"""One operation, one name: its kernel, its wrapper, its meaning and its test are found by it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def names(folder: str, pattern: str) -> set[str]:
    """Stems before the first dot of the files in `folder` that match; private files left out."""
    found = {file.name.split(".")[0] for file in (ROOT / folder).glob(pattern)}
    return {name for name in found if not name.startswith("_")}


def test_every_kernel_has_a_wrapper_a_meaning_and_a_test():
    kernels = names("kernels_cu", "*.cu")
    tested = {name.removeprefix("test_") for name in names("tests/kernels", "test_*.py")}
    assert kernels <= names("engine/kernels", "*.py")
    assert kernels <= names("engine/reference", "*.py")
    assert kernels <= tested


def test_a_kernels_file_is_named_operation_plan_cu():
    for file in (ROOT / "kernels_cu").glob("*.cu"):
        assert len(file.name.split(".")) == 3, f"{file.name} should be <operation>.<plan>.cu"


def test_every_wrapper_has_a_meaning():
    assert names("engine/kernels", "*.py") <= names("engine/reference", "*.py")
