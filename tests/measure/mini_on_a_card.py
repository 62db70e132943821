"""Tonfa Mini on this card, held to the reference: per kernel, per step, whole pictures, and to itself.

    python tests/measure/mini_on_a_card.py [--prompts N] [--quick]

Teacher forcing: at each step of a picture the reference gets the card's latents, and each kernel's call is repeated
by the reference with the card's inputs. Whole pictures drift: where two codes are equally near, another sum takes
the other one, and later steps see it. "reference" is the card's arithmetic in fp32 on the processor, "16-bit" the
processor's w4a16: the same weights, activations as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import folders
from engine.checkpoints.bundle import Bundle, read_bundle
from engine.checkpoints.safetensors_file import open_safetensors
from engine.checkpoints.svdquant_file import read_svdquant_linear
from engine.device import Device, PlanChoice, choose_device, cpu
from engine.families.flux import linears_of, load_flux, plan_counts
from engine.pipelines.loaded_model import LoadedModel
from engine.pipelines.text_to_image import Drawn, Picture, pack, step_inputs, text_to_image
from engine.requests import BUILT_IN_MODEL
from engine.sampling.euler import denoise
from engine.sampling.noise import image_noise
from engine.sampling.sigmas import shifted_sigmas
from tests.measure.recorded_kernels import Recorder
from tests.tolerances import relative_error

PROMPTS = (
    "a red fox in the snow", "three green apples", "a pirate ship at sea", "a blue owl in space",
    "a yellow car on the beach", "two cats", "a purple dragon in the forest", "a slice of pizza",
)  # fmt: skip
PLANS = ("w4a4", "w4a8", "w4a16")
SEED = 7
ROUNDS = 15


def nothing() -> None:
    """Nobody stops this."""


def loaded(bundle: Bundle, device: Device, plan: str) -> LoadedModel:
    model = LoadedModel(bundle, device, PlanChoice(plan, "measured"), keep_all=True)  # type: ignore[arg-type]
    model.load()
    return model


def picture_of(bundle: Bundle, prompt: str, seed: int = SEED) -> Picture:
    card = bundle.card
    width, height = card.default_size
    return Picture(prompt, "", width, height, card.steps, seed, card.guidance, 1.0, previews=False)


def embedded(model: LoadedModel, prompt: str) -> tuple[Tensor, Tensor]:
    """What the network is told of a prompt: (1, T, C) and (1, P)."""
    (embeds,) = model.embeddings([prompt], nothing)
    return embeds.text.to(model.torch_device, model.dtype), embeds.pooled.to(model.torch_device, model.dtype)


def draw(model: LoadedModel, picture: Picture) -> Drawn:
    model.prepare(picture)
    *_, drawn = text_to_image(model, picture, nothing)
    assert isinstance(drawn, Drawn)
    return drawn


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def sha(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ teacher forcing


@torch.inference_mode()
def teacher_forced(bundle: Bundle, model: LoadedModel, plan: str, prompt: str) -> None:
    """One picture's steps on the card; the reference is asked beside every call of a kernel and every step."""
    picture = picture_of(bundle, prompt)
    file = open_safetensors(bundle.weights["transformer"].path)
    names = [one for one in linears_of(model.network.config) if one.kind == "quantized"]
    weights = {one.name: read_svdquant_linear(file, one.public, input_shift=one.input_shift) for one in names}
    recorder = Recorder(weights, torch.device("cpu"))
    reference = load_flux(file, plan, "cpu", model.dtype, fused=True)  # type: ignore[arg-type]
    (embeds,) = model.embeddings([prompt], nothing)
    text, pooled = (
        embeds.text.to(model.torch_device, model.dtype),
        embeds.pooled.to(model.torch_device, model.dtype),
    )
    errors: list[float] = []

    def predict(latents: Tensor, sigma: float) -> Tensor:
        inputs = step_inputs(picture, latents.to(model.dtype), text, pooled, sigma)
        with recorder.watching(model.network):
            velocity: Tensor = model.network(*inputs)
        expected = reference(*(None if one is None else one.cpu() for one in inputs))
        errors.append(relative_error(velocity.cpu(), expected))
        return velocity.float()

    rows, columns = picture.height // 8, picture.width // 8
    latents = pack(image_noise(picture.seed, model.latent_channels, rows, columns, "philox")).to(model.torch_device)
    sigmas = shifted_sigmas(picture.steps, float(bundle.shift), picture.num_tokens)  # type: ignore[arg-type]
    for _ in denoise(predict, latents, sigmas):
        pass
    print(f"\n### {plan}: {plan_counts(model.network)}\n\n{recorder.table()}\n")
    print("velocity, relative error of each step: " + ", ".join(f"{error:.4f}" for error in errors), flush=True)


# --------------------------------------------------------------------------------------------------- whole pictures


def compare_pictures(pixels: dict[str, list[np.ndarray]]) -> None:
    """PSNR tables over all prompts, from pictures by where and how they were drawn."""
    wide = pixels["cpu w4a16"]
    print("\n| pictures | PSNR in dB, median | lowest | |\n|---|---|---|---|")

    def row(what: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
        values = [psnr(one, other) for one, other in zip(a, b, strict=True)]
        print(f"| {what} | {median(values):.1f} | {min(values):.1f} | {', '.join(f'{v:.1f}' for v in values)} |")
        return median(values)

    for where in ("reference", "cpu"):
        for plan in PLANS:
            row(f"card {plan} - {where} {plan}", pixels[f"card {plan}"], pixels[f"{where} {plan}"])
    for where in ("cpu", "card"):
        for plan in PLANS:
            if (where, plan) != ("cpu", "w4a16"):
                row(f"{where} {plan} - 16-bit", pixels[f"{where} {plan}"], wide)


def one_hash(bundle: Bundle, model: LoadedModel, plan: str, loras: list[str]) -> None:
    """A picture twice; strength 0 with none, one and eight LoRAs; a LoRA that came and went."""
    picture = picture_of(bundle, PROMPTS[0])
    hashes = [sha(draw(model, picture).pixels) for _ in range(3)]
    zero = []
    for count in (0, 1, 8):
        model.set_loras([(loras[0], 0.0)] * count)
        zero += [sha(draw(model, picture).pixels) for _ in range(2)]
    model.set_loras([(loras[0], 0.8)])
    styled = sha(draw(model, picture).pixels)
    model.set_loras([])
    after = sha(draw(model, picture).pixels)
    same = len({*hashes, *zero, after}) == 1
    print(
        f"| {plan} | {'one hash' if len(set(hashes)) == 1 else hashes} | {'one hash' if same else zero} "
        f"| {'another picture' if styled not in hashes else 'THE SAME'} |",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------------ times


def milliseconds(run: Callable[[], object]) -> float:
    for _ in range(4):
        run()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1000)
    return median(times)


@torch.inference_mode()
def step_times(bundle: Bundle, model: LoadedModel, plan: str, loras: list[str]) -> None:
    picture = picture_of(bundle, PROMPTS[0])
    (embeds,) = model.embeddings([PROMPTS[0]], nothing)
    text, pooled = (
        embeds.text.to(model.torch_device, model.dtype),
        embeds.pooled.to(model.torch_device, model.dtype),
    )
    image = torch.randn(1, picture.num_tokens, model.network.config.in_channels, device=model.torch_device)
    inputs = step_inputs(picture, image.to(model.dtype), text, pooled, 0.5)
    cells = [f"{milliseconds(lambda: model.network(*inputs)):.2f}"]
    for count in (0, 1, 8):
        model.set_loras([(loras[0], 0.1)] * count)
        cells.append(f"{milliseconds(lambda: model.step(nothing, *inputs)):.2f}")
    model.set_loras([])
    print(f"| {plan} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--quick", action="store_true", help="no pictures by the processor")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    bundle = read_bundle(folders.find_model(BUILT_IN_MODEL))
    card = choose_device("cuda")
    loras = [one.file for one in bundle.card.loras]
    prompts = PROMPTS[: options.prompts]
    print(f"{card.name}, sm_{card.arch}, torch {torch.__version__}")
    models = {plan: loaded(bundle, card, plan) for plan in PLANS}
    print("\n| one step, ms | eager | graph | graph, 1 LoRA | graph, 8 LoRAs |\n|---|---|---|---|---|")
    for plan, model in models.items():
        model.prepare(picture_of(bundle, prompts[0]))
        step_times(bundle, model, plan, loras)
    print("\n| plan | a picture three times | strength 0 of 0, 1, 8 LoRAs, and after one was off | strength 0.8 |")
    print("|---|---|---|---|")
    for plan, model in models.items():
        one_hash(bundle, model, plan, loras)
    for plan, model in models.items():
        teacher_forced(bundle, model, plan, prompts[0])
    if options.quick:
        return
    pixels: dict[str, Any] = {}
    for plan in PLANS:
        pixels[f"card {plan}"] = [draw(models[plan], picture_of(bundle, prompt)).pixels for prompt in prompts]
        processor = loaded(bundle, cpu(), plan)
        pixels[f"cpu {plan}"] = [draw(processor, picture_of(bundle, prompt)).pixels for prompt in prompts]
        file = open_safetensors(bundle.weights["transformer"].path)
        processor._network = load_flux(file, plan, fused=True)
        pixels[f"reference {plan}"] = [draw(processor, picture_of(bundle, prompt)).pixels for prompt in prompts]
    compare_pictures(pixels)


if __name__ == "__main__":
    main()
