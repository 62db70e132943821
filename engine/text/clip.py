"""CLIP's text encoder: a prompt as one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.safetensors_file import SafetensorsFile
from engine.problems import bad_file
from engine.text.files import Check, config_of, fill, finite, known, text_choice, whole

# CLIP ViT-L/14's text half, which FLUX uses; its files often carry no configuration.
LARGE = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
PREFIX = "text_model."  # in files of some versions, not in others


class ClipEncoder:
    """ids -> pooled vector: the last layer at the end token."""

    def __init__(
        self, file: SafetensorsFile, device: torch.device, dtype: torch.dtype, check: Check = lambda: None
    ) -> None:
        """Raises ProblemError naming the file, the field or tensor and what was expected."""
        from transformers.models.clip.modeling_clip import CLIPTextModel  # here: seconds of imports

        self._file, self._device = file, device
        with torch.device("meta"):
            self._network = CLIPTextModel(_config(config_of(file), file.path.name))
        fill(self._network, file, self._key_of, device, dtype, check)
        positions = torch.arange(self._network.config.max_position_embeddings, device=device)
        for name, _ in list(self._network.named_buffers()):  # the one buffer, which files need not have
            owner, _, leaf = name.rpartition(".")
            self._network.get_submodule(owner).register_buffer(leaf, positions[None], persistent=False)
        self._network.train(False)
        self._check: Check = lambda: None

    @property
    def vocabulary_size(self) -> int:
        return int(self._network.config.vocab_size)

    @property
    def length(self) -> int:
        """The most tokens it takes."""
        return int(self._network.config.max_position_embeddings)

    @property
    def width(self) -> int:
        """P, the length of the pooled vector."""
        return int(self._network.config.hidden_size)

    @torch.inference_mode()
    def encode(self, ids: list[int]) -> Tensor:
        """ids: T tokens -> (1, P) fp32."""
        tokens = torch.tensor([known(ids, self.vocabulary_size, self._file)], device=self._device)
        pooled: Tensor = self._network(input_ids=tokens).pooler_output
        return finite(pooled.float(), self._file)

    def _key_of(self, name: str) -> str:
        bare = name.removeprefix(PREFIX)
        return bare if bare in self._file.tensors else PREFIX + bare


def _config(config: Mapping[str, Any], where: str) -> Any:
    from transformers.models.clip.configuration_clip import CLIPTextConfig

    def size(name: str, high: int) -> int:
        return whole(config, name, LARGE[name], 1, high, where)

    hidden, heads = size("hidden_size", 2**14), size("num_attention_heads", 1024)
    if hidden % heads:
        raise bad_file(
            f"The configuration in {where} says {hidden} channels for {heads} heads; expected a multiple.",
            "Download the model again.",
        )
    vocabulary = size("vocab_size", 2**20)
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size", 2**18),
        num_hidden_layers=size("num_hidden_layers", 256),
        num_attention_heads=heads,
        max_position_embeddings=size("max_position_embeddings", 2**16),
        hidden_act=text_choice(config, "hidden_act", ("quick_gelu", "gelu"), where),
        eos_token_id=whole(config, "eos_token_id", vocabulary - 1, 0, 2**20, where),
        bos_token_id=None,
        attention_dropout=0.0,
    )
