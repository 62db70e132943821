"""Every size and share of a run in one place: the real one, and a toy one that a processor finishes in a minute."""

from __future__ import annotations

from dataclasses import dataclass

from engine.models.flux import FluxConfig
from recipe.tokens import VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Settings:
    """`small_px` pictures are trained first, with the rotary places of the full grid."""

    sprite_px: int = 384
    scenes: int = 600_000
    picture_px: int = 256
    small_px: int = 128
    judge_px: int = 128
    autoencoder_channels: tuple[int, int, int, int] = (32, 64, 128, 128)
    autoencoder_batch: int = 32
    text_width: int = 256
    t5_layers: int = 4
    clip_layers: int = 2
    contrastive_batch: int = 1024
    hidden_size: int = 512
    head_dim: int = 128
    axes: tuple[int, int, int] = (16, 56, 56)
    double_blocks: int = 2
    single_blocks: int = 6
    small_share: float = 0.25  # of the transformer's time
    small_batch: int = 512  # a GPU
    batch: int = 256  # a GPU
    ring: int = 98_304  # latents kept a GPU
    reuse: int = 8  # samples trained for one picture drawn
    lora_rank: int = 16
    prompts: int = 256

    @property
    def transformer(self) -> FluxConfig:
        return FluxConfig(
            in_channels=64,
            out_channels=64,
            num_layers=self.double_blocks,
            num_single_layers=self.single_blocks,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.hidden_size // self.head_dim,
            joint_attention_dim=self.text_width,
            pooled_projection_dim=self.text_width,
            guidance_embeds=True,
            axes_dims_rope=self.axes,
        )

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE


REAL = Settings()
TOY = Settings(
    sprite_px=32, scenes=400, picture_px=64, small_px=32, judge_px=32, autoencoder_channels=(16, 16, 16, 16),
    autoencoder_batch=16, text_width=64, t5_layers=1, clip_layers=1, contrastive_batch=16, hidden_size=64,
    head_dim=32, axes=(8, 12, 12), double_blocks=1, single_blocks=1, small_batch=8, batch=8, ring=64, lora_rank=4,
    prompts=8,
)  # fmt: skip
