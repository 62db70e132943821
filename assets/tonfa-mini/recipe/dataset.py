"""Scenes in bulk: sampled on all processor cores, kept as arrays."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from recipe.concepts import Concept, load_concepts
from recipe.palette import DOT_FIELDS, DOTTED_PLACES, FLAT, TINTS
from recipe.scenes import Scene, SceneSampler, is_tintable
from recipe.tokens import encode, load_tokenizer, train_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
MAX_DRAWINGS = 7  # six things and a field of dots
SHARD = 5000
HELD_OUT = "held_out"  # the shard that no training sees


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every row of the sprite bank: drawings, tinted drawings, fields of dots; and the concepts' numbers."""

    concepts: tuple[Concept, ...]
    artworks: tuple[tuple[str, str], ...]  # (style, key), the rows of artworks.npy
    tinted: tuple[tuple[str, str], ...]  # (key, tint), made from the flat drawings
    rows: dict[tuple[str, str, str | int | None], int]
    concept_ids: dict[str, int]

    @classmethod
    def load(cls, work: Path) -> Catalogue:
        concepts = tuple(load_concepts(work / "concepts.json"))
        artworks = tuple((style, key) for style, key in json.loads((work / "artworks.json").read_text()))
        tinted = tuple((c.key, tint) for c in concepts if is_tintable(c) for tint in TINTS)
        names: list[tuple[str, str, str | int | None]] = [(style, key, None) for style, key in artworks]
        names += [(FLAT, key, tint) for key, tint in tinted]
        names += [("dots", place, field) for place in DOTTED_PLACES for field in range(DOT_FIELDS)]
        rows = {name: row for row, name in enumerate(names)}
        return cls(concepts, artworks, tinted, rows, {c.key: i for i, c in enumerate(concepts)})


def pack(scenes: Sequence[Scene], catalogue: Catalogue, rng: random.Random) -> dict[str, Array]:
    """Scenes as arrays: backdrop (N, 13) fp32, rows (N, 7) int32, places (N, 7, 3) fp32, concepts (N, 7) int16.

    backdrop: top, bottom and ground colour (0 .. 1), whether there is a ground, horizon, hill, phase.
    rows: of the sprite bank, painted in order, -1 = none; places: x, y, size; concepts: -1 = none.
    """
    n = len(scenes)
    backdrop = np.zeros((n, 13), np.float32)
    rows = np.full((n, MAX_DRAWINGS), -1, np.int32)
    places = np.zeros((n, MAX_DRAWINGS, 3), np.float32)
    concepts = np.full((n, MAX_DRAWINGS), -1, np.int16)
    for i, scene in enumerate(scenes):
        b = scene.backdrop
        colours = [c / 255 for rgb in (b.top, b.bottom, b.ground or (0.0, 0.0, 0.0)) for c in rgb]
        backdrop[i] = [*colours, float(b.ground is not None), b.horizon, b.hill, b.phase]
        layer = 0
        if b.dots is not None:
            rows[i, 0] = catalogue.rows["dots", b.dots, rng.randrange(DOT_FIELDS)]
            places[i, 0] = (0.5, 0.5, 1.0)
            layer = 1
        for j, d in enumerate(scene.drawings, layer):
            rows[i, j] = catalogue.rows[d.style, d.key, d.tint]
            places[i, j] = (d.x, d.y, d.size)
            concepts[i, j] = catalogue.concept_ids[d.key]
    return {"backdrop": backdrop, "rows": rows, "places": places, "concepts": concepts}


def _write_shard(job: tuple[Path, int, str, int]) -> None:
    """Sample, pack and tokenize one shard. `swapped` (N, 32) is all zero where a scene has no swapped caption."""
    work, seed, name, count = job
    catalogue = Catalogue.load(work)
    sampler = SceneSampler(catalogue.concepts, seed)
    scenes = [sampler.sample() for _ in range(count)]
    tokenizer = load_tokenizer(work / "tokenizer.json")
    arrays = pack(scenes, catalogue, sampler.random)
    arrays["tokens"] = encode(tokenizer, [s.caption for s in scenes])
    swapped = encode(tokenizer, [s.swapped for s in scenes])
    swapped[[not s.swapped for s in scenes]] = 0
    arrays["swapped"] = swapped
    partial = work / "scenes" / f"{name}.partial.npz"
    np.savez(partial, allow_pickle=False, **arrays)
    partial.rename(work / "scenes" / f"{name}.npz")


def write_scenes(work: Path, count: int, workers: int) -> None:
    """Write `count` training scenes in shards, and one shard of held-out scenes."""
    (work / "scenes").mkdir(exist_ok=True)
    jobs = [(work, 1000 + i, f"train_{i:04d}", min(SHARD, count)) for i in range(max(1, count // SHARD))]
    jobs.append((work, 7, HELD_OUT, min(2048, count)))
    with get_context("fork").Pool(workers) as pool:
        for _ in pool.imap_unordered(_write_shard, jobs):
            pass


def fit_tokenizer(work: Path, captions: int = 120_000) -> None:
    """Train tokenizer.json on sampled captions, every name of every concept among them."""
    concepts = load_concepts(work / "concepts.json")
    sampler = SceneSampler(concepts, seed=5)
    texts = [sampler.sample().caption for _ in range(captions)]
    texts += [name for c in concepts for name, _ in c.names] * 3
    train_tokenizer(texts).save(str(work / "tokenizer.json"))


def read_scenes(work: Path, held_out: bool) -> dict[str, Array]:
    """All shards of one kind, joined."""
    files = sorted((work / "scenes").glob(f"{HELD_OUT if held_out else 'train_*'}.npz"))
    shards = [np.load(file) for file in files]
    return {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0].files}
