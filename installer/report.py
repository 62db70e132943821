"""What the installer says: numbered steps for the person, everything else in a log file."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TextIO


class StopError(Exception):
    """The installer cannot go on: what happened, and the one next step."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(f"{what} {todo}")
        self.what = what
        self.todo = todo


class Report:
    """Prints steps with their times, keeps one moving line on a terminal, and copies everything to a log."""

    def __init__(self, log: Path, steps: int, out: TextIO | None = None) -> None:
        self.log = log
        self._out = out or sys.stdout
        self._steps = steps
        self._step = 0
        self._began = time.monotonic()
        self._moving = 0  # characters of the moving line that is on the terminal now
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file = log.open("w", encoding="utf-8", errors="replace")

    def step(self, words: str) -> None:
        """A new step begins."""
        self._step += 1
        seconds = time.monotonic() - self._began
        self._print(f"[{self._step}/{self._steps}] {seconds:4.0f} s  {words}")

    def say(self, words: str) -> None:
        """One thing to know, below the step."""
        self._print(f"               {words}")

    def moving(self, words: str) -> None:
        """Progress within a step. Only a terminal shows it; a log would fill with it."""
        if self._out.isatty():
            line = f"               {words}"[:100]
            self._out.write("\r" + line.ljust(self._moving))
            self._out.flush()
            self._moving = len(line)

    def note(self, line: str) -> None:
        """For the log only."""
        self._file.write(line.rstrip("\n") + "\n")
        self._file.flush()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _print(self, line: str) -> None:
        if self._moving:
            self._out.write("\r" + " " * self._moving + "\r")
            self._moving = 0
        self._out.write(line + "\n")
        self._out.flush()
        self.note(line)


def megabytes(size: float) -> str:
    """A size in words: "13 MB", "1.9 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


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
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return StopError(
            f"No package server has {missing[1] or missing[2]} for Python {python}.",
            f"Use Python 3.11, 3.12 or 3.13, or check pip's configuration. Details: {log}",
        )
    return StopError(what, f"Run this again; if it stops at the same place, the reason is in {log}")
