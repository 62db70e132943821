"""Make the picture of a recipe again: what to ask for, what differs on this machine, are the bytes equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from engine.checkpoints.bundle import read_bundle
from engine.device import choose_device
from engine.events import Pixels
from engine.folders import ModelCard, comfy_files, find_model, list_models, read_card, sha256
from engine.problems import ProblemError, bad_file, bad_request
from engine.recipe import Recipe, UsedLora
from engine.requests import ImageRequest, LoraChoice, NoiseKind, Plan


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that was otherwise when the picture was made."""

    what: str  # card, driver, torch, kernels, files, threads, program
    then: str
    now: str

    def __str__(self) -> str:
        return f"Made with another {self.what}: {self.then or 'none'}, now {self.now or 'none'}."


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the picture came out with the same bytes."""

    file: str
    differs: tuple[Difference, ...]
    pixels_different: int
    largest_difference: int  # 0 .. 255

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "same": self.pixels_different == 0,
            "differs": [{"what": one.what, "then": one.then, "now": one.now} for one in self.differs],
            "pixels_different": self.pixels_different,
            "largest_difference": self.largest_difference,
        }


def find_used_lora(used: UsedLora, card: ModelCard, picture: str) -> LoraChoice:
    """The LoRA of those very bytes on this computer, whatever it is called here. Raises ProblemError."""
    candidates = [Path(one.file) for one in card.loras] + comfy_files("lora")
    named = {Path(one.file): one.name for one in card.loras}
    candidates.sort(key=lambda path: used.name not in (path.stem, named.get(path)))  # fewer files to hash
    for path in candidates:
        if path.is_file() and sha256(path) == used.sha256:
            return LoraChoice(str(path), used.strength)
    raise bad_request(
        f"The LoRA {used.name} of {picture} is not on this computer.", "Put it into a LoRA folder and try again."
    )


def find_used_model(recipe: Recipe, picture: str, model: str) -> tuple[ModelCard, bool]:
    """The model a recipe names, and whether its network is the very same file.

    Of several with that name the one with those bytes; `model` (a name or folder) where it is not "". Raises
    ProblemError where there is none.
    """
    if model:
        cards = [read_card(find_model(model))]
    else:
        cards = [card for card in list_models() if not card.problem and card.name == recipe.model]
    if not cards:
        raise bad_request(
            f"The model {recipe.model} of {picture} is not on this computer.",
            "Put its folder into a models folder.",
        )
    used = recipe.files.get("transformer")
    for card in cards:
        network = read_bundle(Path(card.folder)).weights["transformer"].path
        if used is not None and network.is_file() and sha256(network) == used.sha256:
            return card, True
    return cards[0], False


def request_of(recipe: Recipe, picture: str, model: str = "") -> ImageRequest:
    """The request that makes a recipe's picture again, on the processor where its graphics card is missing.

    model: a name or folder to use, "" for the one the recipe names.

    Raises ProblemError where the model or a LoRA is not on this machine.
    """
    fields = recipe_fields(recipe, picture, {"model": model} if model else {})
    return ImageRequest(**fields, previews=False)


def recipe_fields(recipe: Recipe, picture: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an ImageRequest that makes a recipe's picture again, `given` ones first.

    A recipe may come from a stranger: its model and LoRAs are looked for by name and bytes among those of this
    computer and are never taken for paths. Its plan and threads are taken where the network is the very same file.
    Raises ProblemError where the model or a LoRA is not on this computer.
    """
    if recipe.noise not in get_args(NoiseKind) or recipe.plan not in get_args(Plan):
        raise bad_file(
            f"The recipe in {picture} is damaged: its noise or plan is unknown.", "Choose another picture."
        )
    card, same_network = find_used_model(recipe, picture, given.get("model", ""))
    wanted = "cpu" if recipe.machine.card.startswith("cpu") else "cuda"
    device = given["device"] if "device" in given else _device_here(wanted)
    fields = {
        "prompt": recipe.prompt,
        "negative": recipe.negative,
        "width": recipe.width,
        "height": recipe.height,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "guidance": recipe.guidance,
        "cfg": recipe.cfg,
        "plan": recipe.plan if same_network and device.startswith(wanted) else "auto",
        "device": device,
        "noise": recipe.noise,
    }
    if same_network and device == wanted == "cpu":
        fields["threads"] = recipe.machine.threads or None
    if "loras" not in given:
        fields["loras"] = tuple(find_used_lora(used, card, picture) for used in recipe.loras)
    return {**fields, **given, "model": card.folder}


def _device_here(wanted: str) -> str:
    """ "cpu" where the graphics card that is wanted cannot be used."""
    try:
        return choose_device(wanted).torch_name
    except ProblemError:
        return "cpu"


def recipe_differences(then: Recipe, now: Recipe) -> tuple[Difference, ...]:
    """What decides pixels and is otherwise here: card, driver, torch, kernels, files, then the rest."""
    pairs = [
        ("card", then.machine.card, now.machine.card),
        ("driver", then.machine.driver, now.machine.driver),
        ("torch", then.machine.torch, now.machine.torch),
        ("kernels", then.machine.kernels, now.machine.kernels),
    ]
    for role in sorted(then.files.keys() | now.files.keys()):
        old, new = then.files.get(role), now.files.get(role)
        if old is None or new is None or old.sha256 != new.sha256:
            pairs.append((f"file ({role})", old.sha256[:12] if old else "", new.sha256[:12] if new else ""))
    pairs += [
        ("number of threads", str(then.machine.threads), str(now.machine.threads)),
        ("Tonfa", then.program, now.program),
    ]
    for name in ("plan", "dtype", "attention", "decode", "sampler", "shift"):
        pairs.append((name, str(getattr(then, name)), str(getattr(now, name))))
    return tuple(Difference(what, old, new) for what, old, new in pairs if old != new)


def verify_pixels(file: str, then: Pixels, now: Pixels, differs: tuple[Difference, ...]) -> Verification:
    """Compare (H, W, 3) pixels; another size counts as every pixel."""
    if then.shape != now.shape:
        return Verification(file, differs, now.shape[0] * now.shape[1], 255)
    error = np.abs(then.astype(np.int16) - now.astype(np.int16))
    return Verification(file, differs, int((error.max(axis=2) > 0).sum()), int(error.max()))
