#!/usr/bin/env python3
"""One command before a commit: format, lint, types, import arrows, tests.

    python check.py                 everything
    python check.py lint types      only these

Prints one line a step, what a failed step said, and a summary. Exit code 0 if all passed, 1 if not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"
STEPS = {
    "format": ["-m", "ruff", "format", "--check", "."],
    "lint": ["-m", "ruff", "check", "."],
    "types": ["-m", "mypy"],  # strict; pyproject.toml says which files
    "arrows": ["-c", LINT_IMPORTS],  # pyproject.toml has the contracts
    "tests": ["-m", "pytest", "-q", "-n", str(min(4, os.cpu_count() or 1)), "--dist", "worksteal"],
}


def run(step: str) -> bool:
    """Run one step with the environment's Python; its words are shown only if it fails."""
    python = str(VENV if VENV.exists() else sys.executable)
    environment = os.environ | {"QT_QPA_PLATFORM": "offscreen", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    print(f"{step:8}", end="", flush=True)
    done = subprocess.run(
        [python, *STEPS[step]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    words = done.stdout.strip().splitlines()
    print(
        f"{'passed' if done.returncode == 0 else 'FAILED'} {time.monotonic() - began:6.1f} s  {(words or [''])[-1]}"
    )
    if done.returncode:
        print(done.stdout)
    return done.returncode == 0


def main(chosen: list[str]) -> int:
    if unknown := [step for step in chosen if step not in STEPS]:
        print(f"There is no step {unknown[0]!r}; choose from {', '.join(STEPS)}.", file=sys.stderr)
        return 2
    failed = [step for step in chosen or STEPS if not run(step)]
    print(f"Not ready: {', '.join(failed)}." if failed else "All good.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
