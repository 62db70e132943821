"""Finished layers in a folder beside the file to write, so that a stopped conversion goes on where it was.

`OUT.part/` holds job.json, which says what is being made of what, and one small safetensors file a unit of work. A
folder of another job is emptied; a folder that is not ours is a problem, nothing in it is touched.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoints.safetensors_file import SafetensorsFile, open_safetensors, write_safetensors
from engine.problems import ProblemError, bad_request, machine_cannot
from engine.safe_json import parse_json

JOB = "job.json"
SUFFIX = ".safetensors"


class PartsFolder:
    """The finished units of one conversion on disk."""

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        """job: plain values; the same ones mean that parts may be used again. Raises ProblemError."""
        self.path = out.with_name(f"{out.name}.part")
        told = json.dumps(dict(job), sort_keys=True)
        try:
            if self.path.is_dir():
                self._take_over(told)
            else:
                self.path.mkdir()
            (self.path / JOB).write_text(told, encoding="utf-8")
        except OSError as error:
            raise machine_cannot(
                f"The folder {self.path.name} beside the result cannot be written.",
                "Check that the folder may be written to and that the disk is not full.",
                repr(error),
            ) from None

    def _take_over(self, told: str) -> None:
        content = list(self.path.iterdir())
        foreign = [entry.name for entry in content if entry.suffix not in (SUFFIX, ".part") and entry.name != JOB]
        if foreign or (content and not (self.path / JOB).is_file()):
            raise bad_request(
                f"The folder {self.path.name}, where unfinished work is kept, holds something else.",
                "Move that folder away, or choose another name for the result.",
            )
        if content and (self.path / JOB).read_text(encoding="utf-8", errors="replace") == told:
            return
        for entry in content:
            entry.unlink()

    def read(self, unit: str) -> SafetensorsFile | None:
        """A finished unit, or None. A damaged one counts as not finished."""
        path = self._file(unit)
        if not path.is_file():
            return None
        try:
            part = open_safetensors(path)
            parse_json(part.metadata.get("errors", ""), path.name)
        except ProblemError:
            return None
        return part

    def errors(self, unit: str) -> dict[str, Any]:
        """What was written beside a finished unit's tensors."""
        part = self.read(unit)
        assert part is not None
        errors = parse_json(part.metadata["errors"], unit)
        return errors if isinstance(errors, dict) else {}

    def write(self, unit: str, tensors: Mapping[str, Tensor], errors: Mapping[str, Any]) -> None:
        """Raises ProblemError."""
        write_safetensors(self._file(unit), tensors, {"errors": json.dumps(dict(errors))})

    def remove(self) -> None:
        """Delete the folder and what this class put there; what cannot be deleted stays."""
        with contextlib.suppress(OSError):
            for entry in list(self.path.iterdir()):
                if entry.suffix in (SUFFIX, ".part") or entry.name == JOB:
                    entry.unlink()
            self.path.rmdir()

    def remove_if_empty(self) -> None:
        """A conversion that finished nothing leaves nothing."""
        with contextlib.suppress(OSError):
            if not any(entry.suffix == SUFFIX for entry in self.path.iterdir()):
                self.remove()

    def _file(self, unit: str) -> Path:
        return self.path / f"{unit}{SUFFIX}"
