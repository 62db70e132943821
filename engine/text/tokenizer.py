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

        self._name = path.name

    @property
    def largest_id(self) -> int:
        """Of its pieces and of what a prompt is padded with."""
        return max([self._pad_id, *self._tokenizer.get_vocab().values()])

    def encode(self, prompt: str) -> list[int]:
        """Token ids, cut or padded to `length`; the end token is kept when the prompt is cut.

        Raises ProblemError for a tokenizer that cannot tell a prompt's tokens, or not in `length`.
        """
        try:
            ids = self._tokenizer.encode(prompt).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as above
            raise bad_file(
                f"{self._name} cannot turn this prompt into tokens.", "Download the model again.", repr(error)
            ) from None
        ids = ids + [self._pad_id] * (self.length - len(ids))
        if len(ids) > self.length:
            raise bad_file(
                f"{self._name} makes {len(ids)} tokens of a prompt; the model takes {self.length}.",
                "Download the model again.",
            )
        return ids
