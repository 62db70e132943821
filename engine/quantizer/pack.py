"""Quantized layers to the tensors and the metadata of a public single-file SVDQuant checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from engine.checkpoints.key_maps.flux import LinearNames, NormNames
from engine.checkpoints.safetensors_file import SafetensorsFile
from engine.checkpoints.svdquant_tensors import svdquant_tensors, w4a16_tensors
from engine.models.flux import MLP_RATIO, FluxConfig
from engine.quantizer.round_weights import HALF
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import GROUP_SIZE, Precision, SVDQuantWeights

Kept = Literal["bf16", "int8"]
INT8_MAX = 127.0
PATCH = 2  # latents of a token's side


def quantized_tensors(names: LinearNames, weights: SVDQuantWeights) -> dict[str, Tensor]:
    """The tensors of one SVDQuant linear under its public prefix, on the CPU."""
    return {key: tensor.cpu() for key, tensor in svdquant_tensors(names.public, weights).items()}


def modulation_tensors(names: LinearNames, weights: W4A16Weights) -> dict[str, Tensor]:
    """The tensors of one modulation; its bias (O,) holds the 1 of its scales already, as our networks' do."""
    return {key: tensor.cpu() for key, tensor in w4a16_tensors(names.public, weights, splits=names.splits).items()}


def wide_tensors(file: SafetensorsFile, names: LinearNames, kept: Kept) -> dict[str, Tensor]:
    """A linear that stays wide, by diffusers' names: in 16 bits, or 8-bit weights with a scale per row.

    int8: `<module>.weight` I8 (N, K) and `<module>.weight_scale` (N,) fp32. A module that several of our linears
    share is whole. Raises ProblemError for weights that are no numbers.
    """
    tensors: dict[str, Tensor] = {}
    for module in names.modules:
        key = f"{module}.weight"
        weight = finite(file, key).float()
        if kept == "int8":
            scale = weight.abs().amax(dim=1) / INT8_MAX
            scale = torch.where(scale > 0, scale, 1.0)
            tensors[key] = (weight / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
            tensors[f"{key}_scale"] = scale
        else:
            tensors[key] = weight.to(HALF)
        if f"{module}.bias" in file.tensors:
            tensors[f"{module}.bias"] = finite(file, f"{module}.bias").to(HALF)
    return tensors


def norm_tensors(file: SafetensorsFile, names: NormNames) -> dict[str, Tensor]:
    """The weight of one RMSNorm under its public name."""
    return {f"{names.public}.weight": finite(file, f"{names.module}.weight").to(HALF)}


def finite(file: SafetensorsFile, key: str) -> Tensor:
    """Raises ProblemError for a tensor with NaN or infinity."""
    tensor = file.read(key)
    if not bool(torch.isfinite(tensor).all()):
        raise file.fault(key, "expected finite numbers, it holds others")
    return tensor


def metadata(config: FluxConfig, precision: Precision, rank: int, about: dict[str, Any]) -> dict[str, str]:
    """What public tools read about the file; `about` says how it was made, for ours."""
    return {
        "config": json.dumps(config.to_json()),
        "model_class": "NunchakuFluxTransformer2dModel",
        "quantization_config": json.dumps(_quantization(precision, rank)),
        "comfy_config": json.dumps(_comfy(config)),
        "tonfa": json.dumps(about),
    }


def _quantization(precision: Precision, rank: int) -> dict[str, Any]:
    int4, group_size = precision == "int4", GROUP_SIZE[precision]
    return {
        "method": "svdquant",
        "weight": {
            "dtype": "int4" if int4 else "fp4_e2m1_all",
            "scale_dtype": None if int4 else [None, "fp8_e4m3_nan"],
            "group_size": group_size,
        },
        "activation": {
            "dtype": "int4" if int4 else "fp4_e2m1_all",
            "scale_dtype": None if int4 else "fp8_e4m3_nan",
            "group_size": group_size,
        },
        "rank": rank,
    }


def _comfy(config: FluxConfig) -> dict[str, Any]:
    return {
        "model_class": "Flux" if config.guidance_embeds else "FluxSchnell",
        "model_config": {
            "axes_dim": list(config.axes_dims_rope),
            "context_in_dim": config.joint_attention_dim,
            "depth": config.num_layers,
            "depth_single_blocks": config.num_single_layers,
            "guidance_embed": config.guidance_embeds,
            "hidden_size": config.hidden_size,
            "image_model": "flux",
            "in_channels": config.in_channels // PATCH**2,
            "mlp_ratio": float(MLP_RATIO),
            "num_heads": config.num_attention_heads,
            "out_channels": config.out_channels // PATCH**2,
            "patch_size": PATCH,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": config.pooled_projection_dim,
        },
    }


def layout_of(files: Sequence[SafetensorsFile]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor in several files."""
    return {name: (info.dtype, info.shape) for file in files for name, info in file.tensors.items()}
