"""A prompt's embeddings, from both encoders; the last prompts are remembered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

from engine.problems import bad_file
from engine.text.clip import ClipEncoder
from engine.text.files import Check
from engine.text.t5 import T5Encoder
from engine.text.tokenizer import PromptTokenizer


class PromptEmbeds(NamedTuple):
    """What the network is told of a prompt."""

    text: Tensor  # (1, T, C) fp32, T5
    pooled: Tensor  # (1, P) fp32, CLIP


class TextEncoders:
    """T5 and CLIP with their tokenizers."""

    def __init__(
        self, t5: T5Encoder, clip: ClipEncoder, t5_tokenizer: PromptTokenizer, clip_tokenizer: PromptTokenizer
    ) -> None:
        """Raises ProblemError where tokenizer and encoder do not belong together."""
        for encoder, tokenizer in ((t5, t5_tokenizer), (clip, clip_tokenizer)):
            if tokenizer.largest_id >= encoder.vocabulary_size:
                raise bad_file(
                    f"The tokenizer numbers its pieces up to {tokenizer.largest_id}, its text encoder knows "
                    f"{encoder.vocabulary_size}: they do not belong together.",
                    "Download the model again.",
                )
        if clip_tokenizer.length > clip.length:
            raise bad_file(
                f"CLIP takes {clip.length} tokens, the model asks for {clip_tokenizer.length}.",
                "Download the model again.",
            )
        self._t5, self._clip = t5, clip
        self._t5_tokenizer, self._clip_tokenizer = t5_tokenizer, clip_tokenizer

    def encode(self, prompt: str, check: Check = lambda: None) -> PromptEmbeds:
        """One prompt, always on its own, so that its numbers do not depend on what else is encoded."""
        check()
        pooled = self._clip.encode(self._clip_tokenizer.encode(prompt))
        check()
        return PromptEmbeds(self._t5.encode(self._t5_tokenizer.encode(prompt), check), pooled)


class PromptMemory:
    """Embeddings of the last prompts, on the CPU: a slider moved again needs no text encoder.

    Plans ask from another thread (`in`, which changes nothing) while a picture is made.
    """

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._known: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, prompt: str) -> bool:
        with self._lock:
            return prompt in self._known

    def get(self, prompt: str) -> PromptEmbeds | None:
        with self._lock:
            if prompt in self._known:
                self._known.move_to_end(prompt)
            return self._known.get(prompt)

    def put(self, prompt: str, embeds: PromptEmbeds) -> None:
        kept = PromptEmbeds(embeds.text.cpu(), embeds.pooled.cpu())
        with self._lock:
            self._known[prompt] = kept
            while len(self._known) > self._size:
                self._known.popitem(last=False)
