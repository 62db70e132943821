"""A small FLUX in every file form, with the same weights: what loaders, LoRAs and the pipeline are tested with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoints.safetensors_file import write_safetensors
from engine.checkpoints.svdquant_file import Names
from engine.checkpoints.svdquant_tensors import svdquant_tensors, w4a16_tensors
from engine.families.flux import diffusers_state, linears_of, norms_of
from engine.layers.linear import Linear
from engine.layers.norms import RMSNorm
from engine.models.flux import Flux, FluxConfig
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import Precision, SVDQuantWeights

SMALL = FluxConfig(
    in_channels=64,
    out_channels=64,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=128,
    num_attention_heads=2,
    joint_attention_dim=64,
    pooled_projection_dim=32,
    guidance_embeds=True,
)


def small_flux(seed: int = 0) -> Flux:
    """fp32 weights that bf16 holds exactly, norms and biases off their defaults."""
    torch.manual_seed(seed)
    network = Flux(SMALL).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, Linear) and module.bias is not None:
            module.bias.add_(0.05 * torch.randn_like(module.bias))
        if isinstance(module, RMSNorm):
            module.weight.add_(0.1 * torch.randn_like(module.weight))
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return network


def write_16_bit(path: Path, network: Flux, dtype: torch.dtype = torch.bfloat16) -> Path:
    state = {key: value.to(dtype).contiguous() for key, value in diffusers_state(network).items()}
    write_safetensors(path, state, {"config": json.dumps(network.config.to_json())})
    return path


def random_svdquant(
    n: int, k: int, precision: Precision, rank: int, shift: float, generator: torch.Generator, has_bias: bool
) -> SVDQuantWeights:
    """Weights of about 1 / sqrt(K), every field different from its default."""

    def near_one(*shape: int) -> Tensor:
        return torch.empty(*shape).uniform_(0.5, 2.0, generator=generator)

    def bf16(tensor: Tensor) -> Tensor:
        return tensor.bfloat16()

    level = k**-0.5 / 4
    nvfp4 = precision == "nvfp4"
    codes = torch.randint(0 if nvfp4 else -7, 16 if nvfp4 else 8, (n, k), generator=generator)
    scales = near_one(n, k // (16 if nvfp4 else 64))
    return SVDQuantWeights(
        precision=precision,
        codes=codes.to(torch.uint8 if nvfp4 else torch.int8),
        wscales=scales.to(torch.float8_e4m3fn) if nvfp4 else bf16(scales * level),
        smooth_factor=bf16(near_one(k)),
        bias=bf16(0.1 * torch.randn(n, generator=generator)) if has_bias else bf16(torch.zeros(n)),
        proj_down=bf16(torch.randn(k, rank, generator=generator) * k**-0.5),
        proj_up=bf16(torch.randn(n, rank, generator=generator) * 0.2),
        wtscale=torch.tensor(level).bfloat16().float() if nvfp4 else None,
        wcscales=bf16(near_one(n)) if nvfp4 and n > 2 * k else None,
        input_shift=0.0 if nvfp4 else shift,
    )


def write_svdquant(
    path: Path, network: Flux, precision: Precision = "int4", rank: int = 32, names: Names = "v1", seed: int = 3
) -> tuple[Path, dict[str, SVDQuantWeights | W4A16Weights]]:
    """A consistent 4-bit file of random weights for `network`'s shapes; returns them by our names, too."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, SVDQuantWeights | W4A16Weights] = {}
    tensors: dict[str, Tensor] = {}
    wide = diffusers_state(network)
    for linear in linears_of(network.config):
        layer = network.get_submodule(linear.name)
        assert isinstance(layer, Linear)
        n, k = layer.out_features, layer.in_features
        prefix = linear.public if names == "v1" else linear.public_v2
        if linear.kind == "plain":
            for suffix in ("weight", "bias"):
                key = f"{linear.modules[0]}.{suffix}"
                tensors[key] = wide[key].bfloat16().contiguous()
        elif linear.kind == "modulation":
            scales = torch.empty(n, k // 64).uniform_(0.002, 0.01, generator=generator).bfloat16()
            codes = torch.randint(0, 16, (n, k), generator=generator).to(torch.uint8)
            assert layer.bias is not None
            weights = W4A16Weights(codes, scales, -7 * scales, layer.bias.bfloat16(), 64)
            made[linear.name] = weights
            tensors |= w4a16_tensors(prefix, weights, splits=linear.splits)
        else:
            quantized = random_svdquant(n, k, precision, rank, linear.input_shift, generator, linear.has_bias)
            made[linear.name] = quantized
            tensors |= svdquant_tensors(prefix, quantized, names=names)
    for norm in norms_of(network.config):
        weight = network.get_submodule(norm.name).weight
        assert isinstance(weight, Tensor)
        tensors[f"{norm.public if names == 'v1' else norm.module}.weight"] = weight.bfloat16()
    write_safetensors(path, tensors, {"config": json.dumps(network.config.to_json())})
    return path, made
