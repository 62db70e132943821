"""Fixed prompts: what the model is judged by, what the sheets show, what the quantizer calibrates on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from recipe.concepts import COLOUR_WORDS, Concept
from recipe.english import plural, with_article
from recipe.palette import COLOURS, FLAT, PLACES, TINTS
from recipe.scenes import LAYOUTS, NUMBERS, RELATIONS, WHITE, Backdrop, Drawing, Scene, SceneSampler
from recipe.settings import Settings

SHOWN = (
    "a red apple", "a fox", "a cat", "a dog", "a rocket", "a panda", "a smiley face", "a birthday cake",
    "an octopus", "a bicycle", "a house", "a car", "a guitar", "a robot", "a tree", "a hamburger",
    "a dog on a blue background", "a strawberry on a pink background", "a banana on a purple background",
    "a crown on a black background", "an owl, blue to purple gradient background", "a purple cat",
    "a blue apple on a white background", "a green elephant", "a pink car on a yellow background", "two dogs",
    "three strawberries", "four balloons", "five stars", "three orange cats on a light blue background",
    "a tiny frog in the top left corner", "a cat to the left of a dog", "a dog to the left of a cat",
    "a banana above an apple", "a crown above a lion", "a big whale next to a small fish", "a giraffe at the beach",
    "a penguin in the snow", "a rocket in space", "an octopus underwater", "a tractor in a meadow",
    "a camel in the desert", "an owl at night", "a sailboat at sunset", "a teddy bear in a room",
    "a castle at night", "a unicorn on a lavender background", "a fox, noto style",
)  # fmt: skip
# What the window offers: only what the model was seen to draw well.
SUGGESTED = (
    "a fox", "a cat on a mint background", "a red apple", "a rocket in space", "a panda", "a purple cat",
    "a birthday cake", "three strawberries", "a castle at night", "a unicorn on a lavender background",
    "a penguin in the snow", "a guitar", "a pink car on a yellow background", "a house", "a sailboat at sunset",
    "four balloons", "a hamburger", "a teddy bear in a room", "a lion on a teal background",
    "a robot on an orange background", "an octopus underwater", "a camel in the desert",
    "a crown on a black background", "a tree in a meadow",
)  # fmt: skip
# Beyond the training captions in wording or matter, so that calibration and sheets see them too.
FREE = (
    "corgi wearing sunglasses", "a spaceship landing on the moon", "happy birthday", "a photo of a red sports car",
    "my cat", "pizza!!", "a house behind a tree", "rainbow over the sea", "dragon", "Robot", "two red hearts",
    "a very big elephant", "coffee", "a snowman in the snow with a hat", "", "asdf qwerty",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Test:
    """A prompt and a scene that shows it. `count`, `hue`, `background`: what the picture is measured by."""

    scene: Scene
    keys: tuple[str, ...]
    count: int = 0
    hue: float = -1.0
    background: tuple[float, float, float] = WHITE

    @property
    def prompt(self) -> str:
        return self.scene.caption


def _scene(prompt: str, drawings: tuple[Drawing, ...], backdrop: Backdrop | None = None) -> Scene:
    return Scene(prompt, drawings, backdrop or Backdrop())


def _one(concept: Concept, tint: str | None = None) -> tuple[Drawing, ...]:
    return (Drawing(concept.key, FLAT, 0.5, 0.5, 0.79, tint),)


def make_tests(concepts: tuple[Concept, ...], settings: Settings) -> dict[str, list[Test]]:
    """Prompts by kind, always the same ones. Things only: people and faces are too much alike to be judged."""
    rng = random.Random(99)
    things = [c for c in concepts if c.is_thing]
    countable = [c for c in things if c.is_countable]
    tintable = [c for c in things if c.tint_names and not COLOUR_WORDS.search(c.name)]
    total = settings.prompts
    tests: dict[str, list[Test]] = {}
    singles = rng.sample(things, min(total, len(things)))
    tests["single"] = [Test(_scene(with_article(c.name), _one(c)), (c.key,)) for c in singles]
    colours = list(COLOURS)
    tests["background"] = []
    for i, c in enumerate(rng.sample(things, max(4, total // 3))):
        colour = colours[i % len(colours)]
        rgb = COLOURS[colour]
        prompt = f"{with_article(c.name)} on {with_article(colour)} background"
        tests["background"].append(Test(_scene(prompt, _one(c), Backdrop(rgb, rgb)), (c.key,), background=rgb))
    tints = list(TINTS)
    tests["tint"] = []
    for i, c in enumerate(rng.sample(tintable, max(4, total // 4))):
        tint = tints[i % len(tints)]
        prompt = with_article(f"{tint} {c.tint_names[0][0]}")
        tests["tint"].append(Test(_scene(prompt, _one(c, tint)), (c.key,), hue=TINTS[tint]))
    tests["count"] = []
    for i, c in enumerate(rng.sample(countable, max(4, total // 4))):
        count = 2 + i % 4
        places, size = LAYOUTS[count]
        drawings = tuple(Drawing(c.key, FLAT, x, y, size * 0.97) for x, y in places)
        tests["count"].append(
            Test(_scene(f"{NUMBERS[count][0]} {plural(c.name)}", drawings), (c.key,), count=count)
        )
    tests["relation"] = []
    for i in range(max(4, 3 * total // 8)):
        a, b = rng.sample(things, 2)
        words, place, other = list(RELATIONS.values())[i % 4]
        drawings = (Drawing(a.key, FLAT, *place, 0.43), Drawing(b.key, FLAT, *other, 0.43))
        prompt = f"{with_article(a.name)} {words[0]} {with_article(b.name)}"
        tests["relation"].append(Test(_scene(prompt, drawings), (a.key, b.key)))
    tests["place"] = []
    for i, c in enumerate(rng.sample(things, max(4, total // 4))):
        name, place_ = list(PLACES.items())[i % len(PLACES)]
        y = 0.93 - 0.79 / 2 if place_.ground else 0.5
        backdrop = Backdrop(
            place_.top,
            place_.bottom,
            place_.ground,
            place_.horizon,
            place_.hill,
            0.0,
            name if place_.dots else None,
        )
        drawings = (Drawing(c.key, FLAT, 0.5, y, 0.79),)
        prompt = f"{with_article(c.name)} {place_.phrases[0]}"
        tests["place"].append(Test(_scene(prompt, drawings, backdrop), (c.key,)))
    return tests


def calibration_prompts(concepts: tuple[Concept, ...], count: int = 128) -> list[str]:
    """Varied prompts for the quantizer: the sheet's, free ones, and fresh captions."""
    sampler = SceneSampler(concepts, seed=31)
    fresh = [sampler.sample().caption for _ in range(count)]
    return [*SHOWN, *FREE, *fresh][:count]
