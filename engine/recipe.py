"""The recipe in a picture: everything that decides its pixels, as JSON and as the line other programs read.

A PNG carries two texts: "tonfa", our JSON, and "parameters", the form that AUTOMATIC1111's program began and sites
read. Both are free of paths: people share pictures. What is read back comes from strangers and is checked.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from engine.events import Json, Pixels
from engine.folders import check_regular
from engine.problems import ProblemError, bad_file
from engine.requests import MAX_SEED, MAX_STEPS
from engine.safe_json import parse_json

FORMAT = 1
JSON_KEY, COMMON_KEY = "tonfa", "parameters"
MAX_COMMON_CHARACTERS = 2**20
MAX_PIXELS = 8192 * 8192


@dataclass(frozen=True, slots=True)
class UsedFile:
    """A file that decided the picture: what people call it, and which bytes it had."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class UsedLora:
    name: str
    sha256: str
    strength: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What computed it. Two of these that are equal give equal bytes."""

    card: str  # "cpu" and its name, or the graphics card's
    driver: str
    torch: str
    kernels: str  # version of the compiled kernels, "" where none ran
    threads: int  # of the CPU's maths, 0 on a card


@dataclass(frozen=True, slots=True)
class Recipe:
    """One picture. Sizes in pixels; `files` by role (transformer, t5, clip, vae, ...)."""

    prompt: str
    negative: str
    seed: int
    noise: str
    width: int
    height: int
    sampler: str
    steps: int
    shift: float | Mapping[str, float]
    guidance: float | None
    cfg: float
    plan: str
    dtype: str
    attention: str
    model: str
    family: str
    model_version: str
    files: Mapping[str, UsedFile]
    machine: Machine
    program: str  # version of Tonfa
    loras: tuple[UsedLora, ...] = ()
    decode: str = "whole"  # or "tiled", where the memory did not suffice for the whole picture
    format: int = field(default=FORMAT)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the PNG holds them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        return plain

    def common_text(self) -> str:
        """The form of other programs: prompt, what is left out, one line of settings."""
        loras = "".join(f" <lora:{lora.name}:{lora.strength:g}>" for lora in self.loras)
        settings = {
            "Steps": self.steps,
            "Sampler": self.sampler.capitalize(),
            "CFG scale": f"{self.cfg:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
        }
        if self.guidance is not None:
            settings["Distilled CFG Scale"] = f"{self.guidance:g}"
        if "transformer" in self.files:
            settings["Model hash"] = self.files["transformer"].sha256[:10]
        if self.loras:
            hashes = ", ".join(f"{lora.name}: {lora.sha256[:12]}" for lora in self.loras)
            settings["Lora hashes"] = f'"{hashes}"'
        settings["Version"] = f"Tonfa {self.program}"
        lines = [self.prompt + loras]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
        lines.append(", ".join(f"{key}: {value}" for key, value in settings.items()))
        return "\n".join(lines)

    @classmethod
    def from_json(cls, content: Any, where: str) -> Recipe:
        """Read a recipe from a stranger's picture. Raises ProblemError naming the field that is wrong."""
        fields = _Checked(content, where)
        if fields.whole("format", 1, 10**6) != FORMAT:
            raise bad_file(f"The recipe in {where} was written by a newer Tonfa.", "Update Tonfa.")
        machine = _Checked(fields.content.get("machine"), where)
        files = _Checked(fields.content.get("files"), where)
        loras = fields.content.get("loras", [])
        if not isinstance(loras, list) or len(loras) > 64:
            raise fields.wrong("loras", "a list of at most 64")
        shift = fields.content.get("shift")
        if isinstance(shift, dict):
            inner = _Checked(shift, where)
            told_shift: float | Mapping[str, float] = {key: inner.number(key, -1e9, 1e9) for key in list(shift)[:8]}
        else:
            told_shift = fields.number("shift", 0.0, 1e6)
        return cls(
            prompt=fields.text("prompt"),
            negative=fields.text("negative"),
            seed=fields.whole("seed", 0, MAX_SEED),
            noise=fields.text("noise"),
            width=fields.whole("width", 16, 8192),
            height=fields.whole("height", 16, 8192),
            sampler=fields.text("sampler"),
            steps=fields.whole("steps", 1, MAX_STEPS),
            shift=told_shift,
            guidance=None if fields.content.get("guidance") is None else fields.number("guidance", 0, 100),
            cfg=fields.number("cfg", 1, 100),
            plan=fields.text("plan"),
            dtype=fields.text("dtype"),
            attention=fields.text("attention"),
            model=fields.text("model"),
            family=fields.text("family"),
            model_version=fields.text("model_version"),
            files={
                role: UsedFile(one.text("name"), one.text("sha256"))
                for role, one in ((role, _Checked(value, where)) for role, value in files.content.items())
            },
            machine=Machine(
                machine.text("card"),
                machine.text("driver"),
                machine.text("torch"),
                machine.text("kernels"),
                machine.whole("threads", 0, 1024),
            ),
            program=fields.text("program"),
            decode=fields.text("decode") if "decode" in fields.content else "whole",
            loras=tuple(
                UsedLora(one.text("name"), one.text("sha256"), one.number("strength", -100, 100))
                for one in (_Checked(value, where) for value in loras)
            ),
        )


class _Checked:
    """Typed fields of a recipe's JSON object."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict) or len(content) > 1000:
            raise bad_file(f"The recipe in {where} is damaged.", "Choose another picture.")
        self.content: dict[str, Any] = content
        self._where = where

    def wrong(self, key: str, expected: str) -> ProblemError:
        return bad_file(
            f"The recipe in {self._where} is damaged: {key} should be {expected}.", "Choose another picture."
        )

    def text(self, key: str) -> str:
        value = self.content.get(key)
        if not isinstance(value, str) or len(value) > 20_000:
            raise self.wrong(key, "text")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value


def png_bytes(pixels: Pixels, recipe: Recipe | None) -> bytes:
    """pixels: (H, W, 3) uint8 -> a PNG file with the recipe inside."""
    texts = PngImagePlugin.PngInfo()
    if recipe is not None:
        texts.add_text(COMMON_KEY, recipe.common_text())
        texts.add_text(JSON_KEY, json.dumps(recipe.to_json(), ensure_ascii=False))
    target = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(target, "PNG", pnginfo=texts)
    return target.getvalue()


def read_png(path: Path) -> tuple[Pixels, dict[str, str]]:
    """Pixels (H, W, 3) uint8 and texts of a PNG that may be damaged or hostile. Raises ProblemError."""
    name = path.name
    try:
        check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise bad_file(
                        f"{name} has {image.width} x {image.height} pixels.", "Choose a smaller picture."
                    )
                pixels: Pixels = np.array(image.convert("RGB"), dtype=np.uint8)
                texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except FileNotFoundError:
        raise bad_file(f"There is no file {name}.", "Check the name.", str(path)) from None
    except ProblemError:
        raise
    # Pillow's bomb and text limits, broken chunks, zlib faults: many exception types, one meaning
    except Exception as error:
        raise bad_file(f"{name} cannot be read as a PNG picture.", "Choose another picture.", repr(error)) from None
    return pixels, texts


def recipe_of(texts: Mapping[str, str], name: str) -> Recipe:
    """The recipe in a PNG's texts; `name` is what the problem calls the picture."""
    if JSON_KEY not in texts:
        raise bad_file(f"{name} has no recipe of Tonfa in it.", "Choose a picture that Tonfa saved.")
    return Recipe.from_json(parse_json(texts[JSON_KEY], f"The recipe in {name}"), name)


def settings_of(texts: Mapping[str, str], name: str) -> Json:
    """What a picture of any program tells of its making, by the names of ImageRequest's fields.

    Ours from the JSON; others' from "parameters": prompt, negative, steps, seed, size, cfg. Raises ProblemError
    where the picture tells nothing.
    """
    if JSON_KEY in texts:
        recipe = recipe_of(texts, name)
        return {
            "prompt": recipe.prompt,
            "negative": recipe.negative,
            "seed": recipe.seed,
            "noise": recipe.noise,
            "width": recipe.width,
            "height": recipe.height,
            "steps": recipe.steps,
            "guidance": recipe.guidance,
            "cfg": recipe.cfg,
            "model": recipe.model,
            "loras": [{"name": one.name, "sha256": one.sha256, "strength": one.strength} for one in recipe.loras],
        }
    if COMMON_KEY in texts:
        return _common_settings(texts[COMMON_KEY])
    raise bad_file(f"{name} has no recipe in it.", "Choose a picture that tells how it was made.")


def _common_settings(text: str) -> Json:
    lines = text[:MAX_COMMON_CHARACTERS].splitlines()
    last = len(lines) - 1 if lines and lines[-1].startswith("Steps:") else len(lines)
    words, settings_line = lines[:last], "".join(lines[last:])
    start = next((i for i, line in enumerate(words) if line.startswith("Negative prompt:")), len(words))
    found: dict[str, Any] = {
        "prompt": re.sub(r"\s*<lora:[^<>]*>", "", "\n".join(words[:start])),
        "negative": "\n".join(words[start:]).removeprefix("Negative prompt:").strip(),
    }
    told = dict(re.findall(r"([A-Z][\w ]{0,40}): ([^,\"]{1,100})", settings_line))
    for key, name in (("Steps", "steps"), ("Seed", "seed")):
        if re.fullmatch("[0-9]{1,18}", told.get(key, "")):  # isdigit() takes signs that int() does not
            found[name] = int(told[key])
    if match := re.fullmatch(r"([0-9]{2,5})x([0-9]{2,5})", told.get("Size", "")):
        found["width"], found["height"] = int(match[1]), int(match[2])
    for key, name in (("CFG scale", "cfg"), ("Distilled CFG Scale", "guidance")):
        try:
            value = float(told[key])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            found[name] = value
    return found
