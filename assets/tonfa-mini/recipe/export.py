"""From training checkpoints to the files that the engine reads: standard names, configuration in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.families.flux import diffusers_state
from recipe.autoencoder import Autoencoder
from recipe.dataset import Catalogue
from recipe.latents import image_ids
from recipe.prompted_flux import PromptedFlux
from recipe.prompts import SUGGESTED, calibration_prompts
from recipe.rasteriser import SceneBatch, rasterise
from recipe.settings import Settings
from recipe.sprites import SpriteBank


def _save(path: Path, state: dict[str, Tensor], dtype: torch.dtype, config: dict[str, Any]) -> None:
    tensors = {k: (v.to(dtype) if v.is_floating_point() else v).cpu().contiguous() for k, v in state.items()}
    save_file(tensors, str(path), metadata={"format": "pt", "config": json.dumps(config)})


def export_transformer(model: PromptedFlux, out: Path) -> None:
    _save(out / "transformer.safetensors", diffusers_state(model.flux), torch.bfloat16, model.flux.config.to_json())


def export_text(model: PromptedFlux, out: Path) -> None:
    """T5 without the second name of its embedding; CLIP by the names of transformers 5."""
    t5 = {k: v for k, v in model.text.t5.state_dict().items() if k != "encoder.embed_tokens.weight"}
    _save(out / "t5.safetensors", t5, torch.float16, model.text.t5.config.to_dict())
    clip = {k.removeprefix("text_model."): v for k, v in model.text.clip.state_dict().items()}
    clip = {k: v for k, v in clip.items() if not k.endswith("position_ids")}
    _save(out / "clip.safetensors", clip, torch.float16, model.text.clip.config.to_dict())


def export_autoencoder(autoencoder: Autoencoder, out: Path) -> None:
    config = autoencoder.config | {
        "_class_name": "AutoencoderKL",
        "latents_mean": autoencoder.mean.flatten().tolist(),
        "latents_std": autoencoder.std.flatten().tolist(),
    }
    _save(out / "vae.safetensors", autoencoder.network.state_dict(), torch.float16, config)


@torch.no_grad()
def fit_preview(
    autoencoder: Autoencoder, bank: SpriteBank, scenes: SceneBatch, settings: Settings
) -> dict[str, list[Any]]:
    """The linear map from a latent (16,) to the mean colour (3,), -1 .. 1, of its 8 x 8 pixels; least squares."""
    index = torch.arange(min(256, len(scenes)), device=scenes.rows.device)
    pictures = rasterise(bank, scenes.at(index), settings.picture_px)
    latents = torch.cat([autoencoder.encode(p) for p in pictures.split(64)])
    colours = torch.nn.functional.avg_pool2d(pictures, 8) * 2 - 1
    x = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
    y = colours.permute(0, 2, 3, 1).reshape(-1, 3).double()
    solution = torch.linalg.solve(x.T @ x, x.T @ y)
    rounded = [[round(v, 5) for v in row] for row in solution.tolist()]
    return {"matrix": rounded[:-1], "bias": rounded[-1]}


def vocabulary(catalogue: Catalogue) -> dict[str, list[str]]:
    """Names of all things and words of captions, for hints; and prompts to suggest."""
    names = sorted({name for c in catalogue.concepts for name, _ in c.names})
    return {"words": names, "suggestions": list(SUGGESTED)}


def write_texts(catalogue: Catalogue, preview: dict[str, list[Any]], out: Path) -> None:
    """vocabulary.json, calibration.json and preview.json."""
    for name, content in (
        ("vocabulary", vocabulary(catalogue)),
        ("calibration", calibration_prompts(catalogue.concepts)),
        ("preview", preview),
    ):
        (out / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def check_places(settings: Settings) -> None:
    """Full-size pictures must use FLUX's whole-number places, which is what the engine feeds."""
    side = settings.picture_px // 16
    places = image_ids(settings.picture_px, settings.picture_px, torch.device("cpu"))
    assert places[side + 1].tolist() == [0.0, 1.0, 1.0]
