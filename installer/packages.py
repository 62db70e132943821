"""What pip installs into the `.venv`: its own runs, where torch comes from, and whether the result works."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from installer.environment import clean_environment, inherit, python_of
from installer.machine import Build
from installer.report import Report, StopError, explain, megabytes

PYTORCH_INDEX = "https://download.pytorch.org/whl/"
LARGE_DOWNLOAD = 5_000_000  # bytes; smaller ones are not worth a line

# Imported once after an installation: a package that was cut short shows itself here and not in the first picture.
MUST_IMPORT = ("numpy", "torch", "safetensors", "PIL", "psutil", "tokenizers", "platformdirs", "PySide6")


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
        dropped = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
        self._environment = {key: value for key, value in clean_environment().items() if key not in dropped}
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
            pass_fds=inherit(self._lock),
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
    again: bool = False  # take it even if a build of the same version is there
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
            words = ["--no-deps", source.requirement]
            words += ["--index-url", source.index] if source.index else []
            words += ["--force-reinstall"] if source.again else []
            return pip.install(*words)
        except StopError as stop:
            if position == len(sources) - 1:
                raise
            report.say(f"{stop.what} Trying another way.")


def check_imports(venv: Path, build: Build, report: Report) -> None:
    """The packages that cannot be done without load; a CUDA build is one."""
    code = f"import {', '.join(MUST_IMPORT)}; print(torch.__version__, torch.version.cuda)"
    command = [str(python_of(venv)), "-c", code]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
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
