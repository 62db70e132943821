"""Draws scenes in batches on the device: backdrop, then each drawing over it, at twice the size, then averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.dataset import Array
from recipe.sprites import MIP_LEVELS, SpriteBank

SUPERSAMPLING = 2
GROUND_SHADE = 0.12  # how much darker the ground is at the lower edge


@dataclass(frozen=True, slots=True)
class SceneBatch:
    """Packed scenes on the device; fields as `dataset.pack` and `dataset._write_shard` say."""

    backdrop: Tensor
    rows: Tensor
    places: Tensor
    concepts: Tensor
    tokens: Tensor
    swapped: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: Tensor) -> SceneBatch:
        return SceneBatch(
            self.backdrop[index], self.rows[index], self.places[index], self.concepts[index], self.tokens[index],
            self.swapped[index],
        )  # fmt: skip

    def sample(self, count: int) -> SceneBatch:
        return self.at(torch.randint(len(self), (count,), device=self.rows.device))


def to_device(arrays: dict[str, Array], device: torch.device) -> SceneBatch:
    return SceneBatch(**{key: torch.from_numpy(value).to(device) for key, value in arrays.items()})


def paint_backdrop(backdrop: Tensor, side: int) -> Tensor:
    """(B, 13) -> (B, 3, side, side)."""
    axis = (torch.arange(side, device=backdrop.device) + 0.5) / side
    x, y = axis.view(1, 1, 1, side), axis.view(1, 1, side, 1)
    b = backdrop[:, :, None, None]
    top, bottom, ground, has_ground, horizon = b[:, 0:3], b[:, 3:6], b[:, 6:9], b[:, 9:10], b[:, 10:11]
    down = (y / horizon.clamp(min=0.01)).clamp(0, 1)
    sky = top * (1 - down) + bottom * down
    below = y > horizon + b[:, 11:12] * torch.sin(2 * torch.pi * x + b[:, 12:13])
    shade = 1 - GROUND_SHADE * (y - horizon) / (1 - horizon).clamp(min=0.01)
    return torch.where(below & (has_ground > 0.5), ground * shade, sky.expand(-1, -1, -1, side))


@torch.no_grad()
def rasterise(bank: SpriteBank, scenes: SceneBatch, size_px: int) -> Tensor:
    """(B, 3, size_px, size_px) fp32 in 0 .. 1."""
    side = size_px * SUPERSAMPLING
    canvas = paint_backdrop(scenes.backdrop, side)
    shrink = bank.size_px / (scenes.places[..., 2].clamp(min=1e-3) * side)  # texels a pixel, (B, layers)
    level = (shrink.log2() + 0.4).floor().clamp(0, MIP_LEVELS - 1)
    level = torch.where(scenes.rows >= 0, level, torch.full_like(level, -1))
    for layer in range(scenes.rows.shape[1]):
        for i, sprites in enumerate(bank.levels):
            which = (level[:, layer] == i).nonzero()[:, 0]
            if len(which):
                drawn = _place(sprites[scenes.rows[which, layer].long()], scenes.places[which, layer], side)
                canvas[which] = canvas[which] * (1 - drawn[:, 3:]) + drawn[:, :3]
    return F.avg_pool2d(canvas, SUPERSAMPLING).clamp(0, 1)


def _place(sprites: Tensor, places: Tensor, side: int) -> Tensor:
    """Sprites (B, 4, S, S) uint8 at x, y, size (B, 3) on an empty canvas: (B, 4, side, side), premultiplied."""
    x, y, size = places.unbind(1)
    theta = torch.zeros(len(places), 2, 3, device=places.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
    theta[:, 0, 2], theta[:, 1, 2] = (1 - 2 * x) / size, (1 - 2 * y) / size
    grid = F.affine_grid(theta, [len(places), 4, side, side], align_corners=False)
    return F.grid_sample(sprites.float() / 255, grid, align_corners=False)
