"""The network that is trained: text encoders in front of the engine's Flux."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.layers.linear import Linear
from engine.models.flux import Flux
from recipe.latents import PIXELS_PER_TOKEN, image_ids
from recipe.settings import Settings
from recipe.text_encoders import TextEncoders


class PromptedFlux(nn.Module):
    """Tokens and noisy latents in, velocity out."""

    def __init__(self, settings: Settings, text: TextEncoders) -> None:
        super().__init__()
        self.settings = settings
        self.text = text
        self.flux = Flux(settings.transformer)
        initialise(self.flux)

    def forward(self, noisy: Tensor, sigma: Tensor, guidance: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        """noisy (B, I, 64) fp32; sigma, guidance (B,); states (B, 32, W) and pooled (B, W) of the prompts."""
        side = round(noisy.shape[1] ** 0.5)
        places = image_ids(side * PIXELS_PER_TOKEN, self.settings.picture_px, noisy.device)
        text_places = torch.zeros(states.shape[1], 3, device=noisy.device)
        velocity: Tensor = self.flux(noisy, states, pooled, sigma, guidance, places, text_places)
        return velocity.float()

    def compile_blocks(self, with_text: bool = True) -> None:
        for block in self.flux.blocks():
            block.compile(dynamic=False)
        if with_text:
            for layer in (*self.text.t5.encoder.block, *text_layers(self.text.clip)):
                layer.compile(dynamic=False)

    def twin(self) -> PromptedFlux:
        """Another Flux of the same weights behind the same text encoders."""
        other = PromptedFlux(self.settings, self.text)
        other.flux.load_state_dict(copy.deepcopy(self.flux.state_dict()))
        return other.to(next(self.flux.parameters()).device)


def text_layers(clip: nn.Module) -> list[nn.Module]:
    """The transformer layers of a CLIP text encoder."""
    lists = [m for n, m in clip.named_modules() if n.endswith("encoder.layers") and isinstance(m, nn.ModuleList)]
    return list(lists[0])


@torch.no_grad()
def initialise(flux: Flux) -> None:
    """Blocks start as identity: modulations give scale 1 and gate 0 (Peebles & Xie 2023), the output is 0."""
    for name, module in flux.named_modules():
        if not isinstance(module, Linear):
            continue
        if name.endswith("modulation") or name == "image_out":
            module.weight.zero_()
        elif "_blocks." in name:
            into_residual = name.endswith((".out", ".fc2"))
            nn.init.normal_(module.weight, std=(0.5 if into_residual else 1.0) * module.in_features**-0.5)
    flux.reset_scales()


def split_parameters(model: PromptedFlux, with_text: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Projections of the blocks for Muon; modulations, embedders, output and text encoders for AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.flux.named_parameters():
        (matrices if p.ndim == 2 and "_blocks." in name and "modulation" not in name else others).append(p)
    if with_text:
        others += list(model.text.parameters())
    return matrices, others


def save_model(model: PromptedFlux, path: Path) -> None:
    """Both state dicts, written under another name first: a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    torch.save({"flux": model.flux.state_dict(), "text": model.text.state_dict()}, partial)
    partial.rename(path)


def load_model(model: PromptedFlux, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.flux.load_state_dict(state["flux"])
    model.text.load_state_dict(state["text"])
