"""The training of the transformer: rectified flow (Liu et al. 2022) with logit-normal times (Esser et al. 2024)."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recipe.autoencoder import Autoencoder
from recipe.latents import PIXELS_PER_TOKEN, LatentStore
from recipe.optimisers import Countdown, LearningRates, MovingAverage, Optimiser, warm_stable_decay
from recipe.parallel import autocast, same_everywhere
from recipe.prompted_flux import PromptedFlux, save_model, split_parameters
from recipe.rasteriser import SceneBatch
from recipe.settings import Settings
from recipe.sprites import SpriteBank
from recipe.text_encoders import null_tokens
from recipe.tokens import LENGTH

DROPPED_CAPTIONS = 0.1  # trained without a prompt, for classifier-free guidance
PLAIN_GUIDANCE = 1.0  # what the guidance input says before distillation
LOGIT_MEAN, LOGIT_STD = 0.3, 1.0


@dataclass(frozen=True, slots=True)
class Stage:
    """What every stage of the transformer needs."""

    settings: Settings
    bank: SpriteBank
    scenes: SceneBatch
    autoencoder: Autoencoder
    device: torch.device
    rank: int
    work: Path
    until: float  # time of day


def sample_sigma(count: int, device: torch.device) -> Tensor:
    return torch.sigmoid(torch.randn(count, device=device) * LOGIT_STD + LOGIT_MEAN)


def add_noise(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity d(latents) / d(sigma) that leads to them."""
    noise = torch.randn_like(latents)
    s = sigma[:, None, None]
    return (1 - s) * latents + s * noise, noise - latents


def flow_loss(model: PromptedFlux, latents: Tensor, tokens: Tensor, dropped: float = DROPPED_CAPTIONS) -> Tensor:
    """Mean squared error of the velocity."""
    count, device = len(latents), latents.device
    sigma = sample_sigma(count, device)
    noisy, velocity = add_noise(latents, sigma)
    drop = torch.rand(count, 1, device=device) < dropped
    tokens = torch.where(drop, null_tokens(tokens), tokens)
    with autocast(device):
        states, pooled = model.text(tokens)
        guidance = torch.full((count,), PLAIN_GUIDANCE, device=device)
        predicted = model(noisy, sigma, guidance, states, pooled)
    loss: Tensor = (predicted - velocity).square().mean()
    return loss


def compile_for_flow(model: PromptedFlux, px: int, batch: int, device: torch.device) -> None:
    """Compile blocks and text layers, and run one forward and backward pass of this shape."""
    begun = time.time()
    if device.type == "cuda":
        model.compile_blocks()
    tokens = torch.randint(3, 99, (batch, LENGTH), device=device)
    loss = flow_loss(model, torch.randn(batch, (px // PIXELS_PER_TOKEN) ** 2, 64, device=device), tokens)
    loss.backward()
    model.zero_grad(set_to_none=True)
    print(f"flow: {px} px compiled after {time.time() - begun:.0f} s", flush=True)


def train_flow(stage: Stage, model: PromptedFlux) -> None:
    """Train Flux and text encoders until `stage.until`, small pictures first. Rank 0 writes base.pt, .json."""
    settings, device = stage.settings, stage.device
    torch.manual_seed(3 + stage.rank)
    same_everywhere(model.parameters())
    if device.type == "cuda":
        stage.autoencoder.network.encoder.compile(dynamic=False)
    phases = ((settings.small_px, settings.small_batch), (settings.picture_px, settings.batch))
    optimiser = Optimiser(*split_parameters(model, with_text=True), LearningRates(muon=2e-3, adam=1e-3))
    average = MovingAverage(model, 0.999)
    history: list[dict[str, float]] = []
    samples = [0, 0]
    current, store = -1, None
    countdown = Countdown(stage.until)
    for done in countdown:
        phase = 0 if done < settings.small_share else 1
        px, batch = phases[phase]
        if store is None or phase != current:
            current, store = (
                phase,
                LatentStore(stage.autoencoder, stage.bank, stage.scenes, px, settings.ring, None),
            )
            store.fill(settings.ring // 16, batch)
        if countdown.steps % settings.reuse == 0:
            store.renew(batch)
        loss = flow_loss(model, *store.sample(batch))
        loss.backward()
        optimiser.step(warm_stable_decay(done))
        average.step()
        samples[phase] += batch
        if countdown.steps % 100 == 0 and stage.rank == 0:
            row = {"step": countdown.steps, "seconds": countdown.elapsed_s, "loss": loss.item(), "phase": phase,
                   "samples": sum(samples)}  # fmt: skip
            history.append(row)
            print("flow:", json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)
    if stage.rank == 0:
        with average.in_place():
            save_model(model, stage.work / "base.pt")
        report = {"samples_a_gpu": samples, "seconds": countdown.elapsed_s, "history": history}
        (stage.work / "base.json").write_text(json.dumps(report))
