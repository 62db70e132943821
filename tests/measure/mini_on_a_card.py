"""Tonfa Mini on this card, held to the reference: per kernel, per step, whole pictures, and to itself.

    python tests/measure/mini_on_a_card.py [--prompts N] [--seeds N] [--quick]

Teacher forcing: at each step of a picture the reference gets the card's latents, and each kernel's call is repeated
by the reference with the card's inputs. Whole pictures drift: where two codes are equally near, another sum takes
the other one, and later steps see it; "noise moved" shows how far that goes on the processor alone. "processor" is
what a machine without a card draws, in fp32; "16 bit" its w4a16: the same weights, activations as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor

from engine import folders
from engine.checkpoints.bundle import Bundle, read_bundle
from engine.checkpoints.safetensors_file import open_safetensors
from engine.checkpoints.svdquant_file import read_svdquant_linear
from engine.device import Device, PlanChoice, choose_device, cpu
from engine.families.flux import linears_of, load_flux, plan_counts
from engine.models.flux import Flux
from engine.pipelines.loaded_model import LoadedModel
from engine.pipelines.text_to_image import Drawn, Picture, pack, step_inputs, text_to_image
from engine.requests import BUILT_IN_MODEL
from engine.sampling.euler import denoise
from engine.sampling.noise import image_noise
from engine.sampling.sigmas import shifted_sigmas
from tests.measure.recorded_kernels import Agreement, Recorder
from tests.tolerances import relative_error

PROMPTS = (
    "a red fox in the snow", "three green apples", "a pirate ship at sea", "a blue owl in space",
    "a yellow car on the beach", "two cats", "a purple dragon in the forest", "a slice of pizza",
)  # fmt: skip
PLANS = ("w4a4", "w4a8", "w4a16")
WIDE = "processor w4a16"  # the same weights, activations as they are: "16 bit"
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


def draw(model: LoadedModel, picture: Picture, noise: Tensor | None = None) -> Drawn:
    model.prepare(picture)
    *_, drawn = text_to_image(model, picture, nothing, noise=noise)
    assert isinstance(drawn, Drawn)
    return drawn


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def sha(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ teacher forcing


@dataclass(frozen=True, slots=True)
class Forced:
    """What teacher forcing found: kernels, and of each step the velocity's relative error."""

    recorder: Recorder
    errors: list[float]
    moved: list[float]  # the reference against itself, its input moved by up to one unit of h
    wide: list[float]  # the reference against w4a16: what quantizing activations does

    @property
    def kernels(self) -> dict[str, Agreement]:
        return self.recorder.found


@torch.inference_mode()
def teacher_forced(bundle: Bundle, model: LoadedModel, plan: str, prompt: str, steps: int | None = None) -> Forced:
    """A picture's first steps on the card; the reference is asked beside every call of a kernel and every step.

    Both compute in the same h. Where a result lies between two numbers of h, another order of sums takes the other
    one, and codes flip with it: no step can agree better than the reference does with itself, moved by a unit of h.
    """
    picture = picture_of(bundle, prompt)
    file = open_safetensors(bundle.weights["transformer"].path)
    names = [one for one in linears_of(model.network.config) if one.kind == "quantized"]
    weights = {one.name: read_svdquant_linear(file, one.public, input_shift=one.input_shift) for one in names}
    forced = Forced(Recorder(weights, torch.device("cpu")), [], [], [])
    references = [load_flux(file, one, "cpu", model.dtype, fused=True) for one in (plan, "w4a16")]  # type: ignore[arg-type]
    text, pooled = embedded(model, prompt)
    generator = torch.Generator().manual_seed(1)
    unit = torch.finfo(model.dtype).eps

    def predict(latents: Tensor, sigma: float) -> Tensor:
        inputs = step_inputs(picture, latents.to(model.dtype), text, pooled, sigma)
        with forced.recorder.watching(model.network):
            velocity: Tensor = model.network(*inputs)
        image, *others = (None if one is None else one.cpu() for one in inputs)
        assert image is not None
        expected, wide = (reference(image, *others) for reference in references)
        nudge = 1 + unit * (torch.rand(image.shape, generator=generator) - 0.5)
        moved = references[0]((image * nudge).to(model.dtype), *others)
        forced.errors.append(relative_error(velocity.cpu(), expected))
        forced.moved.append(relative_error(moved, expected))
        forced.wide.append(relative_error(wide, expected))
        return velocity.float()

    rows, columns = picture.height // 8, picture.width // 8
    latents = pack(image_noise(picture.seed, model.latent_channels, rows, columns, "philox")).to(model.torch_device)
    sigmas = shifted_sigmas(picture.steps, float(bundle.shift), picture.num_tokens)  # type: ignore[arg-type]
    for _ in islice(denoise(predict, latents, sigmas), steps):
        pass
    return forced


def show_forced(plan: str, network: Flux, forced: Forced) -> None:
    print(f"\n### {plan}: {plan_counts(network)}\n\n{forced.recorder.table()}\n")
    print("| velocity of a step, relative error | " + " | ".join(map(str, range(1, len(forced.errors) + 1))) + " |")
    print("|---" * (len(forced.errors) + 1) + "|")
    for what, errors in (
        ("card - reference", forced.errors),
        ("reference moved by a unit of h - reference", forced.moved),
        ("w4a16 - reference", forced.wide),
    ):
        print(f"| {what} | " + " | ".join(f"{error:.4f}" for error in errors) + " |", flush=True)


# --------------------------------------------------------------------------------------------------- whole pictures


def compare_pictures(pixels: Mapping[str, list[np.ndarray]]) -> None:
    """PSNR tables over all pictures, by where and how they were drawn, and what was promised of them."""
    print("\n| pictures | PSNR in dB, mean | median | lowest | highest |\n|---|---|---|---|---|")

    def row(a: str, b: str) -> float:
        values = [psnr(one, other) for one, other in zip(pixels[a], pixels[b], strict=True)]
        shown = (mean(values), median(values), min(values), max(values))
        print(f"| {a} - {b} | " + " | ".join(f"{value:.1f}" for value in shown) + " |")
        return mean(values)

    found = {plan: row(f"card {plan}", f"processor {plan}") for plan in PLANS}
    wide = {plan: row(f"processor {plan}", WIDE) for plan in PLANS if plan != "w4a16"}
    for plan in PLANS:
        row(f"card {plan}", WIDE)
    moved = row("processor w4a4, noise moved", "processor w4a4")
    print()
    ahead, control = found["w4a4"] - wide["w4a4"], moved - wide["w4a4"]
    nearer = wide["w4a8"] - wide["w4a4"]
    for wanted, reached in (
        (
            f"w4a4, card - processor is 4 dB above w4a4 - 16 bit: {ahead:.1f} dB (noise moved: {control:.1f})",
            ahead >= 4,
        ),
        (f"w4a8, card - processor is at least 38 dB: {found['w4a8']:.1f} dB", found["w4a8"] >= 38),
        (f"w4a8 is nearer to 16 bit than w4a4: by {nearer:.1f} dB", nearer > 0),
    ):
        print(f"- {'reached' if reached else 'NOT REACHED'}: {wanted}")


def moved_noise(bundle: Bundle, model: LoadedModel, picture: Picture) -> np.ndarray:
    """Each number of the first noise times 1 +- 2^-16: less than any 16-bit type can tell apart."""
    rows, columns = picture.height // 8, picture.width // 8
    noise = image_noise(picture.seed, model.latent_channels, rows, columns, picture.noise)
    nudge = torch.rand(noise.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return draw(model, picture, noise * (1 + 2**-15 * nudge)).pixels


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
    text, pooled = embedded(model, PROMPTS[0])
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
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
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
        show_forced(plan, model.network, teacher_forced(bundle, model, plan, prompts[0]))
    if options.quick:
        return
    many = [picture_of(bundle, prompt, seed) for seed in range(SEED, SEED + options.seeds) for prompt in prompts]
    pixels: dict[str, list[np.ndarray]] = {}
    for plan in PLANS:
        processor = loaded(bundle, cpu(), plan)
        pixels[f"card {plan}"] = [draw(models[plan], one).pixels for one in many]
        pixels[f"processor {plan}"] = [draw(processor, one).pixels for one in many]
        if plan == "w4a4":
            pixels["processor w4a4, noise moved"] = [moved_noise(bundle, processor, one) for one in many]
    compare_pictures(pixels)


if __name__ == "__main__":
    main()
