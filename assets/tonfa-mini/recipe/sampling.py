"""Pictures from prompts: Euler steps of the flow, with or without classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from recipe.autoencoder import Autoencoder
from recipe.latents import PIXELS_PER_TOKEN, unpack_latents
from recipe.parallel import autocast, eager
from recipe.prompted_flux import PromptedFlux
from recipe.text_encoders import null_tokens

BATCH = 128


@dataclass(frozen=True, slots=True)
class Sampler:
    """`guidance` is what a distilled network is told; `cfg` mixes two predictions, 1 = one prediction."""

    steps: int = 8
    guidance: float = 1.0
    cfg: float = 1.0
    shift: float = 2.0


def sigmas(steps: int, shift: float) -> list[float]:
    """1 -> 0 in `steps` steps; a larger shift spends more of them on noise."""
    line = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in line]


@torch.no_grad()
def sample_latents(model: PromptedFlux, tokens: Tensor, sampler: Sampler, seed: int) -> Tensor:
    """tokens (B, 32) -> image tokens (B, I, 64)."""
    device, count = tokens.device, len(tokens)
    generator = torch.Generator(device).manual_seed(seed)
    length = (model.settings.picture_px // PIXELS_PER_TOKEN) ** 2
    latents = torch.randn(count, length, 64, device=device, generator=generator)
    twice = sampler.cfg != 1
    with autocast(device):
        states, pooled = model.text(torch.cat([tokens, null_tokens(tokens)]) if twice else tokens)
        guidance = torch.full((len(states),), sampler.guidance, device=device)
        for sigma, following in pairwise(sigmas(sampler.steps, sampler.shift)):
            level = torch.full((len(states),), sigma, device=device)
            velocity = model(latents.repeat(2, 1, 1) if twice else latents, level, guidance, states, pooled)
            if twice:
                with_prompt, without = velocity.chunk(2)
                velocity = without + sampler.cfg * (with_prompt - without)
            latents = latents + (following - sigma) * velocity
    return latents


@torch.no_grad()
def generate(model: PromptedFlux, autoencoder: Autoencoder, tokens: Tensor, sampler: Sampler, seed: int) -> Tensor:
    """tokens (B, 32) -> pictures (B, 3, H, W), 0 .. 1. Batches differ in their noise."""
    pictures = []
    with eager():  # odd batch sizes are not worth compiling
        for i, batch in enumerate(tokens.long().split(BATCH)):
            latents = sample_latents(model, batch, sampler, seed * 1000 + i)
            pictures.append(autoencoder.decode(unpack_latents(latents)))
    return torch.cat(pictures)
