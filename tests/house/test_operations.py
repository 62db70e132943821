"""One operation, one name: its kernel, its wrapper, its meaning and its test are found by it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Number formats that operations share; no operations themselves. Their tests are in tests/engine/reference.
SHARED_MEANINGS = {"e2m1"}


def names(folder: str, pattern: str) -> set[str]:
    """Stems before the first dot of the files in `folder` that match; private files left out."""
    found = {file.name.split(".")[0] for file in (ROOT / folder).glob(pattern)}
    return {name for name in found if not name.startswith("_")}


OPERATIONS = sorted(names("engine/reference", "*.py") - SHARED_MEANINGS)


def test_the_operations_are_found():
    assert {"quantize_act", "svdq_linear", "linear_w4a16", "modulation_w4a16"} <= set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_meaning_is_a_function_of_its_name_or_one_a_plan_and_a_test_calls_each(operation):
    meaning = ast.parse((ROOT / "engine" / "reference" / f"{operation}.py").read_text("utf-8"))
    public = {node.name for node in meaning.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    meanings = {name for name in public if name == operation or name.startswith(f"{operation}_")}
    assert meanings
    test = ast.parse((ROOT / "tests" / "kernels" / f"test_{operation}.py").read_text("utf-8"))
    called = {node.func for node in ast.walk(test) if isinstance(node, ast.Call)}
    assert meanings <= {ast.unparse(function).rpartition(".")[2] for function in called}


def test_every_test_of_a_kernel_is_one_of_an_operation():
    tested = {name.removeprefix("test_") for name in names("tests/kernels", "test_*.py")}
    assert tested <= set(OPERATIONS)


def test_every_number_format_that_is_shared_has_a_test():
    assert {f"test_{name}" for name in SHARED_MEANINGS} <= names("tests/engine/reference", "test_*.py")


def test_every_kernel_and_every_wrapper_is_one_of_an_operation():
    kernels, wrappers = names("kernels_cu", "*.cu"), names("engine/kernels", "*.py")
    assert wrappers <= set(OPERATIONS)
    assert kernels <= wrappers


def test_a_kernels_file_is_named_by_its_operation_and_where_there_are_several_by_its_plan():
    files = [file.name for file in (ROOT / "kernels_cu").glob("*.cu")]
    for name in files:
        operation, *plan = name.removesuffix(".cu").split(".")
        assert len(plan) <= 1, f"{name} should be <operation>.cu or <operation>.<plan>.cu"
        assert plan or sum(other.startswith(f"{operation}.") for other in files) == 1, (
            f"{name} should name its plan"
        )
