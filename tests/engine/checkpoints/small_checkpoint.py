"""A small FLUX in the public SVDQuant layout whose sizes fit together, and the 16-bit weights it stands for.

Written from the format's description and diffusers' names alone, not from the program's key map, so that a loader
can be held to it: `SmallFlux.state`, loaded into diffusers' FluxTransformer2DModel with `CONFIG`, is what the 4-bit
file must mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoints.safetensors_file import write_safetensors
from engine.checkpoints.svdquant_file import Names
from engine.checkpoints.svdquant_tensors import svdquant_tensors, w4a16_tensors
from engine.reference.e2m1 import decode_e2m1, encode_e2m1
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import GROUP_SIZE, Precision, SVDQuantWeights

HIDDEN, MLP, HEAD = 256, 1024, 128
FC2_SHIFT = 11 / 64
CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": HEAD,
    "num_attention_heads": HIDDEN // HEAD,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}


@dataclass(frozen=True)
class SmallFlux:
    """tensors, metadata: a single-file checkpoint. state: diffusers' names -> fp32 weights of the same meaning."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    state: dict[str, Tensor]

    def write(self, path: Path) -> Path:
        write_safetensors(path, self.tensors, self.metadata)
        return path

    def write_folder(self, folder: Path) -> Path:
        """The older container: two files and the configurations beside them."""
        folder.mkdir()
        blocks = {k: t for k, t in self.tensors.items() if "transformer_blocks." in k}
        write_safetensors(folder / "transformer_blocks.safetensors", blocks, {})
        others = {k: t for k, t in self.tensors.items() if k not in blocks}
        write_safetensors(folder / "unquantized_layers.safetensors", others, {})
        for key in ("config", "comfy_config"):
            (folder / f"{key}.json").write_text(self.metadata[key])
        return folder


@cache
def small_flux(
    precision: Precision = "int4", names: Names = "v1", ranks: tuple[int, ...] = (16, 32), seed: int = 0
) -> SmallFlux:
    """Random weights, quantized to the nearest; layers take `ranks` in turn. Not to be written to."""
    maker = _Maker(precision, names, cycle(ranks), torch.Generator().manual_seed(seed))
    v1 = names == "v1"
    for name, rows, columns in (
        ("x_embedder", HIDDEN, 64),
        ("context_embedder", HIDDEN, 64),
        ("time_text_embed.timestep_embedder.linear_1", HIDDEN, 256),
        ("time_text_embed.timestep_embedder.linear_2", HIDDEN, HIDDEN),
        ("time_text_embed.guidance_embedder.linear_1", HIDDEN, 256),
        ("time_text_embed.guidance_embedder.linear_2", HIDDEN, HIDDEN),
        ("time_text_embed.text_embedder.linear_1", HIDDEN, 32),
        ("time_text_embed.text_embedder.linear_2", HIDDEN, HIDDEN),
        ("norm_out.linear", 2 * HIDDEN, HIDDEN),
        ("proj_out", 64, HIDDEN),
    ):
        maker.plain(name, rows, columns)
    block = "transformer_blocks.0"
    for suffix, norm, qkv, out, qk, mlp, v2_qkv in (
        ("", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_", "ff", "to_qkv"),
        ("_context", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_",
         "ff_context", "add_qkv_proj"),
    ):  # fmt: skip
        maker.modulation(f"{block}.{norm}.linear", splits=6)
        maker.fused(
            f"{block}.qkv_proj{suffix}" if v1 else f"{block}.attn.{v2_qkv}", [f"{block}.attn.{m}" for m in qkv]
        )
        maker.linear(
            f"{block}.out_proj{suffix}" if v1 else f"{block}.attn.{out}", f"{block}.attn.{out}", HIDDEN, HIDDEN
        )
        fc1, fc2 = f"{block}.{mlp}.net.0.proj", f"{block}.{mlp}.net.2"
        maker.linear(f"{block}.mlp{suffix}_fc1" if v1 else fc1, fc1, MLP, HIDDEN)
        maker.linear(f"{block}.mlp{suffix}_fc2" if v1 else fc2, fc2, HIDDEN, MLP, behind_gelu=True)
        for part in "qk":
            maker.norm(f"{block}.{qk}{part}" if v1 else f"{block}.attn.{qk}{part}", f"{block}.attn.{qk}{part}")
    for index in range(2):
        block = f"single_transformer_blocks.{index}"
        maker.modulation(f"{block}.norm.linear", splits=3)
        qkv_module = f"{block}.qkv_proj" if v1 else f"{block}.attn.to_qkv"
        maker.fused(qkv_module, [f"{block}.attn.{m}" for m in ("to_q", "to_k", "to_v")])
        maker.linear(f"{block}.mlp_fc1", f"{block}.proj_mlp", MLP, HIDDEN)
        # proj_out reads attention and MLP side by side: files split its columns, and its bias goes with the MLP's.
        out = f"{block}.out_proj" if v1 else f"{block}.attn.to_out"
        out_weight, no_bias = maker.quantized(out, HIDDEN, HIDDEN, zero_bias=True)
        fc2_weight, bias = maker.quantized(f"{block}.mlp_fc2", HIDDEN, MLP, behind_gelu=True)
        maker.state[f"{block}.proj_out.weight"] = torch.cat([out_weight, fc2_weight], dim=1)
        maker.state[f"{block}.proj_out.bias"] = no_bias + bias
        for part in "qk":
            module = f"{block}.attn.norm_{part}"
            maker.norm(f"{block}.norm_{part}" if v1 else module, module)
    metadata = {
        "config": json.dumps(CONFIG),
        "comfy_config": json.dumps({"model_class": "Flux", "model_config": {"hidden_size": HIDDEN}}),
        "model_class": "NunchakuFluxTransformer2dModel",
        "quantization_config": json.dumps({"method": "svdquant", "rank": ranks[0]}),
    }
    return SmallFlux(maker.tensors, metadata, maker.state)


class _Maker:
    """Draws weights, quantizes them and keeps both what files hold and what it stands for."""

    def __init__(
        self, precision: Precision, names: Names, ranks: Iterator[int], generator: torch.Generator
    ) -> None:
        self.precision, self.names, self.ranks, self.generator = precision, names, ranks, generator
        self.tensors: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator)

    def weight(self, rows: int, columns: int) -> Tensor:
        return self.random(rows, columns, scale=columns**-0.5)

    def plain(self, name: str, rows: int, columns: int) -> None:
        for key, value in (
            (f"{name}.weight", self.weight(rows, columns)),
            (f"{name}.bias", self.random(rows) / 10),
        ):
            self.tensors[key] = value.bfloat16()
            self.state[key] = self.tensors[key].float()

    def norm(self, public: str, module: str) -> None:
        self.tensors[f"{public}.weight"] = (1 + self.random(HEAD, scale=0.2)).bfloat16()
        self.state[f"{module}.weight"] = self.tensors[f"{public}.weight"].float()

    def modulation(self, name: str, splits: int) -> None:
        weight, bias = self.weight(splits * HIDDEN, HIDDEN), self.random(splits * HIDDEN) / 10
        groups = weight.view(len(weight), -1, 64)
        scales = (groups.abs().amax(dim=-1) / 7).bfloat16()
        codes = ((groups / scales.float().unsqueeze(-1)).round().clamp(-7, 8) + 7).to(torch.uint8).view_as(weight)
        plus_one = torch.zeros(splits, HIDDEN)
        plus_one[[1, splits - 2]] = 1
        stored_bias = (bias + plus_one.flatten()).bfloat16()
        weights = W4A16Weights(codes, scales, (-7 * scales.float()).bfloat16(), stored_bias, 64)
        self.tensors |= w4a16_tensors(name, weights, splits=splits)
        zeros = (-7 * scales.float()).bfloat16().double()
        dense = codes.double().view_as(groups) * scales.double().unsqueeze(-1) + zeros.unsqueeze(-1)
        self.state[f"{name}.weight"] = dense.view_as(weight).float()
        self.state[f"{name}.bias"] = stored_bias.float() - plus_one.flatten()

    def linear(self, public: str, module: str, rows: int, columns: int, *, behind_gelu: bool = False) -> None:
        weight, bias = self.quantized(public, rows, columns, behind_gelu=behind_gelu)
        self.state[f"{module}.weight"], self.state[f"{module}.bias"] = weight, bias

    def fused(self, public: str, modules: list[str]) -> None:
        weight, bias = self.quantized(public, len(modules) * HIDDEN, HIDDEN, parts=len(modules))
        for module, rows, values in zip(modules, weight.chunk(len(modules)), bias.chunk(len(modules)), strict=True):
            self.state[f"{module}.weight"], self.state[f"{module}.bias"] = rows, values

    def quantized(
        self, public: str, n: int, k: int, *, parts: int = 1, behind_gelu: bool = False, zero_bias: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Adds one SVDQuant linear to `tensors`; returns the weight (N, K) and bias (N,) it stands for, fp32."""
        rank, group = next(self.ranks), GROUP_SIZE[self.precision]
        smooth = (0.5 + 1.5 * torch.rand(k, generator=self.generator)).bfloat16()
        smoothed = self.weight(n, k).double() * smooth.double()
        # Any rank-R part will do; this is the one a random projection finds, which takes no SVD.
        basis = torch.linalg.qr(smoothed.float() @ self.random(k, rank))[0]
        up = basis.bfloat16()
        down = ((basis.T @ smoothed.float()) / smooth.float()).T.bfloat16()
        residual = smoothed - up.double() @ (down.double() * smooth.double().unsqueeze(-1)).T
        wtscale: Tensor | None = None
        wcscales: Tensor | None = None
        outer = torch.ones(n, dtype=torch.float64)
        if self.precision == "int4":
            groups = residual.view(n, -1, group)
            wscales = (groups.abs().amax(dim=-1) / 7).bfloat16()
            codes = (groups / wscales.double().unsqueeze(-1)).round().clamp(-7, 7).to(torch.int8)
            values = codes.double()
        else:
            # Fused q, k, v have one scale per matrix, kept as one per channel; others have one for the whole.
            maxima = residual.view(parts, -1).abs().amax(dim=-1) / (6 * 448)
            per_part = maxima.bfloat16()
            outer = per_part.double().repeat_interleave(n // parts)
            wtscale, wcscales = (per_part[0].float(), None) if parts == 1 else (None, outer.bfloat16())
            groups = (residual / outer.unsqueeze(-1)).view(n, -1, group)
            wscales = (groups.abs().amax(dim=-1) / 6).clamp(max=448).float().to(torch.float8_e4m3fn)
            step = wscales.double().clamp(min=2**-9).unsqueeze(-1)
            codes = encode_e2m1((groups / step).float())
            values = decode_e2m1(codes).double()
        stands_for = (values * wscales.double().unsqueeze(-1)).view(n, k) * outer.unsqueeze(-1) / smooth.double()
        shift = FC2_SHIFT if behind_gelu and self.precision == "int4" else 0.0
        bias = self.random(n).double() / 10
        if zero_bias:
            bias = torch.zeros_like(bias)
        stored_bias = (bias - shift * stands_for.sum(dim=1)).bfloat16()
        weights = SVDQuantWeights(
            self.precision, codes.view(n, k), wscales, smooth, stored_bias, down, up, wtscale, wcscales
        )
        self.tensors |= svdquant_tensors(public, weights, names=self.names)
        dense = stands_for + up.double() @ down.double().T
        return dense.float(), (stored_bias.double() + shift * stands_for.sum(dim=1)).float()
