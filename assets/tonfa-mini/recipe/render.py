"""Drawings of all styles, brought to one frame: cropped to their ink, centred on a square with a thin margin."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from numpy.lib.format import open_memmap
from PIL import Image

from recipe.concepts import Concept, normal_key, read_concepts, save_concepts
from recipe.palette import FLAT, NOTO_STYLE, STYLES, THREE_D
from recipe.sources import FLUENT_3D, FLUENT_FLAT, NOTO, Source

RENDER_PX = 512  # an SVG is drawn at this size, then cropped and resized
MARGIN = 1.03
VISIBLE_ALPHA = 12


@dataclass(frozen=True, slots=True)
class Artwork:
    """One drawing: SVG text, or the path of a WebP file."""

    style: str
    key: str
    svg: str = ""
    path: str = ""


def svg_artworks(style: str, downloads: Path, source: Source) -> dict[str, Artwork]:
    """The drawings of an Iconify package by key."""
    folder = downloads / source.folder
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    characters: dict[str, str] = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    bodies, aliases = icons["icons"], icons.get("aliases", {})
    found: dict[str, Artwork] = {}
    for code_points, name in characters.items():
        while name in aliases:
            name = aliases[name]["parent"]
        if name in bodies:
            key = normal_key(code_points)
            found.setdefault(key, Artwork(style, key, svg=_document(icons, bodies[name])))
    return found


def _document(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    box = [icon.get("left", 0), icon.get("top", 0)]
    box += [icon.get(side, icons.get(side, 16)) for side in ("width", "height")]
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'


def webp_artworks(style: str, downloads: Path, source: Source) -> dict[str, Artwork]:
    files = (downloads / source.folder / "assets").glob("*.webp")
    return {key: Artwork(style, key, path=str(file)) for file in files for key in [normal_key(file.stem)]}


def gather(downloads: Path) -> tuple[list[Concept], list[Artwork]]:
    """Every concept that has a flat drawing, and all its drawings, in the order of STYLES, then of the concepts."""
    by_style = {
        FLAT: svg_artworks(FLAT, downloads, FLUENT_FLAT),
        NOTO_STYLE: svg_artworks(NOTO_STYLE, downloads, NOTO),
        THREE_D: webp_artworks(THREE_D, downloads, FLUENT_3D),
    }
    concepts = read_concepts(downloads, by_style[FLAT])
    artworks = [by_style[style][c.key] for style in STYLES for c in concepts if c.key in by_style[style]]
    return concepts, artworks


def draw(artwork: Artwork, size_px: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(size_px, size_px, 4) uint8 RGBA, straight alpha."""
    if artwork.path:
        image = Image.open(artwork.path).convert("RGBA")
    else:
        png = resvg_py.svg_to_bytes(
            svg_string=artwork.svg, width=RENDER_PX, height=RENDER_PX, skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = image.getchannel("A").point([255 if alpha > VISIBLE_ALPHA else 0 for alpha in range(256)]).getbbox()
    if box is None:
        raise ValueError(f"draw: {artwork.style} {artwork.key} is empty")
    image = image.crop(box)
    side = round(max(image.size) * MARGIN)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Premultiplied, so that the colour under transparent pixels does not bleed into the edge.
    square = square.convert("RGBa").resize((size_px, size_px), Image.Resampling.LANCZOS).convert("RGBA")
    return np.asarray(square)


def _draw_slice(job: tuple[Path, int, list[Artwork]]) -> None:
    path, start, artworks = job
    pixels = open_memmap(path, mode="r+")
    for row, artwork in enumerate(artworks, start):
        pixels[row] = draw(artwork, pixels.shape[1])
    pixels.flush()


def _slices(path: Path, artworks: list[Artwork], length: int = 16) -> Iterator[tuple[Path, int, list[Artwork]]]:
    for start in range(0, len(artworks), length):
        yield path, start, artworks[start : start + length]


def render_all(downloads: Path, work: Path, size_px: int, workers: int) -> None:
    """Write concepts.json, artworks.json ([[style, key], ...]) and artworks.npy (N, size, size, 4) uint8."""
    concepts, artworks = gather(downloads)
    save_concepts(concepts, work / "concepts.json")
    (work / "artworks.json").write_text(json.dumps([[a.style, a.key] for a in artworks]))
    path = work / "artworks.npy"
    open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(artworks), size_px, size_px, 4)).flush()
    with get_context("fork").Pool(workers) as pool:
        for _ in pool.imap_unordered(_draw_slice, _slices(path, artworks)):
            pass
