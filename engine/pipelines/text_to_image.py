"""Prompt to pixels: encode, noise, denoise, decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.events import Pixels
from engine.pipelines.image_decoder import DecodeKind
from engine.problems import bad_file, bad_request
from engine.requests import NoiseKind
from engine.sampling.euler import denoise
from engine.sampling.guidance import combine_predictions
from engine.sampling.noise import image_noise
from engine.sampling.sigmas import ResolutionShift, Shift, shifted_sigmas
from engine.text.files import Check
from engine.text.prompts import PromptEmbeds

if TYPE_CHECKING:
    from engine.checkpoints.bundle import PreviewMatrix
    from engine.pipelines.loaded_model import LoadedModel

LATENT_SCALE = 8  # pixels of a latent's side
PATCH = 2  # latents of a token's side


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture, with every choice made. width and height in pixels, multiples of 16."""

    prompt: str
    negative: str
    width: int
    height: int
    steps: int
    seed: int
    guidance: float | None  # None: the network takes no such number
    cfg: float
    noise: NoiseKind = "philox"
    previews: bool = True

    @property
    def num_tokens(self) -> int:
        """Image tokens of the packed latents."""
        side = LATENT_SCALE * PATCH
        return (self.width // side) * (self.height // side)


@dataclass(frozen=True, slots=True)
class Step:
    """One step is done."""

    step: int  # 1 .. steps
    preview: Pixels | None


@dataclass(frozen=True, slots=True)
class Drawn:
    """The picture, and how long its stages took, in seconds."""

    pixels: Pixels
    encode_s: float
    denoise_s: float
    decode_s: float
    decode: DecodeKind


def text_to_image(
    model: LoadedModel, picture: Picture, check: Check, noise: Tensor | None = None
) -> Iterator[Step | Drawn]:
    """Draw one picture: a Step after each call of the network, Drawn at the end.

    `check` is called between small pieces of work and may raise to stop. noise: (1, C, H/8, W/8) fp32 in place of
    the seed's own. Every picture is drawn alone (its two predictions under cfg as one batch of two), so that its
    bytes depend neither on `count` nor on what was drawn before.
    """
    started = perf_counter()
    prompts = [picture.prompt] if picture.cfg == 1 else [picture.prompt, picture.negative]
    embeds = model.embeddings(prompts, check)
    encoded = perf_counter()

    rows, columns = picture.height // LATENT_SCALE, picture.width // LATENT_SCALE
    if noise is None:
        noise = image_noise(picture.seed, model.latent_channels, rows, columns, picture.noise)
    sigmas = shifted_sigmas(picture.steps, shift_of(model.bundle.shift), picture.num_tokens)
    predict = velocity_function(model, embeds, picture, check)
    latents = pack(noise).to(model.torch_device)
    matrix = model.bundle.preview if picture.previews else None
    for step, (walked, predicted) in enumerate(denoise(predict, latents, sigmas), start=1):
        latents = walked
        if latents.is_cuda:
            torch.cuda.current_stream().synchronize()  # a step is told when it is done, not when it is asked for
        yield Step(step, None if matrix is None else preview(unpack(predicted, rows, columns), matrix))
        check()
    denoised = perf_counter()

    check_latents(latents, model)
    pixels, kind = model.decode(unpack(latents, rows, columns), check)
    yield Drawn(pixels, encoded - started, denoised - encoded, perf_counter() - denoised, kind)


def check_latents(latents: Tensor, model: LoadedModel) -> None:
    """Raise ProblemError where the network made no numbers: then it is not the VAE that is damaged."""
    if bool(torch.isfinite(latents).all()):
        return
    name, plan = model.bundle.card.name, model.plan.plan
    if model.has_loras:
        raise bad_request(
            f"With these LoRAs the network of {name} made no numbers.", "Lower their strengths, or take one away."
        )
    raise bad_file(
        f"The network of {name} made no numbers (plan {plan}).", "Choose another plan, or download the model again."
    )


def velocity_function(
    model: LoadedModel, embeds: list[PromptEmbeds], picture: Picture, check: Check
) -> Callable[[Tensor, float], Tensor]:
    """The network with everything but latents and sigma filled in; under cfg one batch of both predictions."""
    batch = len(embeds)
    text = torch.cat([one.text for one in embeds]).to(model.torch_device, model.dtype)  # (B, T, C)
    pooled = torch.cat([one.pooled for one in embeds]).to(model.torch_device, model.dtype)  # (B, P)

    @torch.inference_mode()
    def predict(latents: Tensor, sigma: float) -> Tensor:
        image = latents.to(model.dtype).expand(batch, -1, -1)
        velocity = model.step(check, *step_inputs(picture, image, text, pooled, sigma))
        return combine_predictions(velocity, picture.cfg) if batch == 2 else velocity.float()

    return predict


def step_inputs(
    picture: Picture, image: Tensor, text: Tensor, pooled: Tensor, sigma: float
) -> tuple[Tensor | None, ...]:
    """What the network takes, in its order. image: (B, I, C), text: (B, T, C), pooled: (B, P)."""
    batch, device, side = len(image), image.device, LATENT_SCALE * PATCH
    timestep = torch.full((batch,), sigma, device=device)
    guidance = None if picture.guidance is None else torch.full((batch,), picture.guidance, device=device)
    image_ids = position_ids(picture.height // side, picture.width // side).to(device)
    text_ids = torch.zeros(text.shape[1], 3, device=device)
    return image, text, pooled, timestep, guidance, image_ids, text_ids


def shift_of(shift: object) -> Shift:
    """A bundle's shift as the sampler takes it."""
    return ResolutionShift(**shift) if isinstance(shift, dict) else float(shift)  # type: ignore[arg-type]


def pack(latents: Tensor) -> Tensor:
    """(1, C, h, w) -> (1, h/2 * w/2, 4C): 2 x 2 latents become one image token, as FLUX does."""
    _, c, h, w = latents.shape
    tokens = latents.view(1, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(1, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(1, L, 4C) -> (1, C, rows, columns)."""
    c = tokens.shape[-1] // (PATCH * PATCH)
    latents = tokens.view(1, rows // PATCH, columns // PATCH, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(1, c, rows, columns)


def position_ids(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3): (0, y, x) of every image token."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.view(-1, 3)


def preview(latents: Tensor, matrix: PreviewMatrix) -> Pixels:
    """(1, C, h, w) predicted clean latents -> (h, w, 3) uint8, through the bundle's linear map."""
    rows = torch.tensor(matrix.rows, device=latents.device)
    rgb = torch.einsum("chw,cr->hwr", latents[0].float(), rows) + torch.tensor(matrix.bias, device=latents.device)
    pixels = ((rgb.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.cpu().numpy())
