"""What this computer is: its NVIDIA driver, its screen, its free space, and which system packages it lacks."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from installer.report import Report, StopError, megabytes

CUDA_NEEDED = 13000  # what cuDriverGetVersion must say: torch's builds and our compiled kernels are CUDA 13
DRIVER_FOR_IT = "580"  # the first driver series with CUDA 13
OLDEST_CARD = 75  # compute capability 7.5 (GeForce GTX 16, RTX 20): CUDA 13 knows no older ones

# Peak disk use while installing with the test extras, downloads included, and a margin.
SPACE_NEEDED = {"cpu": 4 * 10**9, "cuda": 14 * 10**9}

# What Qt's window needs from the system: shared library -> Debian's package.
QT_LIBRARIES = {
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libOpenGL.so.0": "libopengl0",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libdbus-1.so.3": "libdbus-1-3",
    "libfontconfig.so.1": "libfontconfig1",
    "libfreetype.so.6": "libfreetype6",
    "libxkbcommon.so.0": "libxkbcommon0",
    "libxkbcommon-x11.so.0": "libxkbcommon-x11-0",
    "libxcb-cursor.so.0": "libxcb-cursor0",
    "libxcb-icccm.so.4": "libxcb-icccm4",
    "libxcb-image.so.0": "libxcb-image0",
    "libxcb-keysyms.so.1": "libxcb-keysyms1",
    "libxcb-randr.so.0": "libxcb-randr0",
    "libxcb-render-util.so.0": "libxcb-render-util0",
    "libxcb-shape.so.0": "libxcb-shape0",
    "libxcb-xfixes.so.0": "libxcb-xfixes0",
    "libxcb-xkb.so.1": "libxcb-xkb1",
    "libX11-xcb.so.1": "libx11-xcb1",
}


@dataclass(frozen=True)
class Card:
    """The first NVIDIA card, as its driver describes it."""

    name: str
    capability: int  # 90 = compute capability 9.0
    cuda: int  # the newest CUDA the driver speaks, 13000 = 13.0


@dataclass(frozen=True)
class Build:
    """Which build of torch suits this computer, and why, in a sentence."""

    kind: Literal["cpu", "cuda"]
    why: str


def ask_driver() -> Card | None:
    """The first card the NVIDIA driver offers, or None. Asks the driver itself: nvidia-smi may be absent."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return None
    version, count, major, minor = (ctypes.c_int() for _ in range(4))
    if cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuInit(0):
        return None
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    text = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(text, 256, 0)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)  # ..._MINOR
    return Card(text.value.decode(errors="replace"), major.value * 10 + minor.value, version.value)


def has_card_without_driver(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Linux: an NVIDIA display device on the PCI bus. Asked only when there is no driver to talk to."""
    for device in devices.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / file).read_text().strip() for file in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
    return False


def choose_build(card: Card | None, unused_card: bool = False) -> Build:
    """CUDA where the driver is new enough and the card too, else the processor."""
    if card is None and unused_card:
        return Build(
            "cpu",
            "There is an NVIDIA card but no driver for it: pictures are made by the processor. "
            f"Install NVIDIA's driver {DRIVER_FOR_IT} or newer, then run this again.",
        )
    if card is None:
        return Build("cpu", "No NVIDIA card: pictures are made by the processor.")
    if card.capability < OLDEST_CARD:
        return Build("cpu", f"The {card.name} is too old for CUDA 13: pictures are made by the processor.")
    if card.cuda < CUDA_NEEDED:
        has = f"{card.cuda // 1000}.{card.cuda % 1000 // 10}"
        return Build(
            "cpu",
            f"The {card.name}'s driver is too old (CUDA {has}): pictures are made by the processor. "
            f"Update the driver to {DRIVER_FOR_IT} or newer, then run this again.",
        )
    return Build("cuda", f"{card.name}: pictures are made by the graphics card.")


def has_display(environment: Mapping[str, str] = os.environ, system: str = sys.platform) -> bool:
    """Whether a window may open. On Linux a display server says where it is; other systems have one."""
    return not system.startswith("linux") or any(environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def check_platform(system: str = sys.platform, bits: int = sys.maxsize.bit_length() + 1) -> None:
    if system == "darwin":
        raise StopError("Tonfa does not run on macOS yet.", "Use a computer with Linux or Windows.")
    if bits < 64:
        raise StopError("This Python is a 32-bit program.", "Install a 64-bit Python, then run this file with it.")


def check_writable(root: Path) -> Path:
    """Make the installer's own working folder below `root`; returns it."""
    work = root / ".build"
    try:
        work.mkdir(exist_ok=True)
        probe = work / "may-i-write"
        probe.write_text("yes")
        probe.unlink()
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise _no_space(root, 0, 0) from None
        raise StopError(
            f"Tonfa's folder may not be written to: {root}",
            "Put the folder somewhere that belongs to you (your home folder, say), then run this again.",
        ) from None
    return work


def check_space(root: Path, build: Literal["cpu", "cuda"], already: int) -> int:
    """Free bytes on the disk of `root`; `already` is what an earlier, unfinished installation takes there."""
    free = shutil.disk_usage(root).free
    needed = max(SPACE_NEEDED[build] - already, 10**9)
    if free < needed:
        raise _no_space(root, free, needed)
    return free


def _no_space(root: Path, free: int, needed: int) -> StopError:
    numbers = f" {megabytes(needed)} more are needed, {megabytes(free)} are free." if needed else ""
    return StopError(f"The disk of {root} is too full.{numbers}", "Make some space, then run this again.")


def missing_packages() -> tuple[list[str], list[str]]:
    """Debian packages that are needed to make a `.venv`, and those that a window needs on top."""
    if not sys.platform.startswith("linux"):
        return [], []
    has_venv = all(importlib.util.find_spec(module) for module in ("ensurepip", "venv"))
    venv = [] if has_venv else [f"python{sys.version_info.major}.{sys.version_info.minor}-venv"]
    return venv, [package for library, package in QT_LIBRARIES.items() if not _loads(library)]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def install_system_packages(report: Report, need_window: bool) -> None:
    """As root install what is missing; else stop with the one command that does, if nothing works without it."""
    venv, window = missing_packages()
    missing = venv + window
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    apt = shutil.which("apt-get")
    if apt and os.geteuid() == 0:
        report.say(f"Installing system packages: {' '.join(missing)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["apt-get", "update"], command):
            done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
            report.note(done.stdout + done.stderr)
        importlib.invalidate_caches()
        venv, window = missing_packages()
        missing = venv + window
    if venv or (window and need_window):
        what = "The system lacks what " + ("a Python environment needs." if venv else "a window needs.")
        if apt:
            sudo = "" if os.geteuid() == 0 else "sudo "
            todo = f"Run this, then start again:\n  {sudo}apt-get update && {sudo}{' '.join(command)}"
        else:
            libraries = [library for library, package in QT_LIBRARIES.items() if package in window]
            todo = "Install these, then start again: " + " ".join(venv + libraries)
        raise StopError(what, todo)
    if missing:
        report.say(f"A window would also need: {' '.join(missing)}")


def describe() -> str:
    """One line for the log."""
    return f"{platform.platform()}, Python {platform.python_version()} ({sys.executable})"
