"""What the next picture will be: everything the left column holds, and the request that comes of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from PySide6.QtCore import QObject, Signal

from engine.folders import ModelCard
from engine.requests import MAX_SEED, MAX_STRENGTH, ImageRequest, LoraChoice

SeedMode = Literal["random", "keep", "one up"]
MAX_NEW_SEED = 99_999_999  # drawn seeds stay short enough to read out and to type
MAX_COUNT = 99
MAX_STEPS = 100
LOST = "not on this computer"


@dataclass(frozen=True, slots=True)
class LoraUse:
    """What the network takes of a LoRA file; unused holds (key, why)."""

    layers_used: int
    layers: int
    unused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LoraSetting:
    """One LoRA in the list. Off keeps value and place."""

    file: str
    name: str
    strength: float = 1.0
    own_strength: float = 1.0
    on: bool = True
    use: LoraUse | None = None  # None until the engine has seen it
    problem: str = ""  # why it cannot be used

    def words(self) -> str:
        if self.problem:
            return self.problem
        if not self.on:
            return "off"
        if self.use is None:
            return Path(self.file).name
        if self.partly_used:
            return f"{self.use.layers_used} of {self.use.layers} layers used"
        return f"all {self.use.layers} layers used"

    @property
    def partly_used(self) -> bool:
        return self.use is not None and self.use.layers_used < self.use.layers


class ComposerState(QObject):
    """Holds settings that the chosen model takes. `changed` after anything changed, whoever did it."""

    changed = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.model: ModelCard | None = None
        self.prompt = ""
        self.negative = ""
        self.loras: tuple[LoraSetting, ...] = ()
        self.width, self.height = 0, 0
        self.steps = 1
        self.seed = random.randint(0, MAX_NEW_SEED)
        self.seed_mode: SeedMode = "random"
        self.guidance: float | None = None
        self.count = 1
        self._seed_used = False

    # -- the model --

    def set_model(self, card: ModelCard) -> None:
        """Keeps prompt, seed and the user's LoRAs; what belongs to the model becomes its own again."""
        before = self.model
        self.model = card
        self.width, self.height = card.default_size
        self.steps, self.guidance = card.steps, card.guidance
        brought = {lora.file for lora in before.loras} if before else set()
        kept = tuple(replace(one, use=None, problem="") for one in self.loras if one.file not in brought)
        own = tuple(
            LoraSetting(lora.file, lora.name, lora.strength, lora.strength, on=False) for lora in card.loras[:2]
        )
        self.loras = own + tuple(one for one in kept if one.file not in {lora.file for lora in own})
        self.changed.emit()

    def known_loras(self) -> list[tuple[str, str]]:
        """(file, name) of LoRAs that the model brings."""
        return [(lora.file, lora.name) for lora in self.model.loras] if self.model else []

    # -- words --

    def set_prompt(self, words: str) -> None:
        if words != self.prompt:
            self.prompt = words
            self.changed.emit()

    def set_negative(self, words: str) -> None:
        if words != self.negative:
            self.negative = words
            self.changed.emit()

    def surprise(self) -> None:
        """Another one of the prompts that the model suggests."""
        others = [words for words in (self.model.suggestions if self.model else ()) if words != self.prompt]
        if others:
            self.set_prompt(random.choice(others))

    # -- LoRAs --

    def add_lora(self, file: str) -> bool:
        """Adds a file, or switches it on if it is there. False if it was there already."""
        if any(one.file == file for one in self.loras):
            self.switch_lora(file, True)
            return False
        card = next((lora for lora in (self.model.loras if self.model else ()) if lora.file == file), None)
        strength = card.strength if card else 1.0
        name = card.name if card else Path(file).stem
        self.loras = (*self.loras, LoraSetting(file, name, strength, strength))
        self.changed.emit()
        return True

    def remove_lora(self, file: str) -> None:
        self.loras = tuple(one for one in self.loras if one.file != file)
        self.changed.emit()

    def move_lora(self, file: str, by: int) -> None:
        order = list(self.loras)
        at = next((i for i, one in enumerate(order) if one.file == file), None)
        if at is not None and 0 <= at + by < len(order):
            order.insert(at + by, order.pop(at))
            self.loras = tuple(order)
            self.changed.emit()

    def set_strength(self, file: str, strength: float) -> None:
        limited = min(MAX_STRENGTH, max(-MAX_STRENGTH, strength))
        self._change_lora(file, strength=limited)

    def switch_lora(self, file: str, on: bool) -> None:
        self._change_lora(file, on=on)

    def set_lora_use(self, file: str, use: LoraUse | None, problem: str = "") -> None:
        """What the engine said about a file; one that cannot be used is switched off and says why."""
        if problem:
            self._change_lora(file, problem=problem, on=False)
        else:
            self._change_lora(file, use=use, problem="")

    def _change_lora(self, file: str, **values: object) -> None:
        after = tuple(replace(one, **values) if one.file == file else one for one in self.loras)  # type: ignore[arg-type]
        if after != self.loras:
            self.loras = after
            self.changed.emit()

    # -- numbers --

    def set_size(self, width: int, height: int) -> None:
        """Snapped to what the model takes."""
        self.width, self.height = self._snapped(width), self._snapped(height)
        self.changed.emit()

    def _snapped(self, side: int) -> int:
        if self.model is None:
            return side
        step, low, high = self.model.size_step, self.model.size_min, self.model.size_max
        lowest, highest = -(-low // step) * step, high // step * step
        return min(highest, max(lowest, round(side / step) * step))

    def set_steps(self, steps: int) -> None:
        self.steps = min(MAX_STEPS, max(1, steps))
        self.changed.emit()

    def set_guidance(self, guidance: float) -> None:
        if self.guidance is not None:
            self.guidance = min(100.0, max(0.0, guidance))
            self.changed.emit()

    def set_count(self, count: int) -> None:
        self.count = min(MAX_COUNT, max(1, count))
        self.changed.emit()

    def set_seed(self, seed: int) -> None:
        """Who types a seed wants that one."""
        self.seed = min(MAX_SEED, max(0, seed))
        self._seed_used = False
        if self.seed_mode == "random":
            self.seed_mode = "keep"
        self.changed.emit()

    def set_seed_mode(self, mode: str) -> None:
        if mode in get_args(SeedMode):
            self.seed_mode = mode  # type: ignore[assignment]
            self.changed.emit()

    def new_seed(self) -> None:
        self.seed = random.randint(0, MAX_NEW_SEED)
        self._seed_used = False
        self.changed.emit()

    # -- requests --

    def next_request(self, out: str) -> ImageRequest:
        """The request for Generate; moves the seed on as its mode says. Raises ProblemError."""
        if self._seed_used and self.seed_mode == "one up":
            self.seed = min(MAX_SEED - self.count + 1, self.seed + self.count)
        elif self._seed_used and self.seed_mode == "random":
            self.seed = random.randint(0, MAX_NEW_SEED)
        request = self._request(self.prompt.strip(), out)
        self._seed_used = True
        self.changed.emit()
        return request

    def plan_request(self) -> ImageRequest | None:
        """The same question without the words: what it would take. Raises ProblemError."""
        return self._request("plan", "") if self.model is not None else None

    def _request(self, prompt: str, out: str) -> ImageRequest:
        assert self.model is not None
        return ImageRequest(
            prompt=prompt,
            negative=self.negative.strip(),
            model=self.model.model,
            loras=tuple(LoraChoice(one.file, one.strength) for one in self.loras if one.on),
            width=self.width,
            height=self.height,
            steps=self.steps,
            seed=self.seed,
            count=self.count,
            guidance=self.guidance,
            out=out,
        )

    def restore(self, request: ImageRequest, seed: int) -> None:
        """Takes over a picture's prompt and settings; LoRAs it did not use are switched off."""
        self.prompt, self.negative = request.prompt, request.negative
        self.width = self._snapped(request.width or self.width)
        self.height = self._snapped(request.height or self.height)
        self.steps = request.steps or self.steps
        self.guidance = request.guidance if request.guidance is not None else self.guidance
        self.seed, self.seed_mode, self._seed_used, self.count = seed, "keep", False, 1
        # a recipe in a file tells a LoRA's name, not where it lies
        files = {name: file for file, name in self.known_loras()} | {one.name: one.file for one in self.loras}
        wanted = {files.get(one.file, one.file): one.strength for one in request.loras}
        there = {one.file for one in self.loras}
        changed = tuple(
            replace(one, on=one.file in wanted, strength=wanted.get(one.file, one.strength)) for one in self.loras
        )
        names = dict(self.known_loras())
        new = tuple(
            LoraSetting(file, names.get(file, Path(file).stem), strength)
            for file, strength in wanted.items()
            if file not in there
        )
        lost = tuple(replace(one, on=False, problem=LOST) for one in new if not Path(one.file).is_absolute())
        self.loras = changed + tuple(one for one in new if Path(one.file).is_absolute()) + lost
        self.changed.emit()

    # -- from one start to the next --

    def remembered(self) -> dict[str, Any]:
        """Plain values for `remember`; no words."""
        return {
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "count": self.count,
            "guidance": self.guidance,
            "seed": self.seed,
            "seed_used": self._seed_used,
            "seed_mode": self.seed_mode,
            "loras": [
                {
                    "file": one.file,
                    "name": one.name,
                    "strength": one.strength,
                    "own": one.own_strength,
                    "on": one.on,
                }
                for one in self.loras
                if not one.problem
            ],
        }

    def remember(self, told: Mapping[str, Any]) -> None:
        """Take up what an earlier start left off with; what cannot be understood stays as the model says."""

        def number(name: str, otherwise: float, of: Mapping[str, Any] = told) -> float:
            value = of.get(name)
            good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_SEED
            return value if good else otherwise  # type: ignore[return-value]

        self.width, self.height = (
            self._snapped(int(number(name, value)))
            for name, value in (("width", self.width), ("height", self.height))
        )
        self.steps = min(MAX_STEPS, max(1, int(number("steps", self.steps))))
        self.count = min(MAX_COUNT, max(1, int(number("count", 1))))
        if self.guidance is not None:
            self.guidance = min(100.0, max(0.0, float(number("guidance", self.guidance))))
        if told.get("seed_mode") in get_args(SeedMode):
            self.seed_mode = told["seed_mode"]
        if self.seed_mode != "random":
            self.seed = max(0, int(number("seed", self.seed)))
            self._seed_used = told.get("seed_used") is True
        brought = {one.file: one for one in self.loras}
        loras: list[LoraSetting] = []
        for one in told.get("loras", ()) if isinstance(told.get("loras"), list) else ():
            file = one.get("file") if isinstance(one, dict) else None
            if not isinstance(file, str) or (file not in brought and not Path(file).is_file()):
                continue
            strength, own = (float(number(name, 1.0, one)) for name in ("strength", "own"))
            known = brought.pop(file, None) or LoraSetting(file, str(one.get("name") or Path(file).stem))
            limited = min(MAX_STRENGTH, max(-MAX_STRENGTH, strength))
            loras.append(replace(known, strength=limited, own_strength=own, on=one.get("on") is True))
        if "loras" in told:  # what was removed from the list stays away
            self.loras = tuple(loras)
        self.changed.emit()
