"""What the pictures are worth, in numbers; each number also for pictures drawn by code, which is its ceiling."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipe.autoencoder import Autoencoder
from recipe.contact_sheet import contact_sheet
from recipe.dataset import Array, Catalogue, pack
from recipe.image_towers import Judge
from recipe.palette import FLAT, THREE_D
from recipe.parallel import autocast
from recipe.prompted_flux import PromptedFlux
from recipe.prompts import FREE, SHOWN, Test, make_tests
from recipe.rasteriser import rasterise, to_device
from recipe.sampling import Sampler, generate
from recipe.settings import Settings
from recipe.sprites import SpriteBank
from recipe.tokens import encode, load_tokenizer

GOOD_DELTA_E, GOOD_HUE = 12.0, 25 / 360
SMALLEST_PART = 8  # of 64 x 64 cells
Scores = dict[str, float]


class Evaluation:
    """Fixed prompts, their true pictures, and the judge."""

    def __init__(
        self, catalogue: Catalogue, bank: SpriteBank, judge: Judge, settings: Settings, work: Path
    ) -> None:
        self.catalogue, self.bank, self.judge, self.settings = catalogue, bank, judge, settings
        self.device = bank.levels[0].device
        self.tokenizer = load_tokenizer(work / "tokenizer.json")
        self.tests = make_tests(catalogue.concepts, settings)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        return torch.from_numpy(encode(self.tokenizer, list(prompts))).long().to(self.device)

    def truth(self, tests: list[Test], style: str = FLAT) -> Tensor:
        """The pictures that the prompts mean, drawn by code."""
        scenes = [t.scene for t in tests]
        arrays = pack(scenes, self.catalogue, random.Random(1))
        if style == THREE_D:
            rows = self.catalogue.rows
            for i, t in enumerate(tests):
                arrays["rows"][i, 0] = rows.get((THREE_D, t.keys[0], None), arrays["rows"][i, 0])
        arrays["tokens"] = arrays["swapped"] = encode(self.tokenizer, [t.prompt for t in tests])
        return rasterise(self.bank, to_device(arrays, self.device), self.settings.picture_px)

    def draw(
        self, model: PromptedFlux, autoencoder: Autoencoder, prompts: Sequence[str], sampler: Sampler, seed: int = 2
    ) -> Tensor:
        return generate(model, autoencoder, self.tokens(prompts), sampler, seed)

    @torch.no_grad()
    def score(self, kind: str, pictures: Tensor) -> Scores:
        """The numbers that make sense for this kind of prompt."""
        tests = self.tests[kind]
        scores: Scores = {}
        with autocast(self.device):
            classes, vectors = self.judge(pictures)
            _, true_vectors = self.judge(self.truth(tests))
        first = torch.tensor([self.catalogue.concept_ids[t.keys[0]] for t in tests], device=self.device)
        pixels: Array = pictures.permute(0, 2, 3, 1).float().cpu().numpy()
        scores["likeness"] = (vectors * true_vectors).sum(1).mean().item()
        if kind == "relation":
            return scores | self._places(tests, pictures)
        top = classes.topk(5).indices
        scores["top1"] = (top[:, 0] == first).float().mean().item()
        scores["top5"] = (top == first[:, None]).any(1).float().mean().item()
        if kind in ("single", "background", "tint", "count"):
            errors = [
                float(np.linalg.norm(lab(border(p)) - lab(np.array(t.background) / 255)))
                for p, t in zip(pixels, tests, strict=True)
            ]
            scores["background_ok"] = float(np.mean(np.array(errors) < GOOD_DELTA_E))
        if kind == "count":
            scores["count_ok"] = float(np.mean([parts(p) == t.count for p, t in zip(pixels, tests, strict=True)]))
        if kind == "tint":
            off = [abs((main_hue(p) - t.hue + 0.5) % 1 - 0.5) for p, t in zip(pixels, tests, strict=True)]
            scores["tint_ok"] = float(np.mean(np.array(off) < GOOD_HUE))
        return scores

    def _places(self, tests: list[Test], pictures: Tensor) -> Scores:
        """Whether each of two things is where the prompt says, by the judge's answer for each half."""
        side = pictures.shape[-1]
        crops = []
        for i, t in enumerate(tests):
            for d in t.scene.drawings:
                left, top = (int(min(max(v * side - side // 4, 0), side // 2)) for v in (d.x, d.y))
                crops.append(pictures[i : i + 1, :, top : top + side // 2, left : left + side // 2])
        with autocast(self.device):
            classes, _ = self.judge(torch.cat(crops))
        classes = classes.view(len(tests), 2, -1)
        a, b = torch.tensor([[self.catalogue.concept_ids[k] for k in t.keys] for t in tests], device=self.device).T
        row = torch.arange(len(tests), device=self.device)
        placed = (classes[row, 0, a] > classes[row, 0, b]) & (classes[row, 1, b] > classes[row, 1, a])
        best = classes.argmax(2)
        return {
            "place_ok": placed.float().mean().item(),
            "both_top1": ((best[:, 0] == a) & (best[:, 1] == b)).float().mean().item(),
        }

    def full(self, model: PromptedFlux, autoencoder: Autoencoder, sampler: Sampler) -> dict[str, Scores]:
        """All kinds of prompts at one sampler."""
        result = {}
        for kind, tests in self.tests.items():
            pictures = self.draw(model, autoencoder, [t.prompt for t in tests], sampler)
            result[kind] = {k: round(v, 4) for k, v in self.score(kind, pictures).items()}
        return result

    def ceiling(self) -> dict[str, Scores]:
        return {
            kind: {k: round(v, 4) for k, v in self.score(kind, self.truth(tests)).items()}
            for kind, tests in self.tests.items()
        }

    def sweep(
        self, model: PromptedFlux, autoencoder: Autoencoder, samplers: Sequence[Sampler]
    ) -> dict[str, dict[str, float]]:
        """Singles and coloured backgrounds at several samplers."""
        table = {}
        for s in samplers:
            row: Scores = {}
            for kind in ("single", "background"):
                pictures = self.draw(model, autoencoder, [t.prompt for t in self.tests[kind]], s)
                row |= {f"{kind} {k}": round(v, 4) for k, v in self.score(kind, pictures).items()}
            table[f"steps {s.steps} guidance {s.guidance} cfg {s.cfg} shift {s.shift}"] = row
        return table

    def show(
        self, model: PromptedFlux, autoencoder: Autoencoder, prompts: Sequence[str], sampler: Sampler, path: Path,
        columns: int = 8, cell_px: int = 160, seed: int = 1,
    ) -> None:  # fmt: skip
        pictures = self.draw(model, autoencoder, prompts, sampler, seed)
        contact_sheet(pictures, prompts, path, columns, min(cell_px, self.settings.picture_px))

    def show_beside_truth(
        self, model: PromptedFlux, autoencoder: Autoencoder, sampler: Sampler, path: Path, count: int = 48
    ) -> None:
        """Singles: the drawing, then the model's picture."""
        tests = self.tests["single"][:count]
        pictures = self.draw(model, autoencoder, [t.prompt for t in tests], sampler)
        both = torch.stack([self.truth(tests), pictures], 1).flatten(0, 1)
        names = [words for t in tests for words in (t.prompt, "")]
        contact_sheet(both, names, path, 12, min(128, self.settings.picture_px))

    def by_strength(
        self, model: PromptedFlux, autoencoder: Autoencoder, set_strength: Callable[[float], None],
        strengths: Sequence[float], sheet: Path,
    ) -> dict[str, Scores]:  # fmt: skip
        """A LoRA's effect: how many singles are nearer to the 3D drawing than to the flat one and still known."""
        tests = self.tests["single"][:96]
        flat, solid = self.truth(tests), self.truth(tests, THREE_D)
        shown, rows, report = (*SHOWN[:12], *SHOWN[16:20]), [], {}
        sampler = Sampler(guidance=3.5)
        labels = torch.tensor([self.catalogue.concept_ids[t.keys[0]] for t in tests], device=self.device)
        for strength in strengths:
            set_strength(strength)
            rows.append(self.draw(model, autoencoder, shown, sampler, 1))
            pictures = self.draw(model, autoencoder, [t.prompt for t in tests], sampler)
            nearer = (pictures - solid).abs().mean((1, 2, 3)) < (pictures - flat).abs().mean((1, 2, 3))
            with autocast(self.device):
                classes, _ = self.judge(pictures)
            report[str(strength)] = {
                "nearer_3d": nearer.float().mean().item(),
                "top1": (classes.argmax(1) == labels).float().mean().item(),
            }
        contact_sheet(torch.cat(rows), [], sheet, len(shown), min(128, self.settings.picture_px))
        return report

    def free(self, model: PromptedFlux, autoencoder: Autoencoder, sampler: Sampler, path: Path) -> None:
        self.show(model, autoencoder, FREE, sampler, path)


def lab(rgb: Array) -> Array:
    """sRGB (..., 3), 0 .. 1 -> CIE L*a*b*, D65."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def border(picture: Array) -> Array:
    """(3,) median colour of a thin frame around a picture (H, W, 3)."""
    b = max(1, len(picture) // 64)
    strips = [picture[:b], picture[-b:], picture[:, :b], picture[:, -b:]]
    median: Array = np.median(np.concatenate([s.reshape(-1, 3) for s in strips]), axis=0)
    return median


def parts(picture: Array) -> int:
    """How many separate things stand on a plain background."""
    k = max(1, len(picture) // 64)
    side = len(picture) // k
    small = picture[: side * k, : side * k].reshape(side, k, side, k, 3).mean((1, 3))
    differs = np.abs(small - border(picture)).max(-1) > 0.1
    found = 0
    while differs.any():
        y, x = np.argwhere(differs)[0]
        found += _take_away(differs, int(y), int(x)) >= SMALLEST_PART
    return found


def _take_away(mask: Array, y: int, x: int) -> int:
    """Clear the connected part around (y, x); returns how large it was."""
    todo, size = [(y, x)], 0
    while todo:
        y, x = todo.pop()
        if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
            mask[y, x] = False
            size += 1
            todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return size


def main_hue(picture: Array) -> float:
    """The mean hue, 0 .. 1, weighted by saturation."""
    high, low = picture.max(-1), picture.min(-1)
    chroma = high - low
    safe = np.maximum(chroma, 1e-6)
    r, g, b = (picture[..., i] for i in range(3))
    sector = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    weight = chroma / np.maximum(high, 1e-6) * (high > 0.15) * (chroma > 0.12)
    return float(np.angle((weight * np.exp(2j * np.pi * sector / 6)).sum()) / (2 * np.pi) % 1)
