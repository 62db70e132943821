"""A prompt's words as token ids of a fixed number."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from engine.problems import bad_file

MAX_TOKENIZER_BYTES = 64 * 2**20  # T5's has 2.4 MB


class PromptTokenizer:
    """Reads a `tokenizer.json`, whose post-processor adds the start and end tokens the encoder was trained with."""

    def __init__(self, path: Path, length: int, pad_id: int) -> None:
        """length: tokens of every prompt, the special ones included. Raises ProblemError for a damaged file."""
        self.length = length
        self._pad_id = pad_id
        try:
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise ValueError("larger than 64 MB")
            self._tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(max_length=length)  # keeps the special tokens
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust side panics with a BaseException
            raise bad_file(
                f"{path.name} is damaged: it is not a tokenizer.", "Download the model again.", f"{path}: {error!r}"
            ) from None

    @property
    def vocabulary_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, prompt: str) -> list[int]:
        """Token ids, cut or padded to `length`; the end token is kept when the prompt is cut."""
        ids = self._tokenizer.encode(prompt).ids
        return ids + [self._pad_id] * (self.length - len(ids))
