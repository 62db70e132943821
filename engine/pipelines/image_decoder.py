"""Latents to pixels: the decoder half of a VAE, diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from engine.checkpoints.safetensors_file import SafetensorsFile
from engine.events import Pixels
from engine.memory import NO_MEMORY_WORDS, give_back_freed
from engine.problems import bad_file
from engine.text.files import Check, config_of, fill, whole

FLUX_BLOCKS = (128, 256, 512, 512)  # FLUX.1's own; its files often carry no configuration
TILE_PIXELS = 512  # the side of a tile; small ones change the statistics of GroupNorm visibly
FLUX_SCALING, FLUX_SHIFT = 0.3611, 0.1159


DecodeKind = Literal["whole", "tiled"]


class Decoded(NamedTuple):
    """A picture, and whether it was decoded at once or in overlapping tiles, which shows in its bytes."""

    pixels: Pixels
    kind: DecodeKind


class ImageDecoder:
    """(1, C, h, w) latents as the network knows them -> (8h, 8w, 3) pixels."""

    def __init__(
        self, file: SafetensorsFile, device: torch.device, dtype: torch.dtype, check: Check = lambda: None
    ) -> None:
        """Raises ProblemError naming the file, the field or tensor and what was expected."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # here: seconds of imports

        config = _checked(config_of(file), file.path.name)
        with torch.device("meta"):
            self._vae = AutoencoderKL(**config)
        self._vae.encoder, self._vae.quant_conv = nn.Identity(), None  # only pictures come out
        fill(self._vae, file, lambda name: name, device, dtype, check)
        self._vae.requires_grad_(False).eval()
        self._file, self._device, self._dtype = file, device, dtype
        self._to_vae = _normalisation(config_of(file), config, file)
        self.channels: int = config["latent_channels"]
        self._check: Check = lambda: None
        for block in self._vae.decoder.up_blocks:
            block.register_forward_pre_hook(lambda *_: self._check())

    @torch.inference_mode()
    def decode(self, latents: Tensor, check: Check = lambda: None) -> Decoded:
        """latents: (1, C, h, w) fp32 -> (8h, 8w, 3) uint8 sRGB, and how. `check` runs per block and per tile.

        Where the memory does not suffice for the whole picture it is decoded in overlapping tiles. Raises
        ProblemError when the result is not numbers.
        """
        self._check = check
        z = self._to_vae(latents.float()).to(self._device, self._dtype)
        image = self._whole(z)
        kind: DecodeKind = "whole"
        if image is None:  # outside of the handler, whose traceback would keep what the attempt allocated
            image, kind = self._tiled(z), "tiled"
        if not bool(torch.isfinite(image).all()):
            raise bad_file(
                f"{self._file.path.name} decodes to a picture that is not numbers.",
                "Download this model's VAE again.",
            )
        image = ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        pixels: Pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
        return Decoded(pixels, kind)

    def _whole(self, z: Tensor) -> Tensor | None:
        """(1, 3, 8h, 8w), or None where the memory does not suffice."""
        try:
            image: Tensor = self._vae.decode(z, return_dict=False)[0]
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except RuntimeError as error:
            if NO_MEMORY_WORDS not in str(error):
                raise
            return None
        return image

    def _tiled(self, z: Tensor) -> Tensor:
        give_back_freed()
        if z.is_cuda:
            torch.cuda.empty_cache()
        self._vae.enable_tiling()
        try:
            image: Tensor = self._vae.decode(z, return_dict=False)[0]
        finally:
            self._vae.disable_tiling()
        return image


def _checked(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """AutoencoderKL's arguments from a config nobody vouches for."""
    blocks = config.get("block_out_channels", list(FLUX_BLOCKS))
    if (
        not isinstance(blocks, list)
        or not 1 <= len(blocks) <= 6
        or not all(type(channels) is int and 1 <= channels <= 4096 for channels in blocks)
    ):
        raise bad_file(
            f"The configuration in {where} says block_out_channels = {str(blocks)[:40]}; "
            "expected one to six numbers of channels.",
            "Download this VAE again.",
        )
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        types = config.get(name, [kind] * len(blocks))
        if types != [kind] * len(blocks):
            raise bad_file(
                f"The configuration in {where} says {name} = {str(types)[:60]}; expected {kind} for each level.",
                "Use a VAE of FLUX's kind.",
            )
    groups = whole(config, "norm_num_groups", 32, 1, 1024, where)
    if any(channels % groups for channels in blocks):
        raise bad_file(
            f"The configuration in {where} says {groups} groups for {blocks} channels; expected a divisor.",
            "Download this VAE again.",
        )
    flags = {}
    for name, default in (
        ("use_quant_conv", False), ("use_post_quant_conv", False), ("mid_block_add_attention", True)
    ):  # fmt: skip
        flags[name] = config.get(name, default)
        if not isinstance(flags[name], bool):
            raise bad_file(
                f"The configuration in {where} says {name} = {str(flags[name])[:40]}; expected yes or no.",
                "Download this VAE again.",
            )
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(blocks),
        "up_block_types": ("UpDecoderBlock2D",) * len(blocks),
        "block_out_channels": tuple(blocks),
        "layers_per_block": whole(config, "layers_per_block", 2, 1, 16, where),
        "latent_channels": whole(config, "latent_channels", 16, 1, 256, where),
        "norm_num_groups": groups,
        "sample_size": TILE_PIXELS,
        **flags,
    }


def _normalisation(
    told: Mapping[str, Any], config: Mapping[str, Any], file: SafetensorsFile
) -> Callable[[Tensor], Tensor]:
    """From the network's latents to the VAE's: z * std / scaling + mean per channel, or z / scaling + shift."""

    def number(name: str, default: float) -> float:
        value = told.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e6:
            raise bad_file(
                f"The configuration in {file.path.name} says {name} = {str(value)[:40]}; expected a number.",
                "Download this VAE again.",
            )
        return float(value)

    def per_channel(name: str) -> Tensor:
        values = told[name]
        if (
            not isinstance(values, list)
            or len(values) != config["latent_channels"]
            or not all(type(value) in (int, float) for value in values)
        ):
            raise bad_file(
                f"The configuration in {file.path.name}: expected {config['latent_channels']} numbers in {name}.",
                "Download this VAE again.",
            )
        return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)

    scaling = number("scaling_factor", FLUX_SCALING)
    if scaling == 0:
        raise bad_file(
            f"The configuration in {file.path.name} says scaling_factor = 0.", "Download this VAE again."
        )
    if told.get("latents_mean") is not None and told.get("latents_std") is not None:
        mean, std = per_channel("latents_mean"), per_channel("latents_std")
        return lambda z: z.cpu() * std / scaling + mean
    shift = number("shift_factor", FLUX_SHIFT)
    return lambda z: z / scaling + shift
