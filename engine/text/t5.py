"""T5's encoder: a prompt's tokens to the embeddings the image tokens attend to. 16-bit or AWQ 4-bit files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints.safetensors_file import SafetensorsFile
from engine.checkpoints.svdquant_file import read_w4a16
from engine.jit import arch_of
from engine.layers.svdquant_linear import PackedLinear, W4A16Linear
from engine.text.files import Check, config_of, fill, finite, known, text_choice, whole

# T5 v1.1 XXL, which FLUX uses; its files often carry no configuration.
XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


class T5Encoder:
    """ids -> embeddings. Loaded in `dtype` (fp32 or bf16: fp16 overflows in T5's MLP)."""

    def __init__(
        self, file: SafetensorsFile, device: torch.device, dtype: torch.dtype, check: Check = lambda: None
    ) -> None:
        """Raises ProblemError naming the file, the field or tensor and what was expected."""
        from transformers.models.t5.modeling_t5 import T5EncoderModel  # here: 2.5 s of imports

        self._file, self._device = file, device
        with torch.device("meta"):
            self._network = T5EncoderModel(_config(config_of(file), file.path.name))
        filled = self._exchange_4bit(dtype, check)
        fill(self._network, file, self._key_of, device, dtype, check, done=frozenset(filled))
        self._network.encoder.embed_tokens = self._network.shared
        self._network.train(False)
        for block in self._network.encoder.block:
            block.register_forward_pre_hook(lambda *_: self._check())
        self._check: Check = lambda: None

    @property
    def vocabulary_size(self) -> int:
        return int(self._network.config.vocab_size)

    @property
    def width(self) -> int:
        """C, the channels of an embedding."""
        return int(self._network.config.d_model)

    @torch.inference_mode()
    def encode(self, ids: list[int], check: Check = lambda: None) -> Tensor:
        """ids: T tokens -> (1, T, C) fp32. No attention mask: FLUX was trained without. `check` runs per layer."""
        self._check = check
        tokens = torch.tensor([known(ids, self.vocabulary_size, self._file)], device=self._device)
        embeds: Tensor = self._network(input_ids=tokens).last_hidden_state
        return finite(embeds.float(), self._file)

    def linears(self) -> dict[str, nn.Linear]:
        """Those with 16-bit weights, by their names in the file, in the order they run."""
        return {name: part for name, part in self._network.named_modules() if isinstance(part, nn.Linear)}

    def _key_of(self, name: str) -> str:
        if name in ("shared.weight", "encoder.embed_tokens.weight"):  # one tensor with two names
            return "shared.weight" if "shared.weight" in self._file.tensors else "encoder.embed_tokens.weight"
        return name

    def _exchange_4bit(self, dtype: torch.dtype, check: Check) -> list[str]:
        """Put 4-bit linears where the file has them; returns the names of the weights that are thus filled."""
        on_card = self._device.type == "cuda"
        arch = arch_of(*torch.cuda.get_device_capability(self._device)) if on_card else None
        filled = []
        for name, module in list(self._network.named_modules()):
            if not isinstance(module, nn.Linear) or f"{name}.qweight" not in self._file.tensors:
                continue
            check()
            weights = read_w4a16(self._file, name, device=self._device)
            layer = PackedLinear(weights, dtype, arch) if arch else W4A16Linear(weights, dtype)
            found, expected = (layer.out_features, layer.in_features), (module.out_features, module.in_features)
            if found != expected:
                raise self._file.fault(f"{name}.qweight", f"expected a layer of {expected}, it is one of {found}")
            owner, _, leaf = name.rpartition(".")
            setattr(self._network.get_submodule(owner), leaf, layer)
            filled.append(f"{name}.weight")
        return filled


def _config(config: Mapping[str, Any], where: str) -> Any:
    from transformers.models.t5.configuration_t5 import T5Config

    def size(name: str, high: int) -> int:
        return whole(config, name, XXL[name], 1, high, where)

    buckets = whole(config, "relative_attention_num_buckets", 32, 4, 4096, where)
    return T5Config(
        vocab_size=size("vocab_size", 2**20),
        d_model=size("d_model", 2**16),
        d_kv=size("d_kv", 2**12),
        d_ff=size("d_ff", 2**18),
        num_layers=size("num_layers", 256),
        num_heads=size("num_heads", 1024),
        relative_attention_num_buckets=buckets,
        # a quarter of the buckets are single distances; the others divide what lies between that and the largest
        relative_attention_max_distance=whole(
            config, "relative_attention_max_distance", 128, buckets // 4 + 1, 2**16, where
        ),
        feed_forward_proj=text_choice(config, "feed_forward_proj", ("gated-gelu", "relu"), where),
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
