"""The sprite bank: every drawing, tinted drawing and field of dots on the device, at several sizes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.dataset import Catalogue
from recipe.palette import DOT_FIELDS, DOTTED_PLACES, FLAT, PLACES, TINTS, Dots

MIP_LEVELS = 4
CHUNK = 256
NEAR_HUE = 0.14  # hues this near to the main one turn with it
GREY_SATURATION = 0.12  # below this a drawing has no hue to turn and is painted instead


def tint(rgba: Tensor, hue: Tensor) -> Tensor:
    """Turn the main hue of drawings (B, 4, H, W), 0 .. 1, straight alpha, to `hue` (B,), 0 .. 1; value is kept."""
    rgb, alpha = rgba[:, :3], rgba[:, 3]
    high, low = rgb.amax(1), rgb.amin(1)
    chroma = high - low
    red, green, blue = rgb.unbind(1)
    safe = chroma.clamp(min=1e-6)
    sector = torch.where(
        high == red,
        ((green - blue) / safe) % 6,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    old_hue, saturation = sector / 6, chroma / high.clamp(min=1e-6)
    weight = saturation * alpha * (high > 0.15)
    angle = 2 * math.pi * old_hue
    main = torch.atan2((weight * angle.sin()).sum((1, 2)), (weight * angle.cos()).sum((1, 2))) / (2 * math.pi)
    main, target = main.view(-1, 1, 1) % 1, hue.view(-1, 1, 1)
    near = ((old_hue - main + 0.5) % 1 - 0.5).abs() < NEAR_HUE
    grey = (weight.sum((1, 2)) / alpha.sum((1, 2)).clamp(min=1e-6) < GREY_SATURATION).view(-1, 1, 1)
    new_hue = torch.where(grey, target, torch.where(near, (old_hue - main + target) % 1, old_hue))
    new_saturation = torch.where(grey, torch.full_like(saturation, 0.65), saturation)
    return torch.cat([_hsv_to_rgb(new_hue, new_saturation, high), alpha[:, None]], 1)


def _hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """(B, H, W) three times -> (B, 3, H, W)."""

    def channel(n: int) -> Tensor:
        k = (n + hue * 6) % 6
        return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], 1)


def dot_fields(dots: Dots, horizon: float, size_px: int, device: torch.device) -> Tensor:
    """(DOT_FIELDS, 4, size, size): the same kind of dots at random places, straight alpha."""
    rng = np.random.default_rng(0)
    shape = (DOT_FIELDS, dots.count)
    height = horizon - 0.06 if dots.above_horizon else 1.0
    x, y, r = (torch.from_numpy(v).float().to(device) for v in (
        rng.random(shape), rng.random(shape) * height, rng.uniform(*dots.radius, shape)))  # fmt: skip
    axis = (torch.arange(2 * size_px, device=device) + 0.5) / (2 * size_px)
    fields = []
    for i in range(DOT_FIELDS):
        dy, dx = axis[None, :, None] - y[i, :, None, None], axis[None, None] - x[i, :, None, None]
        inside = (dx**2 + dy**2 < r[i, :, None, None] ** 2).any(0)
        fields.append(F.avg_pool2d(inside[None].float(), 2))
    colour = torch.tensor(dots.colour, device=device).view(1, 3, 1, 1) / 255
    return torch.cat([colour.expand(DOT_FIELDS, 3, size_px, size_px), torch.stack(fields)], 1)


class SpriteBank:
    """levels[i]: (N, 4, S / 2^i, S / 2^i) uint8, premultiplied, rows as in the catalogue."""

    def __init__(self, catalogue: Catalogue, artworks: np.ndarray, device: torch.device) -> None:
        count, size_px = len(catalogue.rows), artworks.shape[1]
        self.size_px = size_px
        self.levels = [
            torch.empty(count, 4, size_px >> i, size_px >> i, dtype=torch.uint8, device=device)
            for i in range(MIP_LEVELS)
        ]
        row = 0
        for start in range(0, len(artworks), CHUNK):
            row = self._put(row, _to_device(artworks[start : start + CHUNK], device))
        flat = {key: i for i, (style, key) in enumerate(catalogue.artworks) if style == FLAT}
        hues = torch.tensor(list(TINTS.values()), device=device)
        keys = [key for key, _ in catalogue.tinted[:: len(TINTS)]]  # every tint of a key, then the next key
        for start in range(0, len(keys), CHUNK // 8):
            originals = _to_device(artworks[[flat[key] for key in keys[start : start + CHUNK // 8]]], device)
            row = self._put(row, tint(originals.repeat_interleave(len(hues), 0), hues.repeat(len(originals))))
        for name in DOTTED_PLACES:
            place = PLACES[name]
            assert place.dots is not None
            row = self._put(row, dot_fields(place.dots, place.horizon, size_px, device))
        assert row == count

    def _put(self, row: int, rgba: Tensor) -> int:
        """Store straight-alpha drawings (B, 4, S, S), 0 .. 1, from `row` on; returns the next free row."""
        pixels = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        for level in self.levels:
            level[row : row + len(rgba)] = (pixels * 255 + 0.5).to(torch.uint8)
            pixels = F.avg_pool2d(pixels, 2)
        return row + len(rgba)


def _to_device(rgba: np.ndarray, device: torch.device) -> Tensor:
    """(B, S, S, 4) uint8 -> (B, 4, S, S) fp32, 0 .. 1."""
    return torch.from_numpy(np.array(rgba)).to(device).permute(0, 3, 1, 2).float() / 255


def load_bank(work: Path, catalogue: Catalogue, device: torch.device) -> SpriteBank:
    return SpriteBank(catalogue, np.load(work / "artworks.npy", mmap_mode="r"), device)
