"""The autoencoder: diffusers' AutoencoderKL, 8 times smaller each way, 16 channels; and how it is trained."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from recipe.contact_sheet import contact_sheet
from recipe.optimisers import Countdown, LearningRates, MovingAverage, Optimiser, warm_stable_decay
from recipe.parallel import autocast, channels_last, eager
from recipe.rasteriser import SceneBatch, rasterise
from recipe.settings import Settings
from recipe.sprites import SpriteBank

CHANNELS = 16
EARLY = 0.25  # of the time: a first version is saved, with which other stages can be tried
KL_WEIGHT = 3e-4
NOISE = 0.2  # parts of the latents' deviation: the decoder learns to forgive what the transformer gets wrong


def autoencoder_config(settings: Settings) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": CHANNELS,
        "block_out_channels": list(settings.autoencoder_channels),
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }


class Autoencoder(nn.Module):
    """The network with the latents' mean and deviation, so that what leaves `encode` is N(0, 1) a channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.config = autoencoder_config(settings)
        self.network: Any = AutoencoderKL(**self.config)
        self.register_buffer("mean", torch.zeros(1, CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(1, CHANNELS, 1, 1))

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) 0 .. 1 -> mean and log variance of the raw latents, each (B, 16, H / 8, W / 8)."""
        x = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
        mean, log_variance = self.network.encoder(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 4)

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Raw latents -> (B, 3, H, W), about 0 .. 1."""
        decoded: Tensor = self.network.decoder(raw.contiguous(memory_format=torch.channels_last))
        return decoded.float() * 0.5 + 0.5

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        with autocast(pictures.device):
            return (self.moments(pictures)[0] - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with autocast(latents.device):
            return self.reconstruct(latents * self.std + self.mean).clamp(0, 1)


def mosaic(x: Tensor) -> Tensor:
    """Four maps at half size in one: (B, C, H, W) -> (B / 4, C, H, W)."""
    half = F.avg_pool2d(x, 2)
    b, c, h, w = half.shape
    return half.view(b // 4, 2, 2, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(b // 4, c, 2 * h, 2 * w)


def reconstruction_loss(model: Autoencoder, pictures: Tensor) -> Tensor:
    """L1, edges, squared error and KL; a quarter of the batch is decoded from latents at half size.

    The half-size part makes the coarse content of latents the coarse content of the picture, which a transformer
    learns sooner (Kouzelis et al. 2025, "EQ-VAE").
    """
    mean, log_variance = model.moments(pictures)
    noise = NOISE * mean.detach().std() * torch.rand(len(mean), 1, 1, 1, device=mean.device)
    raw = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() + torch.randn_like(mean) * noise
    fourth = len(raw) // 4
    quarter = fourth - fourth % 4
    if quarter:
        raw = torch.cat([raw[:-quarter], mosaic(raw[-quarter:])])
        pictures = torch.cat([pictures[:-quarter], mosaic(pictures[-quarter:])])
    error = 2 * (model.reconstruct(raw) - pictures)  # in units of -1 .. 1
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + 0.5 * edges + 4 * error.square().mean() + KL_WEIGHT * kl


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) dB of pictures in 0 .. 1."""
    return -10 * torch.log10((a.float() - b.float()).square().mean((1, 2, 3)).clamp(min=1e-9))


@torch.no_grad()
def measure_statistics(model: Autoencoder, bank: SpriteBank, scenes: SceneBatch, settings: Settings) -> None:
    """Set the latents' mean and deviation a channel from 1,024 pictures."""
    total = min(1024, len(scenes))
    parts = []
    for start in range(0, total, 64):
        index = torch.arange(start, min(start + 64, total), device=scenes.rows.device)
        with autocast(index.device):
            parts.append(model.moments(rasterise(bank, scenes.at(index), settings.picture_px))[0])
    raw = torch.cat(parts)
    model.mean.copy_(raw.mean((0, 2, 3)).view_as(model.mean))
    model.std.copy_(raw.std((0, 2, 3)).view_as(model.std))


@torch.no_grad()
def evaluate_autoencoder(
    model: Autoencoder, bank: SpriteBank, scenes: SceneBatch, px: int, total: int
) -> dict[str, float]:
    """PSNR over held-out pictures of `px`."""
    values = []
    for start in range(0, total, 64):
        index = torch.arange(start, min(start + 64, total), device=scenes.rows.device)
        pictures = rasterise(bank, scenes.at(index), px)
        values.append(psnr(pictures, model.decode(model.encode(pictures))))
    db = torch.cat(values)
    return {"psnr_mean": db.mean().item(), "psnr_worst": db.min().item(), "pictures": float(total)}


def train_autoencoder(
    bank: SpriteBank, scenes: SceneBatch, held_out: SceneBatch, settings: Settings, until: float, work: Path
) -> None:
    """Train until the time of day `until`; writes autoencoder.pt, .json and a sheet of reconstructions."""
    torch.manual_seed(1)
    device = scenes.rows.device
    model = channels_last(Autoencoder(settings), device)
    if device.type == "cuda":
        model.network.encoder.compile(dynamic=False)
        model.network.decoder.compile(dynamic=False)
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 4 and "conv_in" not in n and "conv_out" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    optimiser = Optimiser(matrices, others, LearningRates(muon=2e-3, adam=1.5e-3), weight_decay=1e-4)
    average = MovingAverage(model, 0.998)

    def step(scale: float) -> Tensor:
        pictures = rasterise(bank, scenes.sample(settings.autoencoder_batch), settings.picture_px)
        with autocast(device):
            loss = reconstruction_loss(model, pictures)
        loss.backward()
        optimiser.step(scale)
        return loss.detach()

    begun = time.time()
    step(1e-6)
    print(f"autoencoder: first step after {time.time() - begun:.0f} s", flush=True)
    countdown = Countdown(until)
    early = True
    for done in countdown:
        loss = step(warm_stable_decay(done, 0.02, 0.5))
        average.step()
        if early and done > EARLY:
            early = False
            with average.in_place(), eager():
                save_autoencoder(model, bank, scenes, settings, work)
        if countdown.steps % 200 == 0:
            rate = countdown.steps * settings.autoencoder_batch / max(countdown.elapsed_s, 1e-3)
            print(f"autoencoder: step {countdown.steps} loss {loss.item():.4f}, {rate:.0f} pictures/s", flush=True)
    with average.in_place(), torch.no_grad(), eager():
        model.eval()
        save_autoencoder(model, bank, scenes, settings, work)
        report = evaluate_autoencoder(model, bank, held_out, settings.picture_px, min(512, len(held_out)))
        small = evaluate_autoencoder(model, bank, held_out, settings.small_px, min(256, len(held_out)))
        report |= {f"small_{k}": v for k, v in small.items()} | {"steps": float(countdown.steps)}
        report["latent_std_mean"] = model.std.mean().item()
        pictures = rasterise(bank, held_out.at(torch.arange(12, device=device)), settings.picture_px)
        both = torch.cat([pictures, model.decode(model.encode(pictures))])
        contact_sheet(both, [], work / "autoencoder.png", 12, min(192, settings.picture_px))
    (work / "autoencoder.json").write_text(json.dumps(report))
    print("autoencoder:", report, flush=True)


def save_autoencoder(
    model: Autoencoder, bank: SpriteBank, scenes: SceneBatch, settings: Settings, work: Path
) -> None:
    """Write autoencoder.pt, with the statistics of its latents."""
    measure_statistics(model, bank, scenes, settings)
    partial = work / "autoencoder.partial"
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, partial)
    partial.rename(work / "autoencoder.pt")


def load_autoencoder(path: Path, settings: Settings, device: torch.device) -> Autoencoder:
    model = Autoencoder(settings)
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return channels_last(model, device).eval().requires_grad_(False)
