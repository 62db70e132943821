"""Draw the same pictures with diffusers' and transformers' own classes and with the engine; print PSNR and times.

    python tests/measure/compare_with_diffusers.py BUNDLE [PROMPT ...]

BUNDLE is a bundle folder whose transformer is a 16-bit file with diffusers' names. Both get the same noise, the
same sigmas and the bundle's defaults, in fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine.checkpoints.bundle import read_bundle
from engine.device import PlanChoice, cpu
from engine.pipelines.loaded_model import LoadedModel
from engine.pipelines.text_to_image import Drawn, Picture, text_to_image
from engine.sampling.noise import image_noise
from engine.text.tokenizer import PromptTokenizer

PROMPTS = ("a red fox in the snow", "three green apples", "a pirate ship at sea", "a blue owl in space")


def config(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


class Oracle:
    """The pipeline with other people's classes: FLUX's packing, Euler steps, cfg of two batched halves."""

    def __init__(self, folder: Path) -> None:
        from diffusers import AutoencoderKL, FluxTransformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        self.bundle = read_bundle(folder)
        paths = {role: part.path for role, part in self.bundle.weights.items()}
        states = {role: {k: v.float() for k, v in load_file(path).items()} for role, path in paths.items()}
        self.flux = FluxTransformer2DModel(**config(paths["transformer"])).eval()
        self.flux.load_state_dict(states["transformer"])
        self.t5 = T5EncoderModel(T5Config(**config(paths["t5"]))).eval()
        self.t5.load_state_dict(states["t5"], strict=False)
        self.t5.encoder.embed_tokens.weight = self.t5.shared.weight
        self.clip = CLIPTextModel(CLIPTextConfig(**config(paths["clip"]))).eval()
        self.clip.load_state_dict(states["clip"])
        self.vae_config = config(paths["vae"])
        self.vae = AutoencoderKL(**self.vae_config).eval()
        self.vae.load_state_dict(states["vae"])
        part = self.bundle.tokenizers["t5_tokenizer"]
        self.tokenizer = PromptTokenizer(part.part.path, part.length, part.pad_id)

    @torch.no_grad()
    def draw(self, picture: Picture) -> np.ndarray:
        ids = torch.tensor([self.tokenizer.encode(picture.prompt), self.tokenizer.encode(picture.negative)])
        text, pooled = self.t5(input_ids=ids).last_hidden_state, self.clip(input_ids=ids).pooler_output
        h, w = picture.height // 16, picture.width // 16
        noise = image_noise(picture.seed, 16, 2 * h, 2 * w, picture.noise)
        x = noise.reshape(16, h, 2, w, 2).permute(1, 3, 0, 2, 4).reshape(1, h * w, 64)
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(h).float(), torch.arange(w).float())
        sigmas = torch.linspace(1, 0, picture.steps + 1)
        shift = float(self.bundle.shift)  # type: ignore[arg-type]
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        for sigma, following in pairwise(sigmas):
            velocity = self.flux(
                hidden_states=torch.cat([x, x]),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=sigma.expand(2),
                guidance=torch.full((2,), picture.guidance or 0.0),
                img_ids=grid,
                txt_ids=torch.zeros(text.shape[1], 3),
                return_dict=False,
            )[0]
            told, untold = velocity.chunk(2)
            x = x + (following - sigma) * (untold + picture.cfg * (told - untold))
        z = x.reshape(h, w, 16, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 16, 2 * h, 2 * w)
        z = z * torch.tensor(self.vae_config["latents_std"]).view(1, -1, 1, 1) / self.vae_config["scaling_factor"]
        z = z + torch.tensor(self.vae_config["latents_mean"]).view(1, -1, 1, 1)
        image = self.vae.decode(z, return_dict=False)[0][0]
        return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("prompts", nargs="*", default=PROMPTS)
    chosen = arguments.parse_args()
    oracle = Oracle(chosen.bundle)
    card = oracle.bundle.card
    model = LoadedModel(oracle.bundle, cpu(), PlanChoice("w4a16", ""), keep_all=True)
    model.load()
    print(f"{'prompt':40} {'PSNR':>8} {'largest':>8} {'diffusers':>10} {'engine':>8}")
    for seed, prompt in enumerate(chosen.prompts, start=1):
        width, height = card.default_size
        picture = Picture(
            prompt, "", width, height, card.steps, seed, card.guidance, card.default_cfg, "torch", previews=False
        )
        start = time.perf_counter()
        expected = oracle.draw(picture)
        middle = time.perf_counter()
        *_, drawn = text_to_image(model, picture, lambda: None)
        end = time.perf_counter()
        assert isinstance(drawn, Drawn)
        largest = int(np.abs(expected.astype(int) - drawn.pixels).max())
        print(
            f"{prompt[:40]:40} {psnr(expected, drawn.pixels):8.1f} {largest:8} {middle - start:9.2f}s "
            f"{end - middle:7.2f}s"
        )


if __name__ == "__main__":
    main()
