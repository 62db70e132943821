"""Where the drawings and their names come from. Every package is pinned, and its licence stands beside it."""

from __future__ import annotations

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Source:
    """One npm package: `folder` is where it is unpacked, `licence` the SPDX name of what we use of it."""

    package: str
    version: str
    folder: str
    licence: str
    owner: str


FLUENT_FLAT = Source("@iconify-json/fluent-emoji-flat", "1.2.6", "fluent-flat", "MIT", "Microsoft Corporation")
FLUENT_3D = Source("@lobehub/fluent-emoji-3d", "1.1.0", "fluent-3d", "MIT", "Microsoft Corporation; LobeHub")
NOTO = Source("@iconify-json/noto", "1.2.9", "noto", "Apache-2.0", "Google Inc.")
NAMES = Source("emojibase-data", "17.0.0", "emojibase", "MIT and Unicode-3.0", "Miles Johnson; Unicode, Inc.")
SOURCES = (FLUENT_FLAT, FLUENT_3D, NOTO, NAMES)


def fetch(downloads: Path) -> None:
    """Fetch and unpack every package that is not there yet. Needs npm and the network."""
    downloads.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        target = downloads / source.folder
        if target.exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
            cwd=downloads,
            check=True,
            capture_output=True,
            text=True,
        )
        archive = downloads / packed.stdout.strip().splitlines()[-1]
        partial = target.with_suffix(".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        (partial / "package").rename(target)
        partial.rmdir()
        archive.unlink()
