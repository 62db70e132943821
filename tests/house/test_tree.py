"""What a clone brings: a size people can download, nothing that belongs to one machine, what README promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST_TREE = 54 * 2**20  # bytes
NOT_TRACKED = {".git", ".venv", ".build", "build", "dist", "__pycache__", ".hypothesis"}
LAUNCHERS = {"Tonfa.desktop", "tonfa.sh", "Tonfa.bat"}  # written by the installer, not tracked either
# Words of paths that exist on one machine only; put together here, so that this file does not find itself.
PLACES = ["work", "root", "opt/wheels", "opt/pypi", "home/ann"]
MACHINE_PATHS = re.compile(
    "|".join(f"/{place}/" for place in [*PLACES, r"home/\w+"]).encode() + rb"|[A-Z]:\\+Users\\+\w"
)


def tracked_files() -> list[Path]:
    """What git tracks; in a copy without git every file that is not made on the machine."""
    if shutil.which("git") and (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
        if done.returncode == 0:
            files = [ROOT / os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
            return [file for file in files if file.is_file()]
    found: list[Path] = []
    for where, folders, names in os.walk(ROOT):
        folders[:] = [
            name for name in folders if name not in NOT_TRACKED and not name.endswith(("_cache", ".egg-info"))
        ]
        found += [Path(where, name) for name in names if name not in LAUNCHERS]
    return found


def test_the_tree_is_at_most_54_mib():
    sizes = sorted(((file.stat().st_size, file) for file in tracked_files()), reverse=True)
    total = sum(size for size, _ in sizes)
    largest = ", ".join(f"{file.relative_to(ROOT)} {size / 2**20:.1f}" for size, file in sizes[:5])
    assert total <= LARGEST_TREE, f"{total / 2**20:.1f} MiB; the largest: {largest}"


def test_no_file_names_a_place_on_somebodys_machine():
    for file in tracked_files():
        found = MACHINE_PATHS.search(file.read_bytes())
        assert found is None, f"{file.relative_to(ROOT)} has {found[0]!r} at byte {found.start()}"


@pytest.mark.parametrize("place", PLACES)
def test_such_places_would_be_found(place):
    assert MACHINE_PATHS.search(f"see /{place}/x".encode())


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python3 installer/install.py --run" in readme
    assert "python3 installer/install.py --test" in readme
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().splitlines()[-1].removeprefix("exec ") == "python3 installer/install.py --test"


def test_every_dependency_is_pinned_and_named_in_notice():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["tests"], *extras["gpu"], *extras["recipe"]]
    names = {plain(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in wanted} - {"tonfa"}
    pins = (ROOT / "installer" / "constraints.txt").read_text().splitlines()
    assert names <= {plain(line.split("==")[0]) for line in pins if "==" in line}
    notice = plain((ROOT / "NOTICE").read_text(encoding="utf-8"))
    assert [name for name in sorted(names) if name not in notice] == []


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
