"""FLUX.1's layers, by our name, by diffusers' and by the two public spellings of SVDQuant files.

One table serves the 16-bit loader, the 4-bit loader, the quantizer and the LoRA reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["quantized", "modulation", "plain"]
FC2_SHIFT = 11 / 64  # GELU(tanh) is never below -0.17: added, int4 files quantize it unsigned


@dataclass(frozen=True, slots=True)
class LinearNames:
    """One linear of the network and what it is called elsewhere.

    modules: diffusers modules whose rows, stacked in this order, make it; columns: which of their `of_columns`
    in-columns (all where None). public, public_v2: prefix in SVDQuant files. splits: parts of a modulation.
    """

    name: str
    kind: Kind
    modules: tuple[str, ...]
    public: str = ""
    public_v2: str = ""
    columns: tuple[int, int] | None = None
    of_columns: int = 0
    has_bias: bool = True
    splits: int = 1
    input_shift: float = 0.0


@dataclass(frozen=True, slots=True)
class NormNames:
    """One RMSNorm weight (head_dim,), ours, diffusers' and public V1."""

    name: str
    module: str
    public: str


def flux_linears(num_layers: int, num_single_layers: int, hidden_size: int, guidance: bool) -> list[LinearNames]:
    """Every linear of the network, in the order data flows. hidden_size splits a single block's proj_out."""
    plain = [
        ("image_in", "x_embedder"),
        ("text_in", "context_embedder"),
        ("time_embed.fc1", "time_text_embed.timestep_embedder.linear_1"),
        ("time_embed.fc2", "time_text_embed.timestep_embedder.linear_2"),
        ("pooled_embed.fc1", "time_text_embed.text_embedder.linear_1"),
        ("pooled_embed.fc2", "time_text_embed.text_embedder.linear_2"),
    ]
    if guidance:
        plain += [
            ("guidance_embed.fc1", "time_text_embed.guidance_embedder.linear_1"),
            ("guidance_embed.fc2", "time_text_embed.guidance_embedder.linear_2"),
        ]
    linears = [LinearNames(name, "plain", (module,)) for name, module in plain]
    for i in range(num_layers):
        linears += _double_block(i)
    for i in range(num_single_layers):
        linears += _single_block(i, hidden_size)
    linears.append(LinearNames("final_modulation", "plain", ("norm_out.linear",), splits=2))
    linears.append(LinearNames("image_out", "plain", ("proj_out",)))
    return linears


def _double_block(i: int) -> list[LinearNames]:
    linears = []
    for stream, suffix, qkv, out, mlp, norm, qkv_v2 in (
        ("image", "", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1", "to_qkv"),
        ("text", "_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context",
         "norm1_context", "add_qkv_proj"),
    ):  # fmt: skip
        ours, theirs = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
        fc = "mlp" + suffix
        linears += [
            LinearNames(
                f"{ours}.modulation", "modulation", (f"{theirs}.{norm}.linear",),
                f"{theirs}.{norm}.linear", f"{theirs}.{norm}.linear", splits=6,
            ),
            LinearNames(
                f"{ours}.qkv", "quantized", tuple(f"{theirs}.attn.{part}" for part in qkv),
                f"{theirs}.qkv_proj{suffix}", f"{theirs}.attn.{qkv_v2}",
            ),
            LinearNames(
                f"{ours}.out", "quantized", (f"{theirs}.attn.{out}",),
                f"{theirs}.out_proj{suffix}", f"{theirs}.attn.{out}",
            ),
            LinearNames(
                f"{ours}.fc1", "quantized", (f"{theirs}.{mlp}.net.0.proj",),
                f"{theirs}.{fc}_fc1", f"{theirs}.{mlp}.net.0.proj",
            ),
            LinearNames(
                f"{ours}.fc2", "quantized", (f"{theirs}.{mlp}.net.2",),
                f"{theirs}.{fc}_fc2", f"{theirs}.{mlp}.net.2", input_shift=FC2_SHIFT,
            ),
        ]  # fmt: skip
    return linears


def _single_block(i: int, hidden_size: int) -> list[LinearNames]:
    ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
    wide = hidden_size + 4 * hidden_size  # proj_out reads attention and MLP side by side
    return [
        LinearNames(
            f"{ours}.modulation", "modulation", (f"{theirs}.norm.linear",),
            f"{theirs}.norm.linear", f"{theirs}.norm.linear", splits=3,
        ),
        LinearNames(
            f"{ours}.qkv", "quantized", tuple(f"{theirs}.attn.{part}" for part in ("to_q", "to_k", "to_v")),
            f"{theirs}.qkv_proj", f"{theirs}.attn.to_qkv",
        ),
        LinearNames(
            f"{ours}.out", "quantized", (f"{theirs}.proj_out",), f"{theirs}.out_proj", f"{theirs}.attn.to_out",
            columns=(0, hidden_size), of_columns=wide, has_bias=False,
        ),
        LinearNames(
            f"{ours}.fc1", "quantized", (f"{theirs}.proj_mlp",), f"{theirs}.mlp_fc1", f"{theirs}.mlp_fc1",
        ),
        LinearNames(
            f"{ours}.fc2", "quantized", (f"{theirs}.proj_out",), f"{theirs}.mlp_fc2", f"{theirs}.mlp_fc2",
            columns=(hidden_size, wide), of_columns=wide, input_shift=FC2_SHIFT,
        ),
    ]  # fmt: skip


def flux_norms(num_layers: int, num_single_layers: int) -> list[NormNames]:
    """Every RMSNorm of q and k."""
    norms = []
    for i in range(num_layers):
        theirs = f"transformer_blocks.{i}"
        for stream, added in (("image", ""), ("text", "added_")):
            for part in ("q", "k"):
                file_name = f"norm_{added}{part}"
                norms.append(
                    NormNames(
                        f"double_blocks.{i}.{stream}.norm_{part}",
                        f"{theirs}.attn.{file_name}",
                        f"{theirs}.{file_name}",
                    )
                )
    for i in range(num_single_layers):
        theirs = f"single_transformer_blocks.{i}"
        for part in ("q", "k"):
            norms.append(
                NormNames(f"single_blocks.{i}.norm_{part}", f"{theirs}.attn.norm_{part}", f"{theirs}.norm_{part}")
            )
    return norms
