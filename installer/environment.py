"""The `.venv`: made by one installer at a time, healed after a kill, and stamped when complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from installer.report import Report, explain

STAMP = "tonfa-installed.json"  # in .venv; written last, so its presence says that everything is there

# ------------------------------------------------------------------------------------------------------ the lock


@contextlib.contextmanager
def only_one(lock: Path, report: Report) -> Iterator[int]:
    """Hold `lock`; a second installer in the same folder waits here. Yields the lock's file descriptor.

    On POSIX the processes that write into .venv inherit the descriptor and with it the lock: if the installer is
    killed, the next one waits until an orphaned pip has ended too.
    """
    with lock.open("w") as file:
        told = False
        while not _try_lock(file.fileno()):
            if not told:
                report.say("Another installer is at work in this folder; waiting for it to end.")
                told = True
            time.sleep(0.5)
        yield file.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------ the stamp


@dataclass(frozen=True)
class Wanted:
    """What an environment is made for. Two equal values need the same packages."""

    build: str  # "cpu" or "cuda"
    torch_index: str  # "" = chosen by the installer
    tests: bool
    digest: str  # of pyproject.toml, the constraints, and where the folder is (an editable install names its path)


def digest(root: Path) -> str:
    content = hashlib.sha256(str(root).encode())
    for file in (root / "pyproject.toml", root / "installer" / "constraints.txt"):
        content.update(file.read_bytes())
    return content.hexdigest()


def read_stamp(venv: Path) -> Wanted | None:
    """What the environment was completed for; None if it is not complete."""
    try:
        content = json.loads((venv / STAMP).read_text(encoding="utf-8"))
        return Wanted(**content)
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(venv: Path, wanted: Wanted) -> None:
    temporary = venv / (STAMP + ".part")
    temporary.write_text(json.dumps(asdict(wanted), indent=1), encoding="utf-8")
    os.replace(temporary, venv / STAMP)


def satisfies(have: Wanted | None, wanted: Wanted) -> bool:
    """An environment with the tests' packages also serves without them."""
    if have is None:
        return False
    same = (have.build, have.torch_index, have.digest) == (wanted.build, wanted.torch_index, wanted.digest)
    return same and have.tests >= wanted.tests


# ------------------------------------------------------------------------------------------------------- the venv


def python_of(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def works(venv: Path) -> bool:
    """Whether the environment's Python starts, is new enough, and has a whole pip of its own.

    Of its own: an environment without pyvenv.cfg starts too, as the system's Python with the system's pip.
    """
    code = (
        "import sys, pip; from pip._internal.cli import main; print(sys.prefix, *sys.version_info[:2], sep='\\n')"
    )
    try:
        done = subprocess.run(
            [str(python_of(venv)), "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
        prefix, major, minor = done.stdout.strip().splitlines()
        return Path(prefix).samefile(venv) and (int(major), int(minor)) >= (3, 11) and not done.returncode
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False


def make_venv(venv: Path, report: Report, lock: int) -> None:
    """Make `.venv`, or keep the one that is there: whole, or cut short and healed."""
    if works(venv):
        for name in heal(venv):
            report.note(f"was cut short, comes again: {name}")
        return
    if venv.is_symlink() or venv.exists():
        report.say(f"The {venv.name} that is there does not work; making it again.")
        venv.unlink() if venv.is_symlink() else shutil.rmtree(venv)
    command = [sys.executable, "-m", "venv", str(venv)]
    done = subprocess.run(command, capture_output=True, text=True, pass_fds=inherit(lock), check=False)
    report.note(done.stdout + done.stderr)
    if done.returncode or not works(venv):
        raise explain(done.stdout + done.stderr, "The Python environment could not be made.", report.log)


def clean_environment() -> dict[str, str]:
    """The variables for the environment's Python, without those that make it look for modules elsewhere."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def inherit(lock: int) -> tuple[int, ...]:
    """What a process that writes into the environment inherits: the lock, see `only_one`."""
    return () if os.name == "nt" else (lock,)


def heal(venv: Path) -> list[str]:
    """Forget packages that pip did not finish, so that it installs them again; returns their names.

    pip writes a package's RECORD last and in one piece: metadata without it is a package cut short. Folders that
    begin with "~" are what it had put aside.
    """
    forgotten = []
    for packages in [*venv.glob("lib/python*/site-packages"), *venv.glob("Lib/site-packages")]:
        unfinished = [info for info in packages.glob("*.dist-info") if not (info / "RECORD").exists()]
        for folder in [*unfinished, *packages.glob("~*")]:
            shutil.rmtree(folder, ignore_errors=True)
            forgotten.append(folder.name)
    return forgotten


def size_of(folder: Path) -> int:
    """Bytes below `folder`; 0 if it is not there."""
    return sum(
        Path(where, name).lstat().st_size
        for where, _, names in os.walk(folder)
        for name in names
        if Path(where, name).exists()
    )
