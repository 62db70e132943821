"""What the engine says while working: frozen dataclasses of plain values and numpy arrays.

Each kind is its own class, so no field is ever "only set when". Every job, waiting or running, ends with exactly
one `Final`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.problems import Problem

Pixels: TypeAlias = NDArray[np.uint8]  # (H, W, 3) sRGB, on the CPU
Json: TypeAlias = Mapping[str, Any]  # plain values only
Fits: TypeAlias = Literal["fits", "tight", "moves", "too large"]


@dataclass(frozen=True, slots=True)
class Loading:
    """A model is being read. `fraction` runs from 0 to 1; `what` is a sentence for people."""

    what: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model is in memory; the next picture starts at once."""

    model: str
    device: str
    plan: str
    load_seconds: float


@dataclass(frozen=True, slots=True)
class Planned:
    """What a request would take, told before anything is loaded. The one answer to a plan (or `Failed`).

    Bytes are the highest of all stages, the model included; `free_bytes` and `total_bytes` are of the memory that
    decides: graphics memory where there is a card, else system memory. `seconds` is what this machine needed before
    for such a picture, scaled; None where nothing was measured yet.
    """

    host_bytes: int
    device_bytes: int
    free_bytes: int
    total_bytes: int
    seconds: float | None
    fits: Fits


@dataclass(frozen=True, slots=True)
class Notice:
    """Something was settled otherwise than asked; one sentence for people. The work goes on."""

    what: str


@dataclass(frozen=True, slots=True)
class ImageStarted:
    """Image `image` (1 .. images) starts to be denoised; sizes and steps as the model takes them."""

    image: int
    images: int
    seed: int
    steps: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """One call of the network is done. `preview` is the clean image predicted so far, small."""

    image: int
    images: int
    step: int  # 1 .. steps
    steps: int
    elapsed_s: float  # since the image started
    preview: Pixels | None = None


@dataclass(frozen=True, slots=True)
class ImageDone:
    """A finished picture. `file` is where it was saved, "" if nowhere; `recipe` makes it again."""

    image: int
    images: int
    seed: int
    pixels: Pixels
    file: str
    recipe: Json
    seconds: float  # from the first step to the decoded picture


@dataclass(frozen=True, slots=True)
class QuantizeProgress:
    """One step of a 4-bit conversion. `left_s` is the predicted rest."""

    what: str
    done: int
    total: int
    left_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The job is done. `result` is what the command line prints as JSON."""

    result: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The user stopped the job."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended in a failure a person can act on."""

    problem: Problem
    ends_engine: bool = False  # its process can go on no longer and ends by itself; another one can be started


Final = Finished | Cancelled | Failed
Event = (
    Loading
    | Prepared
    | Planned
    | Notice
    | ImageStarted
    | StepDone
    | ImageDone
    | QuantizeProgress
    | Finished
    | Cancelled
    | Failed
)
