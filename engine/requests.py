"""What may be asked of the engine: frozen dataclasses of plain values, checked when made.

A request can be pickled, written as JSON and compared. Whatever needs the model to decide (which sizes it takes,
its default steps) is `None` here and filled in by the engine from the model's bundle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from engine.problems import bad_request

Plan = Literal["auto", "w4a4", "w4a8", "w4a16", "bf16"]
Precision = Literal["int4", "nvfp4"]
Rounding = Literal["nearest", "gptq"]
NoiseKind = Literal["philox", "torch"]
Shapes = Literal["flux", "mini"]

BUILT_IN_MODEL = "tonfa-mini"
MAX_SEED = 2**53 - 1  # exact in JSON and in every spreadsheet
MAX_PROMPT_CHARACTERS = 10_000
MAX_STRENGTH = 100.0
MAX_STEPS = 1000
MAX_COUNT = 1000


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad_request(
            f"{name} must be a whole number from {low} to {high}, not {value!r}.", f"Choose another {name}."
        )


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise bad_request(f"{name} must be a number, not {value!r}.", f"Choose another {name}.")
    if not low <= value <= high:
        raise bad_request(f"{name} must be from {low:g} to {high:g}, not {value!r}.", f"Choose another {name}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise bad_request(f"{name} cannot be {value!r}.", f"Choose one of {', '.join(choices)}.")


def _check_text(name: str, value: str) -> None:
    if not isinstance(value, str):
        raise bad_request(f"The {name} must be text, not {value!r}.", "Type it again.")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise bad_request(f"The {name} is longer than {MAX_PROMPT_CHARACTERS} characters.", "Make it shorter.")
    if "\0" in value or any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise bad_request(f"The {name} contains characters that are not text.", "Type it again.")


def _check_named(name: str, value: str) -> None:
    _check_text(name, value)
    if not value.strip():
        raise bad_request(f"No {name} is named.", f"Choose a {name}.")


def _check_device(value: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
        raise bad_request(f"There is no device {value!r}.", "Choose auto, cpu or cuda:N.")


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """One LoRA in the stack: a file path, or the name of one that the model's bundle brings."""

    file: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_text("LoRA", self.file)
        if not self.file.strip():
            raise bad_request("A LoRA needs a file.", "Choose a .safetensors file.")
        _check_number("LoRA strength", self.strength, -MAX_STRENGTH, MAX_STRENGTH)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """Pictures from a prompt. `None` means: what the model's bundle says.

    width, height in pixels; image i of `count` uses seed + i. `out` is the PNG to write ("name.png"; with count > 1
    the seed is put before the suffix); "" writes no file.
    """

    prompt: str
    negative: str = ""
    model: str = BUILT_IN_MODEL
    loras: tuple[LoraChoice, ...] = ()
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int = 0
    count: int = 1
    guidance: float | None = None  # the number a distilled network takes as input
    cfg: float | None = None  # the weight between two predictions; 1 = one prediction
    plan: Plan = "auto"
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    threads: int | None = None
    noise: NoiseKind = "philox"
    previews: bool = True
    out: str = ""

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        _check_text("negative prompt", self.negative)
        if not self.prompt.strip():
            raise bad_request("The prompt is empty.", "Type what you would like to see.")
        for name, text in (("model", self.model), ("device", self.device), ("file to write", self.out)):
            _check_text(name, text)
        if not self.model.strip():
            raise bad_request("No model is chosen.", "Choose a model.")
        for name, value in (("width", self.width), ("height", self.height)):
            if value is not None:
                _check_whole(name, value, 16, 8192)
        if self.steps is not None:
            _check_whole("steps", self.steps, 1, MAX_STEPS)
        _check_whole("seed", self.seed, 0, MAX_SEED)
        _check_whole("count", self.count, 1, MAX_COUNT)
        if self.seed + self.count - 1 > MAX_SEED:
            raise bad_request(f"The last seed would be above {MAX_SEED}.", "Choose a smaller seed.")
        if self.guidance is not None:
            _check_number("guidance", self.guidance, 0.0, 100.0)
        if self.cfg is not None:
            _check_number("cfg", self.cfg, 1.0, 100.0)
        if self.threads is not None:
            _check_whole("threads", self.threads, 1, 1024)
        if not isinstance(self.loras, tuple) or not all(isinstance(lora, LoraChoice) for lora in self.loras):
            raise bad_request("The LoRAs are not a list of files and strengths.", "Choose them again.")
        if not isinstance(self.previews, bool):
            raise bad_request(f"previews must be yes or no, not {self.previews!r}.", "Choose one of the two.")
        if len(self.loras) > 64:
            raise bad_request(f"{len(self.loras)} LoRAs are more than 64.", "Remove some.")
        _check_choice("plan", self.plan, get_args(Plan))
        _check_choice("noise", self.noise, get_args(NoiseKind))
        _check_device(self.device)


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """Load a model ahead of the first picture, so that Generate starts at once."""

    model: str = BUILT_IN_MODEL
    plan: Plan = "auto"
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_named("model", self.model)
        _check_choice("plan", self.plan, get_args(Plan))
        _check_device(self.device)
        if self.threads is not None:
            _check_whole("threads", self.threads, 1, 1024)


@dataclass(frozen=True, slots=True)
class InspectRequest:
    """What a file is: kind, family, precision, rank per layer, keys used and ignored and why."""

    file: str

    def __post_init__(self) -> None:
        _check_named("file", self.file)


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """Make the picture of a recipe again and compare bytes. model: "" for the one the recipe names."""

    file: str
    model: str = ""

    def __post_init__(self) -> None:
        _check_named("picture", self.file)
        _check_text("model", self.model)


@dataclass(frozen=True, slots=True)
class DoctorRequest:
    """What this computer is and what it can run."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """How fast the graphics card runs kernels at FLUX.1's or Tonfa Mini's sizes, and with `step` a whole step."""

    shapes: Shapes = "flux"
    step: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("shapes", self.shapes, get_args(Shapes))
        _check_device(self.device)
        if not isinstance(self.step, bool):
            raise bad_request(f"step must be yes or no, not {self.step!r}.", "Choose one of the two.")


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """A 16-bit checkpoint in, a 4-bit SVDQuant checkpoint out.

    `keep` holds (pattern, "bf16" | "int8") pairs for layers that stay wider; `prompts` is a text file, one a line,
    "" takes the bundle's or none (data-free).
    """

    source: str
    out: str
    precision: Precision = "int4"
    rank: int = 32
    rounding: Rounding = "gptq"
    smooth: bool = True
    prompts: str = ""
    keep: tuple[tuple[str, str], ...] = ()
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, text in (("source", self.source), ("file to write", self.out), ("prompts file", self.prompts)):
            _check_text(name, text)
        if not self.source.strip() or not self.out.strip():
            raise bad_request("A source file and a file to write are needed.", "Name both.")
        _check_device(self.device)
        _check_whole("seed", self.seed, 0, MAX_SEED)
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("rounding", self.rounding, get_args(Rounding))
        _check_whole("rank", self.rank, 0, 1024)
        if self.rank % 16:
            raise bad_request(f"The rank must be a multiple of 16, not {self.rank}.", "Choose 16, 32, 64 or 128.")
        for pattern, kind in self.keep:
            if kind not in ("bf16", "int8") or not pattern:
                raise bad_request(f"Cannot keep {pattern!r} as {kind!r}.", "Write PATTERN=bf16 or PATTERN=int8.")


Request = (
    ImageRequest | PrepareRequest | InspectRequest | VerifyRequest | DoctorRequest | BenchRequest | QuantizeRequest
)
