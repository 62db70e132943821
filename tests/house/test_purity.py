"""What is imported where, in the text of the files and in a running process."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE = ("kernels", "layers", "models", "reference", "jit")  # run where nothing but torch is installed
ALLOWED = {"torch", "numpy", "safetensors", "cuda", "engine"}
HEAVY = {"torch", "transformers", "diffusers"}


def run(code: str) -> str:
    """Run `code` in a process of its own; returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(file: Path) -> set[str]:
    """The top-level names that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / "engine" / package).rglob("*.py"))


def modules_of(packages: tuple[str, ...]) -> list[str]:
    files = [file.relative_to(ROOT).with_suffix("") for package in packages for file in files_of(package)]
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


@pytest.mark.parametrize("package", PURE)
def test_the_mathematics_names_only_torch_numpy_safetensors_and_cuda(package):
    for file in files_of(package):
        foreign = imported_by(file) - ALLOWED - set(sys.stdlib_module_names)
        assert not foreign, f"{file.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def distributions_behind(*names: str) -> set[str]:
    """Those distributions and everything they require, by normalized name; extras left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]
    return found


def test_the_mathematics_loads_where_nothing_else_is_installed():
    allowed = distributions_behind("torch", "numpy", "safetensors", "cuda-python")
    blocked = sorted(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & allowed
        and module not in {"engine", "app"}
        and module.isidentifier()
    )
    assert {"PIL", "transformers", "diffusers", "PySide6", "psutil", "platformdirs"} <= set(blocked)
    modules = modules_of(PURE)
    assert "engine.models.flux" in modules
    run(
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )


def loaded_after(statement: str) -> set[str]:
    """The top-level modules in a process that ran `statement`."""
    printed = run(
        f"{statement}\nimport json, sys; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    )
    return set(json.loads(printed.splitlines()[-1]))


def test_the_front_door_opens_without_torch_or_qt():
    loaded = loaded_after("import engine")
    assert not loaded & (HEAVY | {"PySide6", "PIL", "tokenizers", "safetensors"})
    assert "numpy" in loaded


@pytest.mark.parametrize("module", ["host", "monitor", "folders", "requests", "events", "problems"])
def test_what_the_window_may_use_of_the_engine_loads_no_torch(module):
    assert not loaded_after(f"import engine.{module}") & HEAVY


def test_the_window_loads_no_torch():
    files = sorted((ROOT / "app").rglob("*.py"))
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    loaded = loaded_after(f"import {', '.join(module for module in modules if not module.endswith('__main__'))}")
    assert "PySide6" in loaded
    assert not loaded & HEAVY
