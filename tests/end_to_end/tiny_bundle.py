"""A whole model in a folder, 9 MB of random weights, for tests of the pipeline, the command line and the window.

    python tests/end_to_end/tiny_bundle.py FOLDER [16-bit|int4|nvfp4]

Its pictures are noise, but every part is a real one: FLUX, T5, CLIP, VAE, tokenizer, two LoRAs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from engine.checkpoints.safetensors_file import write_safetensors
from engine.checkpoints.svdquant_tensors import w4a16_tensors
from engine.models.flux import Flux
from engine.reference.linear_w4a16 import W4A16Weights
from tests.engine.families.small_flux import SMALL, small_flux, write_16_bit, write_svdquant

Kind = Literal["16-bit", "int4", "nvfp4"]

WORDS = [
    "a", "an", "the", "red", "green", "blue", "fox", "dog", "cat", "tree", "house", "in", "on", "with", "and",
    "two", "three", "snow", "sea", "night", ",", ".",
]  # fmt: skip
LENGTH = 16  # tokens of a prompt
VOCABULARY = 64
T5 = {
    "vocab_size": VOCABULARY, "d_model": SMALL.joint_attention_dim, "d_kv": 16, "d_ff": 64, "num_layers": 2,
    "num_heads": 4, "feed_forward_proj": "gated-gelu", "model_type": "t5",
}  # fmt: skip
CLIP = {
    "vocab_size": VOCABULARY, "hidden_size": SMALL.pooled_projection_dim, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LENGTH, "eos_token_id": 1,
    "bos_token_id": None, "hidden_act": "quick_gelu", "model_type": "clip_text_model",
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "use_quant_conv": False, "use_post_quant_conv": False,
    "mid_block_add_attention": False, "scaling_factor": 0.9, "shift_factor": 0.0,
    "latents_mean": [0.1 * (channel - 8) for channel in range(16)], "latents_std": [1.0] * 16,
}  # fmt: skip


def tiny_tokenizer(path: Path) -> Path:
    """Whole words; the post-processor adds the end token, as a bundle's must."""
    pieces = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(path))
    return path


def _weights(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights that neither vanish nor explode; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        if parameter.dim() > 1:
            weights[name] = noise * fan_in**-0.5
        elif name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = 0.1 * noise
    return weights


def write_t5(path: Path, four_bit: bool = False) -> Path:
    """A T5 encoder; 4-bit as the public AWQ file of T5: groups of 128, so wider inside."""
    from transformers import T5Config, T5EncoderModel

    config = {**T5, "d_kv": 32, "d_ff": 128, "d_model": 128} if four_bit else T5
    network = T5EncoderModel(T5Config(**config))
    tensors = {name: weight.half() for name, weight in _weights(network, seed=1).items()}
    tensors.pop("encoder.embed_tokens.weight", None)
    if four_bit:
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                tensors.pop(f"{name}.weight")
                tensors |= w4a16_tensors(name, random_w4a16(module.out_features, module.in_features))
    write_safetensors(path, tensors, {"config": json.dumps(config)})
    return path


def random_w4a16(rows: int, columns: int) -> W4A16Weights:
    """4-bit weights of about 1 / sqrt(K) in groups of 128."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.empty(rows, columns // 128).uniform_(0.1, 0.3, generator=generator) * columns**-0.5
    return W4A16Weights(codes, scales.half(), (-7.5 * scales).half(), None, 128)


def write_clip(path: Path) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModel

    network = CLIPTextModel(CLIPTextConfig(**CLIP))
    tensors = {name: weight.half() for name, weight in _weights(network, seed=2).items()}
    write_safetensors(path, tensors, {"config": json.dumps(CLIP)})
    return path


def write_vae(path: Path) -> Path:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = {key: value for key, value in VAE.items() if not key.startswith("latents_")}
    tensors = {name: weight.half() for name, weight in _weights(AutoencoderKL(**config), seed=3).items()}
    write_safetensors(path, tensors, {"config": json.dumps(VAE)})
    return path


def write_lora(path: Path, seed: int, size: float = 0.3) -> Path:
    """A LoRA of rank 4 for a double block's attention and a single block's MLP, in PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    c, tensors = SMALL.hidden_size, {}
    for module, rows, columns in (
        ("transformer_blocks.0.attn.to_q", c, c),
        ("transformer_blocks.0.ff.net.0.proj", 4 * c, c),
        ("single_transformer_blocks.1.proj_mlp", 4 * c, c),
    ):
        tensors[f"transformer.{module}.lora_A.weight"] = (
            torch.randn(4, columns, generator=generator) * columns**-0.5
        )
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * size
    write_safetensors(path, {name: tensor.bfloat16() for name, tensor in tensors.items()}, {})
    return path


def make_tiny_bundle(folder: Path, kind: Kind = "16-bit", name: str = "Tiny", guidance: bool = True) -> Path:
    """Write a bundle into `folder` (made if missing) and return it. guidance: whether the network takes one."""
    folder.mkdir(parents=True, exist_ok=True)
    network = small_flux()
    if not guidance:
        config = type(SMALL)(**{**_fields(SMALL), "guidance_embeds": False})
        torch.manual_seed(0)
        network = Flux(config).eval().requires_grad_(False)
    transformer = folder / "transformer.safetensors"
    if kind == "16-bit":
        write_16_bit(transformer, network)
    else:
        write_svdquant(transformer, network, kind)
    write_t5(folder / "t5.safetensors")
    write_clip(folder / "clip.safetensors")
    write_vae(folder / "vae.safetensors")
    tiny_tokenizer(folder / "tokenizer.json")
    write_lora(folder / "lora-bold.safetensors", seed=1)
    write_lora(folder / "lora-soft.safetensors", seed=2)
    vocabulary = {"words": WORDS, "suggestions": ["a red fox in the snow", "two cats"]}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary), "utf-8")
    write_bundle_json(folder, tiny_description(folder, name, guidance))
    return folder


def _fields(config: Any) -> dict[str, Any]:
    return {field: getattr(config, field) for field in config.__dataclass_fields__}


def tiny_description(folder: Path, name: str = "Tiny", guidance: bool = True) -> dict[str, Any]:
    """The content of the bundle.json that belongs to the files in `folder`."""

    def part(file: str, **more: Any) -> dict[str, Any]:
        return {"path": file, "sha256": hashlib.sha256((folder / file).read_bytes()).hexdigest(), **more}

    generator = torch.Generator().manual_seed(4)
    tokenizer = part("tokenizer.json", length=LENGTH, pad_id=0)
    return {
        "format": 1,
        "name": name,
        "family": "flux",
        "version": "1",
        "licence": "none",
        "about": "Random weights.",
        "parts": {
            "transformer": part("transformer.safetensors"),
            "t5": part("t5.safetensors"),
            "clip": part("clip.safetensors"),
            "vae": part("vae.safetensors"),
            "t5_tokenizer": tokenizer,
            "clip_tokenizer": tokenizer,
            "vocabulary": part("vocabulary.json"),
        },
        "sizes": {
            "default": [64, 64],
            "presets": [["Square", 64, 64], ["Wide", 96, 64]],
            "step": 16,
            "min": 32,
            "max": 128,
        },
        "defaults": {
            "steps": 2,
            "guidance": 3.5 if guidance else None,
            "cfg": 1.0,
            "default_cfg": 2.0,
            "shift": {"base_tokens": 256, "base": 0.5, "max_tokens": 4096, "max": 1.15},
        },
        "preview": {
            "matrix": (torch.randn(16, 3, generator=generator) * 0.2).tolist(),
            "bias": [0.0, 0.1, -0.1],
        },
        "loras": [
            {**part("lora-bold.safetensors"), "name": "Bold look", "strength": 0.8, "words": ["bold"]},
            {**part("lora-soft.safetensors"), "name": "Soft look"},
        ],
    }


def write_bundle_json(folder: Path, content: dict[str, Any]) -> None:
    (folder / "bundle.json").write_text(json.dumps(content, indent=1), "utf-8")


if __name__ == "__main__":
    print(make_tiny_bundle(Path(sys.argv[1]), *sys.argv[2:3]))  # type: ignore[arg-type]
