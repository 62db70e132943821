"""The `.venv`: made, filled by pip from pinned versions, healed after a kill, and stamped when complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from installer.machine import Build
from installer.report import Report, StopError, megabytes

STAMP = "tonfa-installed.json"  # in .venv; written last, so its presence says that everything is there
PYTORCH_INDEX = "https://download.pytorch.org/whl/"
LARGE_DOWNLOAD = 5_000_000  # bytes; smaller ones are not worth a line

# Imported once after an installation: a package that was cut short shows itself here and not in the first picture.
MUST_IMPORT = ("numpy", "torch", "safetensors", "PIL", "psutil", "tokenizers", "platformdirs", "PySide6.QtCore")


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
    done = subprocess.run(command, capture_output=True, text=True, pass_fds=_inherit(lock), check=False)
    report.note(done.stdout + done.stderr)
    if done.returncode or not works(venv):
        raise explain(done.stdout + done.stderr, "The Python environment could not be made.", report.log)


def _inherit(lock: int) -> tuple[int, ...]:
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


# ------------------------------------------------------------------------------------------------------------ pip


class Pip:
    """Runs the environment's pip as the person configured it (indexes, proxy, certificates); shows progress."""

    def __init__(self, root: Path, report: Report, lock: int) -> None:
        self._root = root
        self._python = python_of(root / ".venv")
        self._report = report
        self._lock = lock
        self._progress = False  # pip 24.1 and newer say how far a download is
        # pip unpacks below TMPDIR, and /tmp is often small. Where to install is ours to say, not the settings'.
        temporary = root / ".build" / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        dropped = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME"}
        self._environment = {key: value for key, value in os.environ.items() if key not in dropped}
        self._environment |= {"TMPDIR": str(temporary), "TEMP": str(temporary), "PYTHONUNBUFFERED": "1"}
        self._environment |= {
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "PIP_NO_PYTHON_VERSION_WARNING": "1",
        }

    def update_itself(self) -> None:
        """The pinned pip and setuptools: Debian's pip cannot resume a download, its setuptools cannot build us."""
        self.install("pip", "setuptools")
        said = self._run_quietly("--version")
        version = re.search(r"pip (\d+)\.(\d+)", said)
        self._progress = version is not None and (int(version[1]), int(version[2])) >= (24, 1)

    def offered_torch(self, index: str = "") -> list[str]:
        """The versions of torch that an index has for this Python; [] also when it cannot be reached."""
        where = ["--index-url", index] if index else []
        said = self._run_quietly("index", "versions", "torch", "--timeout", "8", "--retries", "1", *where)
        return parse_versions(said)

    def install(self, *words: str) -> None:
        """Install within the constraints. Raises StopError with the reason in a person's words."""
        before = self._report.log.stat().st_size
        command = ["install", "--upgrade-strategy", "only-if-needed", "-c", "installer/constraints.txt", *words]
        if self._progress:
            command += ["--progress-bar", "raw"]
        if self._run(command):
            with self._report.log.open("rb") as log:
                log.seek(before)
                said = log.read().decode(errors="replace")
            raise explain(said, "The packages could not be installed.", self._report.log)

    def _popen(self, words: list[str], errors: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self._python), "-m", "pip", *words],
            cwd=self._root,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            errors="replace",
            pass_fds=_inherit(self._lock),
        )

    def _run_quietly(self, *words: str) -> str:
        process = self._popen(list(words), subprocess.PIPE)
        said, errors = process.communicate()
        self._report.note(f"pip {' '.join(words)}: {said[:2000]}{errors[:4000]}")
        return said

    def _run(self, words: list[str]) -> int:
        self._report.note("pip " + " ".join(words))
        process = self._popen(words, subprocess.STDOUT)
        assert process.stdout is not None
        file = ""
        for line in process.stdout:
            line = line.strip()
            if progress := re.fullmatch(r"Progress (\d+) of (\d+)", line):
                done, total = int(progress[1]), int(progress[2])
                if total >= LARGE_DOWNLOAD:
                    self._report.moving(f"{file}: {megabytes(done)} of {megabytes(total)}")
                continue
            self._report.note(line)
            if download := re.match(r"Downloading (?:\S*/)?(\S+?)-(\d[^-]*)-\S+ \(([\d.]+) ([kMG])B\)", line):
                file = f"{download[1]} {download[2]}"
                if float(download[3]) * {"k": 1e3, "M": 1e6, "G": 1e9}[download[4]] >= LARGE_DOWNLOAD:
                    self._report.say(f"Downloading {file}, {download[3]} {download[4]}B")
            elif line.startswith("Installing collected packages:"):
                count = line.count(",") + 1
                self._report.say(f"Unpacking {count} packages" if count > 1 else "Unpacking it")
        return process.wait()


def parse_versions(said: str) -> list[str]:
    """The versions in what `pip index versions` prints."""
    found = re.search(r"^Available versions: (.+)$", said, re.MULTILINE)
    return found[1].split(", ") if found else []


# ---------------------------------------------------------------------------------------------------------- torch


@dataclass(frozen=True)
class TorchSource:
    """One place to take torch from: a requirement and an index ("" = the configured ones)."""

    requirement: str
    index: str = ""
    large: bool = False  # it may bring gigabytes of CUDA that this computer does not need


def pinned_torch(constraints: str) -> str:
    """The version of torch in the text of the constraints."""
    found = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    if not found:
        raise ValueError("installer/constraints.txt does not pin torch")
    return found[1]


def torch_sources(
    build: str, version: str, offers: Callable[[str], list[str]], system: str, processor: str
) -> list[TorchSource]:
    """Where to take torch from, best first. `offers(index)` names the versions that an index has ("" = configured).

    The registry's build for Linux on x86-64 is the CUDA one (`===` takes exactly that, even where a CPU build lies
    in a configured folder of wheels); elsewhere it is the CPU one. PyTorch's own indexes have both.
    """
    registry_has_cuda = system.startswith("linux") and processor in ("x86_64", "AMD64")
    anything = TorchSource(f"torch=={version}")
    if build == "cuda":
        if registry_has_cuda:
            return [TorchSource(f"torch==={version}"), anything]
        return [TorchSource(f"torch=={version}+cu130", PYTORCH_INDEX + "cu130"), anything]
    if not registry_has_cuda:
        return [anything]
    cpu = f"{version}+cpu"
    if cpu in offers(""):
        return [TorchSource(f"torch=={cpu}")]
    if cpu in offers(PYTORCH_INDEX + "cpu"):
        return [TorchSource(f"torch=={cpu}", PYTORCH_INDEX + "cpu")]
    return [TorchSource(f"torch=={version}", large=True)]


def install_torch(pip: Pip, sources: list[TorchSource], report: Report) -> None:
    """Torch alone, without what it needs: that comes with the rest, from the ordinary indexes."""
    for position, source in enumerate(sources):
        where = f" from {source.index}" if source.index else ""
        report.note(f"torch: {source.requirement}{where}")
        try:
            return pip.install(
                "--no-deps", source.requirement, *(["--index-url", source.index] if source.index else [])
            )
        except StopError as stop:
            if position == len(sources) - 1:
                raise
            report.say(f"{stop.what} Trying another way.")


def check_imports(venv: Path, build: Build, report: Report) -> None:
    """The packages that cannot be done without load; a CUDA build is one."""
    code = f"import {', '.join(MUST_IMPORT)}; print(torch.__version__, torch.version.cuda)"
    done = subprocess.run([str(python_of(venv)), "-c", code], capture_output=True, text=True, check=False)
    report.note(done.stdout + done.stderr)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["Python ended without a word"])[-1]
        raise StopError(
            f"A package does not work after the installation: {last}",
            f"Delete the folder {venv}, then run this again.",
        )
    version, cuda = done.stdout.split()
    if build.kind == "cuda" and cuda == "None":
        report.say(f"PyTorch {version} is a build for the processor; --torch-index names a place with another.")


# ------------------------------------------------------------------------------------------------- what went wrong

_REASONS = (
    (r"No space left on device|Errno 28|not enough space on the disk", "The disk is full.", "Make some space"),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "The package server's certificate is not trusted here (a proxy or a wrong clock can be the reason).",
        "Set PIP_CERT to your network's certificate file, or set the clock",
    ),
    (
        r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|getaddrinfo failed|ProxyError"
        r"|ConnectTimeout|Connection refused|Network is unreachable|Read timed out|Connection reset|IncompleteRead",
        "The packages could not be downloaded: the package server cannot be reached.",
        "Check the network connection (and the proxy's settings)",
    ),
    (r"Permission denied|Errno 13|Read-only file system", "A file may not be written.", "Make the folder writable"),
)


def explain(said: str, what: str, log: Path) -> StopError:
    """Turn pip's words into one sentence and one next step; the log has the rest."""
    for pattern, reason, todo in _REASONS:
        if re.search(pattern, said):
            return StopError(reason, f"{todo}, then run this again: it goes on where it stopped. Details: {log}")
    # pip 23 calls a pinned version that it cannot find a conflict with the constraint.
    if missing := re.search(r"No matching distribution found for (\S+)|requested \(constraint\) (\S+)", said):
        return StopError(
            f"No package server has {missing[1] or missing[2]} for Python {sys.version_info.major}.{sys.version_info.minor}.",
            f"Use Python 3.11, 3.12 or 3.13, or check pip's configuration. Details: {log}",
        )
    return StopError(what, f"Run this again; if it stops at the same place, the reason is in {log}")
