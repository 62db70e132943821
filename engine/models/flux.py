"""FLUX.1's transformer (Black Forest Labs, 2024): double blocks, then single blocks, over text and image tokens.

Letters: B batch, T text tokens, I image tokens, C = hidden_size = H * D, H heads, D head_dim.
All linears are of one kind when the network is made (16-bit); a loader exchanges them for 4-bit ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.attention import Projection, joint_attention
from engine.layers.fused_linear import FusedLinear, share_input
from engine.layers.linear import BranchedLinear, Linear
from engine.layers.modulation import add_gated, modulated
from engine.layers.norms import RMSNorm, layer_norm
from engine.layers.rope import rotary_table
from engine.problems import bad_file

MLP_RATIO = 4
TIMESTEP_CHANNELS = 256


@dataclass(frozen=True, slots=True)
class FluxConfig:
    """Sizes, by the names of diffusers' config.json. Defaults are FLUX.1-dev's."""

    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str = "the file") -> FluxConfig:
        """Check a config that came from outside; unknown fields are ignored.

        Raises ProblemError naming the field and what was expected.
        """

        def whole(name: str, default: int, low: int, high: int) -> int:
            value = config.get(name)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise bad_file(
                    f"The configuration in {where} says {name} = {str(value)[:40]}; expected {low} to {high}.",
                    "Get the file again from where it came.",
                )
            return value

        in_channels = whole("in_channels", 64, 1, 4096)
        axes = config.get("axes_dims_rope", (16, 56, 56))
        head_dim = whole("attention_head_dim", 128, 2, 1024)
        if (
            not isinstance(axes, list | tuple)
            or not 1 <= len(axes) <= 4
            or not all(isinstance(a, int) and not isinstance(a, bool) and a > 0 and a % 2 == 0 for a in axes)
            or sum(axes) != head_dim
        ):
            raise bad_file(
                f"The configuration in {where} says axes_dims_rope = {str(axes)[:40]}; "
                f"expected even numbers with the sum {head_dim}.",
                "Get the file again from where it came.",
            )
        guidance = config.get("guidance_embeds", False)
        if not isinstance(guidance, bool):
            raise bad_file(
                f"The configuration in {where} says guidance_embeds = {str(guidance)[:40]}; expected yes or no.",
                "Get the file again from where it came.",
            )
        return cls(
            in_channels=in_channels,
            out_channels=whole("out_channels", in_channels, 1, 4096),
            num_layers=whole("num_layers", 19, 0, 256),
            num_single_layers=whole("num_single_layers", 38, 0, 256),
            attention_head_dim=head_dim,
            num_attention_heads=whole("num_attention_heads", 24, 1, 256),
            joint_attention_dim=whole("joint_attention_dim", 4096, 1, 65536),
            pooled_projection_dim=whole("pooled_projection_dim", 768, 1, 65536),
            guidance_embeds=guidance,
            axes_dims_rope=tuple(axes),
        )

    def to_json(self) -> dict[str, Any]:
        """The same fields as diffusers' config.json."""
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_layers": self.num_layers,
            "num_single_layers": self.num_single_layers,
            "attention_head_dim": self.attention_head_dim,
            "num_attention_heads": self.num_attention_heads,
            "joint_attention_dim": self.joint_attention_dim,
            "pooled_projection_dim": self.pooled_projection_dim,
            "guidance_embeds": self.guidance_embeds,
            "axes_dims_rope": list(self.axes_dims_rope),
        }


def sinusoidal(t: Tensor, channels: int = TIMESTEP_CHANNELS) -> Tensor:
    """(B,) numbers in 0 .. 1000 -> (B, channels): cosines, then sines (Vaswani et al. 2017). Always fp32:
    bf16 would turn 875 into 876."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    """Two linears with SiLU between: (B, K) -> (B, C)."""

    fc1: BranchedLinear
    fc2: BranchedLinear

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(in_features, hidden_size)
        self.fc2 = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.silu(self.fc1(x)))
        return y


class Stream(nn.Module):
    """What a double block owns for one kind of token: its modulation, its projections, its MLP."""

    modulation: BranchedLinear
    qkv: BranchedLinear
    out: BranchedLinear
    fc1: BranchedLinear
    fc2: BranchedLinear

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        c = config.hidden_size
        self.modulation = Linear(c, 6 * c)  # shift, scale, gate of attention, then of the MLP; scale contains the 1
        self.qkv = Linear(c, 3 * c)
        self.norm_q = RMSNorm(config.attention_head_dim)
        self.norm_k = RMSNorm(config.attention_head_dim)
        self.out = Linear(c, c)
        self.fc1 = Linear(c, MLP_RATIO * c)
        self.fc2 = Linear(MLP_RATIO * c, c)


class DoubleBlock(nn.Module):
    """Text and image attend to each other, each through its own projections and its own MLP."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config)

    def forward(
        self, text: Tensor, image: Tensor, conditioning: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """text (B, T, C), image (B, I, C), conditioning = silu(embedding) (B, C) -> text, image."""
        streams = (self.text, self.image)
        tokens = [text, image]
        modulations = [s.modulation(conditioning)[:, None].chunk(6, dim=-1) for s in streams]  # 6 x (B, 1, C) each
        projections = []
        for s, x, (shift, scale, *_) in zip(streams, tokens, modulations, strict=True):
            (y,) = modulated(x, shift, scale, s.qkv)
            projections.append(Projection(s.qkv, s.norm_q, s.norm_k, y, x.shape[1]))
        attended = joint_attention(projections, table).split([text.shape[1], image.shape[1]], dim=1)
        for i, (s, (_, _, gate, mlp_shift, mlp_scale, mlp_gate)) in enumerate(
            zip(streams, modulations, strict=True)
        ):
            x = add_gated(tokens[i], gate, (s.out, attended[i]))
            (y,) = modulated(x, mlp_shift, mlp_scale, s.fc1)
            tokens[i] = add_gated(x, mlp_gate, (s.fc2, s.fc1.gelu(y, s.fc2)))
        return tokens[0], tokens[1]


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side on the same input."""

    modulation: BranchedLinear
    qkv: BranchedLinear
    out: BranchedLinear
    fc1: BranchedLinear
    fc2: BranchedLinear

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        c = config.hidden_size
        self.modulation = Linear(c, 3 * c)  # shift, scale, gate; scale contains the 1
        self.qkv = Linear(c, 3 * c)
        self.norm_q = RMSNorm(config.attention_head_dim)
        self.norm_k = RMSNorm(config.attention_head_dim)
        self.out = Linear(c, c, bias=False)  # the two halves of one projection share fc2's bias
        self.fc1 = Linear(c, MLP_RATIO * c)
        self.fc2 = Linear(MLP_RATIO * c, c)

    def forward(
        self, text: Tensor, image: Tensor, conditioning: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """text (B, T, C), image (B, I, C), conditioning = silu(embedding) (B, C) -> text, image."""
        x = joined(text, image)
        shift, scale, gate = self.modulation(conditioning)[:, None].chunk(3, dim=-1)  # (B, 1, C) each
        y, y_mlp = modulated(x, shift, scale, self.qkv, self.fc1)
        attended = joint_attention([Projection(self.qkv, self.norm_q, self.norm_k, y, x.shape[1])], table)
        x = add_gated(x, gate, (self.out, attended), (self.fc2, self.fc1.gelu(y_mlp, self.fc2)))
        hidden_text, hidden_image = torch.split(x, [text.shape[1], image.shape[1]], dim=1)
        return hidden_text, hidden_image


def joined(text: Tensor, image: Tensor) -> Tensor:
    """(B, T + I, C). No copy where both are parts of one picture's tensor, as a single block leaves them."""
    both = (text.shape[0], text.shape[1] + image.shape[1], text.shape[2])
    if (
        both[0] == 1
        and not torch.is_grad_enabled()
        and text.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
        and image.storage_offset() == text.storage_offset() + text.numel()
        and text.stride() == image.stride()
        and text.is_contiguous()
    ):
        return text.as_strided(both, text.stride())
    return torch.cat([text, image], dim=1)


class FluxState(NamedTuple):
    """What runs through the blocks, and what steers them."""

    text: Tensor  # (B, T, C)
    image: Tensor  # (B, I, C)
    conditioning: Tensor  # (B, C) silu of the embedding of timestep, guidance and pooled prompt
    table: tuple[Tensor, Tensor]  # rotary cos and sin, (T + I, D / 2)


class Flux(nn.Module):
    """Predicts the velocity of every image token from noisy latents, a prompt and a timestep."""

    image_in: BranchedLinear
    text_in: BranchedLinear
    final_modulation: BranchedLinear
    image_out: BranchedLinear

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.one_at_a_time = False  # pictures of a batch: kernels take the shifts, scales and gates of one
        c = config.hidden_size
        self.image_in = Linear(config.in_channels, c)
        self.text_in = Linear(config.joint_attention_dim, c)
        self.time_embed = Embedder(TIMESTEP_CHANNELS, c)
        self.guidance_embed = Embedder(TIMESTEP_CHANNELS, c) if config.guidance_embeds else None
        self.pooled_embed = Embedder(config.pooled_projection_dim, c)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.final_modulation = Linear(c, 2 * c)  # scale (contains the 1), then shift
        self.image_out = Linear(c, config.out_channels)
        self.reset_scales()

    @torch.no_grad()
    def reset_scales(self) -> None:
        """A fresh network scales by 1: the modulations' bias holds it."""
        c = self.config.hidden_size
        for name, module in self.named_modules():
            if isinstance(module, Linear) and name.endswith("modulation") and module.bias is not None:
                for split in scale_splits(module.out_features // c):
                    module.bias[split * c : (split + 1) * c] = 1.0

    def join_linears(self) -> None:
        """Tell linears what they have in common with others. To be called when all have their weights."""
        readers: dict[nn.Module, BranchedLinear] = {}
        for block in self.blocks():
            if isinstance(block, SingleBlock):
                share_input(block.qkv, block.fc1)
            for mlp in (block.image, block.text) if isinstance(block, DoubleBlock) else (block,):
                readers[mlp.fc1] = mlp.fc2
        fused = [module for module in self.modules() if isinstance(module, FusedLinear)]
        for linear in fused:
            linear.feeds(readers.get(linear))
        self.one_at_a_time = bool(fused)

    def blocks(self) -> Iterator[DoubleBlock | SingleBlock]:
        """All blocks in the order data flows; each maps (text, image, conditioning, table) to (text, image)."""
        for block in (*self.double_blocks, *self.single_blocks):
            assert isinstance(block, DoubleBlock | SingleBlock)
            yield block

    def begin(
        self,
        image: Tensor,
        text: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        image_ids: Tensor,
        text_ids: Tensor,
    ) -> FluxState:
        """Everything before the first block. Shapes as `forward`."""
        dtype = image.dtype
        embedding = self.time_embed(sinusoidal(timestep.float() * 1000).to(dtype))
        if self.guidance_embed is not None:
            if guidance is None:
                raise ValueError("Flux: this network takes guidance as input, got None")
            embedding = embedding + self.guidance_embed(sinusoidal(guidance.float() * 1000).to(dtype))
        embedding = embedding + self.pooled_embed(pooled.to(dtype))
        table = rotary_table(torch.cat([text_ids, image_ids]), self.config.axes_dims_rope)
        return FluxState(self.text_in(text.to(dtype)), self.image_in(image), F.silu(embedding), table)

    def end(self, state: FluxState) -> Tensor:
        """Everything after the last block: (B, I, out_channels)."""
        scale, shift = self.final_modulation(state.conditioning)[:, None].chunk(2, dim=-1)
        velocity: Tensor = self.image_out(layer_norm(state.image) * scale + shift)
        return velocity

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        image_ids: Tensor,
        text_ids: Tensor,
        before_block: Callable[[], None] | None = None,
    ) -> Tensor:
        """Predict the velocity d(latents) / d(sigma).

        image: (B, I, in_channels) packed latents, in the network's dtype; text: (B, T, joint_attention_dim);
        pooled: (B, pooled_projection_dim); timestep: (B,) sigma in 0 .. 1, fp32; guidance: (B,) fp32, or None for a
        network without it; image_ids: (I, 3) and text_ids: (T, 3) positions (t, y, x).
        before_block is called before each block and may raise to stop. Returns (B, I, out_channels).
        """
        if self.one_at_a_time and len(image) > 1:
            alone = [
                self.forward(
                    image[i : i + 1],
                    text[i : i + 1],
                    pooled[i : i + 1],
                    timestep[i : i + 1],
                    None if guidance is None else guidance[i : i + 1],
                    image_ids,
                    text_ids,
                    before_block,
                )
                for i in range(len(image))
            ]
            return torch.cat(alone)
        state = self.begin(image, text, pooled, timestep, guidance, image_ids, text_ids)
        for block in self.blocks():
            if before_block is not None:
                before_block()
            hidden_text, hidden_image = block(state.text, state.image, state.conditioning, state.table)
            state = state._replace(text=hidden_text, image=hidden_image)
        return self.end(state)


def scale_splits(num_splits: int) -> tuple[int, ...]:
    """Which parts of a modulation's output scale (and so contain a 1): 6, 3 or 2 parts."""
    return {6: (1, 4), 3: (1,), 2: (0,)}[num_splits]
