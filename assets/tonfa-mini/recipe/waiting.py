"""Stages that run beside each other meet through files."""

from __future__ import annotations

import time
from pathlib import Path


def wait_for(path: Path, until: float) -> None:
    """Return when `path` is there; raises TimeoutError at the time of day `until`."""
    while not path.exists():
        if time.time() > until:
            raise TimeoutError(f"wait_for: {path} did not come")
        time.sleep(0.2)
