"""Styles, colours and backdrops: what the words of a caption look like."""

from __future__ import annotations

from dataclasses import dataclass

FLAT, NOTO_STYLE, THREE_D = "flat", "noto", "3d"  # Fluent flat, Noto, Fluent 3D
STYLES = (FLAT, NOTO_STYLE, THREE_D)

RGB = tuple[float, float, float]  # 0 .. 255

COLOURS: dict[str, RGB] = {
    "white": (255, 255, 255), "black": (20, 20, 22), "grey": (140, 143, 148), "red": (214, 48, 49),
    "orange": (243, 134, 48), "yellow": (250, 210, 60), "green": (62, 166, 82), "teal": (32, 160, 155),
    "blue": (52, 116, 220), "purple": (128, 76, 200), "pink": (243, 130, 176), "brown": (128, 84, 56),
    "light blue": (170, 214, 248), "light green": (186, 230, 180), "light pink": (252, 214, 226),
    "dark blue": (24, 40, 96), "dark green": (20, 74, 46), "dark red": (110, 18, 26), "cream": (252, 243, 219),
    "beige": (226, 206, 176), "lavender": (210, 196, 240), "mint": (188, 238, 214),
}  # fmt: skip
COLOUR_SYNONYMS: dict[str, tuple[str, ...]] = {
    "grey": ("grey", "gray"),
    "light blue": ("light blue", "sky blue", "pale blue"),
    "dark blue": ("dark blue", "navy"),
    "light pink": ("light pink", "pale pink"),
    "light green": ("light green", "pale green"),
    "purple": ("purple", "violet"),
}
GRADIENT_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "teal")
# Hue (0 .. 1) to which the main colour of a drawing is turned.
TINTS: dict[str, float] = {
    "red": 0.0, "orange": 0.075, "yellow": 0.14, "green": 0.35, "blue": 0.6, "purple": 0.76, "pink": 0.91,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dots:
    """Stars, snow or bubbles: `radius` is a range in parts of the picture's side."""

    count: int
    colour: RGB
    radius: tuple[float, float]
    above_horizon: bool


@dataclass(frozen=True, slots=True)
class Place:
    """A backdrop with a name. `horizon` and `hill` are in parts of the height; no ground: horizon 1."""

    phrases: tuple[str, ...]
    top: RGB
    bottom: RGB
    ground: RGB | None
    horizon: float
    hill: float
    dots: Dots | None = None


PLACES: dict[str, Place] = {
    "meadow": Place(
        ("in a meadow", "on a green meadow", "in the grass", "on grass under a blue sky"),
        (120, 190, 245), (214, 238, 252), (98, 180, 84), 0.68, 0.03,
    ),
    "night": Place(
        ("at night", "under the stars", "under a starry night sky"),
        (12, 16, 48), (44, 52, 108), (28, 48, 58), 0.82, 0.02, Dots(26, (255, 250, 210), (0.003, 0.008), True),
    ),
    "beach": Place(
        ("on the beach", "at the beach", "on the sand by the sea"),
        (126, 206, 246), (60, 150, 214), (240, 216, 160), 0.72, 0.015,
    ),
    "sea": Place(
        ("underwater", "under water", "in the deep sea"),
        (64, 168, 226), (14, 66, 130), None, 1.0, 0.0, Dots(14, (196, 232, 250), (0.008, 0.022), False),
    ),
    "desert": Place(
        ("in the desert", "on a sand dune"), (250, 220, 160), (252, 236, 202), (222, 166, 92), 0.66, 0.05,
    ),
    "snow": Place(
        ("in the snow", "in winter", "on a snowy day"),
        (168, 196, 222), (222, 234, 244), (248, 250, 254), 0.7, 0.04,
        Dots(34, (255, 255, 255), (0.006, 0.014), False),
    ),
    "sunset": Place(
        ("at sunset", "at dusk", "in front of an orange sunset"),
        (94, 56, 132), (252, 158, 84), (66, 44, 66), 0.78, 0.02,
    ),
    "space": Place(
        ("in space", "in outer space", "among the stars"),
        (8, 6, 22), (24, 14, 50), None, 1.0, 0.0, Dots(46, (255, 255, 255), (0.002, 0.007), False),
    ),
    "room": Place(
        ("in a room", "on a wooden floor", "on a table"),
        (236, 226, 208), (228, 214, 192), (164, 110, 68), 0.74, 0.0,
    ),
}  # fmt: skip
DOT_FIELDS = 48  # pre-drawn fields of dots a place; a scene takes one of them
DOTTED_PLACES = tuple(name for name, place in PLACES.items() if place.dots is not None)
