"""Captions and the scenes they describe. A scene is plain numbers; `rasteriser.py` draws it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from recipe.concepts import COLOUR_WORDS, Concept
from recipe.english import plural, with_article
from recipe.palette import COLOUR_SYNONYMS, COLOURS, FLAT, GRADIENT_COLOURS, NOTO_STYLE, PLACES, RGB, TINTS

WHITE = COLOURS["white"]
NUMBERS: dict[int, tuple[str, ...]] = {
    2: ("two", "2", "a pair of"), 3: ("three", "3"), 4: ("four", "4"), 5: ("five", "5"), 6: ("six", "6"),
}  # fmt: skip
# Places (x, y) of the things of a tidy group, and how large each is drawn.
ROW_OF_THREE = ((0.2, 0.5), (0.5, 0.5), (0.8, 0.5))
LAYOUTS: dict[int, tuple[tuple[tuple[float, float], ...], float]] = {
    2: (((0.28, 0.5), (0.72, 0.5)), 0.42),
    3: (((0.5, 0.28), (0.28, 0.72), (0.72, 0.72)), 0.41),
    4: (((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)), 0.41),
    5: (((0.24, 0.24), (0.76, 0.24), (0.5, 0.5), (0.24, 0.76), (0.76, 0.76)), 0.32),
    6: (((0.2, 0.33), (0.5, 0.33), (0.8, 0.33), (0.2, 0.67), (0.5, 0.67), (0.8, 0.67)), 0.28),
}
CORNERS: tuple[tuple[float, float, str], ...] = (
    (0.5, 0.5, "in the middle"), (0.25, 0.25, "in the top left corner"), (0.75, 0.25, "in the top right corner"),
    (0.25, 0.75, "in the bottom left corner"), (0.75, 0.75, "in the bottom right corner"),
    (0.5, 0.24, "at the top"), (0.5, 0.76, "at the bottom"),
    (0.24, 0.5, "on the left"), (0.76, 0.5, "on the right"),
)  # fmt: skip
# relation -> (words between the two things, place of the first, place of the second)
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[float, float], tuple[float, float]]] = {
    "left": (("to the left of", "left of"), (0.27, 0.5), (0.73, 0.5)),
    "right": (("to the right of", "right of"), (0.73, 0.5), (0.27, 0.5)),
    "above": (("above", "over"), (0.5, 0.27), (0.5, 0.73)),
    "below": (("below", "under", "underneath"), (0.5, 0.73), (0.5, 0.27)),
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """One drawing in a scene; x, y is its centre, `size` its side, in parts of the picture."""

    key: str
    style: str
    x: float
    y: float
    size: float
    tint: str | None = None


@dataclass(frozen=True, slots=True)
class Backdrop:
    """What is behind: a vertical gradient, and a ground below a gently waving horizon."""

    top: RGB = WHITE
    bottom: RGB = WHITE
    ground: RGB | None = None
    horizon: float = 1.0
    hill: float = 0.0
    phase: float = 0.0
    dots: str | None = None  # the place whose stars, snow or bubbles fill it


@dataclass(frozen=True, slots=True)
class Scene:
    """`swapped` is the caption of a scene in which two things changed places, or "" where there is none."""

    caption: str
    drawings: tuple[Drawing, ...]
    backdrop: Backdrop
    swapped: str = ""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Things without a backdrop. `stands`: on a ground, they stand on it instead of floating."""

    words: str
    drawings: tuple[Drawing, ...]
    stands: bool = False
    swapped: str = ""


class SceneSampler:
    """Draws scenes at random. The shares stand in `arrangement` and `backdrop`."""

    def __init__(self, concepts: Sequence[Concept], seed: int, noto_share: float = 0.08) -> None:
        self.random = random.Random(seed)
        self.noto_share = noto_share
        self.all = list(concepts)
        self.things = [c for c in concepts if c.is_thing]
        self.countable = [c for c in concepts if c.is_countable]

    def sample(self) -> Scene:
        style = NOTO_STYLE if self.random.random() < self.noto_share else FLAT
        arrangement = self.arrangement(style)
        backdrop, before, after = self.backdrop()
        if backdrop.ground is not None and arrangement.stands:
            base = self.random.uniform(0.9, 0.95)
            standing = tuple(replace(d, y=base - d.size / 2) for d in arrangement.drawings)
            arrangement = replace(arrangement, drawings=standing)
        suffix = ", noto style" if style == NOTO_STYLE else ""
        swapped = f"{before}{arrangement.swapped}{after}{suffix}" if arrangement.swapped else ""
        caption = f"{before}{arrangement.words}{after}{suffix}"
        return Scene(caption, arrangement.drawings, backdrop, swapped)

    # Things.

    def arrangement(self, style: str) -> Arrangement:
        share = self.random.random()
        if share < 0.60:
            return self.single(style)
        if share < 0.74:
            return self.group(style)
        if share < 0.90:
            return self.placed_pair(style)
        return self.loose_pair(style) if share < 0.98 else self.three(style)

    def single(self, style: str) -> Arrangement:
        concept = self.pick(self.all)
        name, tint = self.name(concept, style, tint_share=0.25)
        share = self.random.random()
        if share < 0.84:
            size, jitter = self.random.uniform(0.74, 0.84), 0.02
            here = self.drawing(concept, style, 0.5, 0.5, size, tint, jitter)
            return Arrangement(with_article(name), (here,), stands=True)
        if share < 0.90:
            word = self.random.choice(["big", "large", "huge"])
            here = self.drawing(concept, style, 0.5, 0.5, self.random.uniform(0.92, 1.0), tint, 0.0)
            return Arrangement(with_article(f"{word} {name}"), (here,))
        word = self.random.choice(["small", "little", "tiny"])
        size = self.random.uniform(0.22, 0.26) if word == "tiny" else self.random.uniform(0.34, 0.40)
        x, y, where = self.random.choice(CORNERS)
        here = self.drawing(concept, style, x, y, size, tint, 0.02)
        return Arrangement(f"{with_article(f'{word} {name}')} {where}", (here,))

    def group(self, style: str) -> Arrangement:
        count = self.random.choices((2, 3, 4, 5, 6), (5, 5, 4, 4, 1))[0]
        concept = self.pick(self.countable)
        name, tint = self.name(concept, style, tint_share=0.12)
        places, size = LAYOUTS[count]
        words = f"{self.random.choice(NUMBERS[count])} {plural(name)}"
        if count == 3 and self.random.random() < 0.3:
            places, size, words = ROW_OF_THREE, 0.29, f"{words} in a row"
        size *= self.random.uniform(0.95, 1.0)
        return Arrangement(words, tuple(self.drawing(concept, style, x, y, size, tint, 0.01) for x, y in places))

    def placed_pair(self, style: str) -> Arrangement:
        """Two things whose places the caption names."""
        (first, name, tint), (second, other, other_tint) = self.two_things(style)
        relation = self.random.choice(list(RELATIONS))
        words, place, other_place = RELATIONS[relation]
        between = self.random.choices(words, [3] + [1] * (len(words) - 1))[0]
        size = self.random.uniform(0.41, 0.46)
        drawings = (
            self.drawing(first, style, *place, size, tint, 0.02),
            self.drawing(second, style, *other_place, size, other_tint, 0.02),
        )
        a, b = with_article(name), with_article(other)
        return Arrangement(f"{a} {between} {b}", drawings, relation in ("left", "right"), f"{b} {between} {a}")

    def loose_pair(self, style: str) -> Arrangement:
        """Two things beside each other in either order, or of two sizes, or one before the other."""
        (first, name, tint), (second, other, other_tint) = self.two_things(style)
        left, right = self.random.sample((0.27, 0.73), 2)
        share = self.random.random()
        a, b = with_article(name), with_article(other)
        if share < 0.65:
            words = self.random.choice([f"{a} next to {b}", f"{a} beside {b}", f"{a} and {b}", f"{a} and {b}"])
            size = self.random.uniform(0.41, 0.46)
            drawings = (
                self.drawing(first, style, left, 0.5, size, tint, 0.02),
                self.drawing(second, style, right, 0.5, size, other_tint, 0.02),
            )
            return Arrangement(words, drawings, stands=True)
        if share < 0.85:
            words = f"{with_article(f'big {name}')} next to {with_article(f'small {other}')}"
            big, small = (0.33, 0.8) if left < right else (0.67, 0.2)
            drawings = (
                self.drawing(first, style, big, 0.5, 0.56, tint, 0.01),
                self.drawing(second, style, small, 0.5, 0.28, other_tint, 0.01),
            )
            return Arrangement(words, drawings, stands=True)
        side = -0.1 if left < right else 0.1
        back = self.drawing(first, style, 0.5 + side, 0.4, 0.64, tint, 0.01)
        front = self.drawing(second, style, 0.5 - 1.4 * side, 0.68, 0.46, other_tint, 0.01)
        words = f"{a} behind {b}" if self.random.random() < 0.5 else f"{b} in front of {a}"
        return Arrangement(words, (back, front))

    def three(self, style: str) -> Arrangement:
        trio = [self.pick(self.things) for _ in range(3)]
        names = [with_article(self.name(c, style, 0.0)[0]) for c in trio]
        drawings = tuple(
            self.drawing(c, style, x, y, 0.29, None, 0.01) for c, (x, y) in zip(trio, ROW_OF_THREE, strict=True)
        )
        return Arrangement(f"{names[0]}, {names[1]} and {names[2]}", drawings, stands=True)

    def two_things(self, style: str) -> tuple[tuple[Concept, str, str | None], tuple[Concept, str, str | None]]:
        first = self.pick(self.things)
        second = self.pick(self.things)
        while second.key == first.key:
            second = self.pick(self.things)
        name, tint = self.name(first, style, 0.15)
        other, other_tint = self.name(second, style, 0.15)
        return (first, name, tint), (second, other, other_tint)

    def pick(self, concepts: list[Concept]) -> Concept:
        while True:  # rejection: no cumulative table a list
            concept = self.random.choice(concepts)
            if self.random.random() * 2.5 < concept.weight:
                return concept

    def name(self, concept: Concept, style: str, tint_share: float) -> tuple[str, str | None]:
        """A phrase for the concept, and the tint that the phrase names, if any. Only flat drawings are tinted."""
        tintable = concept.tint_names if style == FLAT else ()
        if tintable and self.random.random() < tint_share:
            tint = self.random.choice(list(TINTS))
            phrase = f"{tint} {self.weighted(tintable)}"
            if phrase not in (name for name, _ in concept.names):
                return phrase, tint
        return self.weighted(concept.names), None

    def weighted(self, names: tuple[tuple[str, float], ...]) -> str:
        return self.random.choices([n for n, _ in names], [w for _, w in names])[0]

    def drawing(
        self, concept: Concept, style: str, x: float, y: float, size: float, tint: str | None, jitter: float
    ) -> Drawing:
        dx, dy = self.random.uniform(-jitter, jitter), self.random.uniform(-jitter, jitter)
        return Drawing(concept.key, style, x + dx, y + dy, size, tint)

    # Backdrops.

    def backdrop(self) -> tuple[Backdrop, str, str]:
        """A backdrop and the words that say so, before and after the things' words."""
        share = self.random.random()
        if share < 0.22:
            return Backdrop(), "", ""  # a bare prompt means white
        if share < 0.42:
            return Backdrop(), "", self.colour_words("white")
        if share < 0.74:
            return self.plain()
        if share < 0.78:
            return self.gradient()
        return self.place()

    def plain(self) -> tuple[Backdrop, str, str]:
        name = self.random.choice([n for n in COLOURS if n != "white"])
        r, g, b = (min(255.0, max(0.0, c + self.random.uniform(-4, 4))) for c in COLOURS[name])
        return Backdrop((r, g, b), (r, g, b)), "", self.colour_words(name)

    def colour_words(self, name: str) -> str:
        word = self.random.choice(COLOUR_SYNONYMS.get(name, (name,)))
        article = with_article(word)
        forms = (f" on {article} background", f", {word} background", f" on {word}", f" with {article} background")
        return self.random.choices(forms, (5, 2, 1, 1))[0]

    def gradient(self) -> tuple[Backdrop, str, str]:
        top, bottom = self.random.sample(GRADIENT_COLOURS, 2)
        return Backdrop(COLOURS[top], COLOURS[bottom]), "", f", {top} to {bottom} gradient background"

    def place(self) -> tuple[Backdrop, str, str]:
        name = self.random.choice(list(PLACES))
        place = PLACES[name]
        horizon = place.horizon + self.random.uniform(-0.03, 0.03) if place.ground else 1.0
        phase = self.random.uniform(0, 2 * math.pi)
        dots = name if place.dots else None
        backdrop = Backdrop(place.top, place.bottom, place.ground, horizon, place.hill, phase, dots)
        words = self.random.choice(place.phrases)
        return (backdrop, f"{words}, ", "") if self.random.random() < 0.15 else (backdrop, "", f" {words}")


def is_tintable(concept: Concept) -> bool:
    """Whether tinted rows of this concept's flat drawing are needed."""
    return bool(concept.tint_names) and not COLOUR_WORDS.fullmatch(concept.name)
