"""A FLUX of random weights, made where it will run, layer by layer: what speed and memory are measured with.

Activations have outliers as trained networks do: one channel in 128 is scaled up twentyfold by its modulation, and
smoothed the more. Weights are as large as trained ones, so numbers neither vanish nor explode over 57 blocks.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from engine.layers.fused_linear import FusedLinear
from engine.layers.linear import BranchedLinear, Linear
from engine.layers.norms import RMSNorm
from engine.layers.svdquant_linear import LayerPlan, PackedLinear
from engine.models.flux import MLP_RATIO, Flux, FluxConfig, scale_splits
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import SVDQuantWeights

OUTLIER_STEP, OUTLIER = 128, 20.0
GELU_SHIFT = 11 / 64
GATE = 0.2


def random_flux(
    config: FluxConfig,
    plan: LayerPlan | None,
    device: torch.device,
    dtype: torch.dtype,
    arch: str | None = None,
    rank: int = 32,
) -> Flux:
    """plan: of its int4 linears; None: all linears are 16-bit. arch: the card's ("90a"), None for the reference."""
    with torch.device("meta"):
        network = Flux(config)
    for name, module in list(network.named_modules()):
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(torch.ones(module.weight.shape, device=device), requires_grad=False)
        if not isinstance(module, Linear):
            continue
        owner, _, leaf = name.rpartition(".")
        made: BranchedLinear
        if plan is None or "_blocks." not in name:
            made = _random_16_bit(name, module, config, device, dtype)
        elif leaf == "modulation":
            made = PackedLinear(_random_modulation(name, module, config, device), dtype, arch)
        else:
            made = FusedLinear(random_layer(name, config, device, rank), plan, dtype, arch)
        setattr(network.get_submodule(owner), leaf, made)
    network.join_linears()
    return network.requires_grad_(False).eval()


def random_layer(name: str, config: FluxConfig, device: torch.device, rank: int = 32) -> SVDQuantWeights:
    """The int4 weights of one linear of a block, by its name ("single_blocks.3.fc1"): always the same ones."""
    c, wide = config.hidden_size, MLP_RATIO * config.hidden_size
    leaf = name.rpartition(".")[2]
    n, k = {"qkv": (3 * c, c), "out": (c, c), "fc1": (wide, c), "fc2": (c, wide)}[leaf]
    generator = _generator(name, device)

    def spread(*shape: int) -> Tensor:
        """About 1, from a half to two."""
        return torch.exp2(2 * torch.rand(*shape, generator=generator, device=device) - 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    smooth = torch.exp2(torch.linspace(-1, 1, k, device=device))  # one for all that read the same input
    if leaf in ("qkv", "fc1"):
        smooth[::OUTLIER_STEP] *= OUTLIER**0.5
    codes = torch.randint(-7, 8, (n, k), generator=generator, device=device, dtype=torch.int8)
    level = k**-0.5 / 4.3  # of uniform codes the standard deviation is 4.3
    return SVDQuantWeights(
        precision="int4",
        codes=codes,
        wscales=(spread(n, k // 64) * level).bfloat16(),
        smooth_factor=smooth.bfloat16(),
        bias=(0.1 * normal(n)).bfloat16(),
        proj_down=(normal(k, rank) * k**-0.5).bfloat16(),
        proj_up=(normal(n, rank) * 0.2).bfloat16(),
        input_shift=GELU_SHIFT if leaf == "fc2" else 0.0,
    )


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def _random_16_bit(
    name: str, module: Linear, config: FluxConfig, device: torch.device, dtype: torch.dtype
) -> Linear:
    made = Linear(1, 1, bias=module.bias is not None)
    made.in_features, made.out_features = k, n = module.in_features, module.out_features
    weight = torch.randn(n, k, generator=_generator(name, device), device=device, dtype=dtype) * k**-0.5
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(_bias(name, n, config, device).to(dtype), requires_grad=False)
    if name.endswith("modulation"):
        made.weight.mul_(0.05)
    return made


def _random_modulation(name: str, module: Linear, config: FluxConfig, device: torch.device) -> W4A16Weights:
    n, k = module.out_features, module.in_features
    codes = torch.randint(0, 16, (n, k), generator=_generator(name, device), device=device, dtype=torch.uint8)
    scales = torch.full((n, k // 64), 0.05 * k**-0.5 / 4.6, device=device).bfloat16()
    return W4A16Weights(codes, scales, -7.5 * scales, _bias(name, n, config, device).bfloat16(), 64)


def _bias(name: str, n: int, config: FluxConfig, device: torch.device) -> Tensor:
    """0, but of a modulation: shifts 0, scales 1 with outliers, gates small."""
    bias = torch.zeros(n, device=device)
    if name.endswith("modulation"):
        splits = n // config.hidden_size
        for split, part in enumerate(bias.chunk(splits)):
            if split in scale_splits(splits):
                part.fill_(1.0)
                part[::OUTLIER_STEP] = OUTLIER
            elif split % 3 == 2:
                part.fill_(GATE)
    return bias
