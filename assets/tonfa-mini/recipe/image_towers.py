"""Small convolutional image towers; and the judge, which scores pictures and never takes part in their training."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe.parallel import channels_last
from recipe.rasteriser import SceneBatch
from recipe.settings import Settings
from recipe.tokens import LENGTH, PAD_ID

WIDTH = 256  # of the shared space of pictures and texts


def _convolution(inside: int, outside: int, stride: int) -> nn.Sequential:
    layers = [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(channels, channels, 1), nn.SiLU(), _convolution(channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.body(x))


class ImageTower(nn.Module):
    """Pictures (B, 3, P, P) 0 .. 1 -> class logits (B, concepts), unit vectors (B, 256)."""

    def __init__(self, num_concepts: int, widths: tuple[int, ...], picture_px: int) -> None:
        super().__init__()
        self.width = WIDTH
        self.stem = nn.Sequential(_convolution(3, 48, 2), nn.SiLU())
        layers: list[nn.Module] = []
        inside = 48
        for width in widths:
            layers += [_convolution(inside, width, 2), nn.SiLU(), Residual(width), Residual(width)]
            inside = width
        self.body = nn.Sequential(*layers)
        cells = (picture_px // 2 ** (len(widths) + 1)) ** 2
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(inside * cells, 512), nn.SiLU())
        self.classes = nn.Linear(512, num_concepts)
        self.vector = nn.Linear(512, WIDTH)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        x = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
        x = self.head(self.body(self.stem(x)))
        return self.classes(x), F.normalize(self.vector(x).float(), dim=-1)


class Judge(nn.Module):
    """An image tower and a text tower of its own, other seed and other kind than the encoders that are shipped."""

    def __init__(self, num_concepts: int, settings: Settings) -> None:
        super().__init__()
        self.picture_px = settings.judge_px
        self.tower = ImageTower(num_concepts, (48, 96, 160, 224), settings.judge_px)
        self.embed = nn.Embedding(settings.vocab_size, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 768, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.7))

    def text(self, tokens: Tensor) -> Tensor:
        padding = tokens == PAD_ID
        states = self.layers(self.embed(tokens) + self.position, src_key_padding_mask=padding)
        mask = (~padding).float()[..., None]
        return F.normalize(self.out((states * mask).sum(1) / mask.sum(1)).float(), dim=-1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures of any size; see ImageTower."""
        if pictures.shape[-1] > self.picture_px:
            pictures = F.interpolate(pictures, size=(self.picture_px, self.picture_px), mode="area")
        elif pictures.shape[-1] < self.picture_px:
            side = (self.picture_px, self.picture_px)
            pictures = F.interpolate(pictures, size=side, mode="bilinear", align_corners=False)
        classes, vectors = self.tower(pictures)
        return classes.float(), vectors


def judge_loss(judge: Judge, pictures: Tensor, scenes: SceneBatch, concepts: Tensor) -> Tensor:
    classes, image = judge(pictures)
    logits = judge.scale.exp().clamp(max=100) * image @ judge.text(scenes.tokens.long()).T
    target = torch.arange(len(logits), device=logits.device)
    matching = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return matching + F.cross_entropy(classes.float(), concepts)


def load_judge(path: Path, num_concepts: int, settings: Settings, device: torch.device) -> Judge:
    judge = Judge(num_concepts, settings)
    state = torch.load(path, map_location="cpu", weights_only=True)
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return channels_last(judge, device).eval().requires_grad_(False)
