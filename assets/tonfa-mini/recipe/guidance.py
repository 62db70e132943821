"""Guidance distillation (Meng et al. 2023): one pass of the student does what two passes of the teacher did."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from recipe.flow import Stage, add_noise, sample_sigma
from recipe.latents import PIXELS_PER_TOKEN, LatentStore
from recipe.optimisers import Countdown, LearningRates, MovingAverage, Optimiser, warm_stable_decay
from recipe.parallel import autocast, same_everywhere
from recipe.prompted_flux import PromptedFlux, load_model, save_model, split_parameters
from recipe.settings import Settings
from recipe.text_encoders import null_tokens
from recipe.tokens import LENGTH
from recipe.waiting import wait_for

STRONGEST = 6.0  # the student learns every cfg from 1 to this one as its guidance input


def distillation_loss(student: PromptedFlux, teacher: PromptedFlux, latents: Tensor, tokens: Tensor) -> Tensor:
    """Mean squared error against the teacher's guided velocity."""
    count, device = len(latents), latents.device
    sigma = sample_sigma(count, device)
    noisy, _ = add_noise(latents, sigma)
    guidance = 1 + (STRONGEST - 1) * torch.rand(count, device=device)
    with autocast(device):
        with torch.no_grad():
            states, pooled = teacher.text(torch.cat([tokens, null_tokens(tokens)]))
            both = teacher(
                noisy.repeat(2, 1, 1), sigma.repeat(2), torch.ones_like(guidance).repeat(2), states, pooled
            )
            with_prompt, without = both.chunk(2)
            target = without + guidance[:, None, None] * (with_prompt - without)
        predicted = student(noisy, sigma, guidance, states[:count], pooled[:count])
    loss: Tensor = (predicted - target).square().mean()
    return loss


def compile_for_distillation(
    student: PromptedFlux, teacher: PromptedFlux, settings: Settings, device: torch.device
) -> None:
    """Compile both networks and run one forward and backward pass."""
    if device.type == "cuda":
        student.compile_blocks(with_text=False)
        teacher.compile_blocks(with_text=False)
    length = (settings.picture_px // PIXELS_PER_TOKEN) ** 2
    noise = torch.randn(settings.batch, length, 64, device=device)
    tokens = torch.randint(3, 99, (settings.batch, LENGTH), device=device)
    distillation_loss(student, teacher, noise, tokens).backward()
    student.zero_grad(set_to_none=True)


def distil(stage: Stage, student: PromptedFlux, give_up: float) -> None:
    """Distil base.pt until `stage.until`; the text encoders stay as they are. Rank 0 writes distilled.pt."""
    settings, device = stage.settings, stage.device
    torch.manual_seed(6 + stage.rank)
    student.text.requires_grad_(False)
    teacher = student.twin().requires_grad_(False)
    compile_for_distillation(student, teacher, settings, device)
    store = LatentStore(stage.autoencoder, stage.bank, stage.scenes, settings.picture_px, settings.ring // 4)
    store.fill(len(store.latents) // 4, settings.batch)
    print("distil: ready", flush=True)
    wait_for(stage.work / "base.pt", give_up)
    load_model(student, stage.work / "base.pt")
    teacher.flux.load_state_dict(student.flux.state_dict())
    same_everywhere(student.flux.parameters())
    optimiser = Optimiser(*split_parameters(student, with_text=False), LearningRates(muon=6e-4, adam=3e-4))
    average = MovingAverage(student.flux, 0.99)
    countdown = Countdown(stage.until)
    for done in countdown:
        if countdown.steps % settings.reuse == 0:
            store.renew(settings.batch)
        loss = distillation_loss(student, teacher, *store.sample(settings.batch))
        loss.backward()
        optimiser.step(warm_stable_decay(done, 0.03, 0.6))
        average.step()
        if countdown.steps % 100 == 0 and stage.rank == 0:
            print(f"distil: step {countdown.steps} loss {loss.item():.4f} {countdown.elapsed_s:.0f} s", flush=True)
    if stage.rank == 0:
        with average.in_place():
            save_model(student, stage.work / "distilled.pt")
        report = {"steps": countdown.steps, "seconds": countdown.elapsed_s}
        (stage.work / "distilled.json").write_text(json.dumps(report))
