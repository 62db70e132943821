"""Latents as image tokens, and a store of them that is renewed while the transformer trains."""

from __future__ import annotations

import torch
from torch import Tensor

from recipe.autoencoder import Autoencoder
from recipe.rasteriser import SceneBatch, rasterise
from recipe.sprites import SpriteBank

PIXELS_PER_TOKEN = 16  # the autoencoder makes 8 of 1, packing 2


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> image tokens (B, H / 2 * W / 2, 4 C), each 2 x 2 of all channels, as FLUX packs them."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack_latents(tokens: Tensor) -> Tensor:
    """The way back, for square pictures."""
    b, length, c = tokens.shape
    side = round(length**0.5)
    return tokens.view(b, side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * side, 2 * side)


def image_ids(picture_px: int, full_px: int, device: torch.device) -> Tensor:
    """(I, 3) positions (t, y, x). Smaller pictures spread over the places of the full grid."""
    side = picture_px // PIXELS_PER_TOKEN
    axis = (torch.arange(side, device=device) + 0.5) * (full_px / picture_px) - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).view(-1, 3)


class LatentStore:
    """A ring of encoded scenes with their tokens. `renew` draws new ones, `sample` takes a batch at random."""

    def __init__(
        self, autoencoder: Autoencoder, bank: SpriteBank, scenes: SceneBatch, picture_px: int, capacity: int,
        rows: Tensor | None = None,
    ) -> None:  # fmt: skip
        """rows: (N,) another row of the bank for each row, e.g. the 3D drawing for each flat one."""
        self.autoencoder, self.bank, self.scenes, self.picture_px = autoencoder, bank, scenes, picture_px
        self.rows = rows
        device = scenes.rows.device
        length = (picture_px // PIXELS_PER_TOKEN) ** 2
        self.latents = torch.empty(capacity, length, 64, dtype=torch.bfloat16, device=device)
        self.tokens = torch.empty(capacity, scenes.tokens.shape[1], dtype=torch.int16, device=device)
        self.filled = self.next = 0

    @torch.no_grad()
    def renew(self, count: int) -> None:
        scenes = self.scenes.sample(count)
        if self.rows is not None:
            scenes.rows.copy_(torch.where(scenes.rows < 0, scenes.rows, self.rows[scenes.rows.clamp(min=0).long()]))
        latents = self.autoencoder.encode(rasterise(self.bank, scenes, self.picture_px))
        capacity = len(self.latents)
        where = (torch.arange(count, device=latents.device) + self.next) % capacity
        self.latents[where] = pack_latents(latents).bfloat16()
        self.tokens[where] = scenes.tokens
        self.next = (self.next + count) % capacity
        self.filled = min(capacity, self.filled + count)

    def fill(self, count: int, batch: int) -> None:
        while self.filled < count:
            self.renew(batch)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Latents (count, I, 64) fp32 and tokens (count, 32) int64."""
        index = torch.randint(self.filled, (count,), device=self.latents.device)
        return self.latents[index].float(), self.tokens[index].long()
