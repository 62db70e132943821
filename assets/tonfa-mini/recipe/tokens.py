"""The tokenizer: unigram pieces of our own captions (Kudo 2018). The file carries its post-processor."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2
SPECIAL = ("<pad>", "</s>", "<unk>")
VOCAB_SIZE = 4096
LENGTH = 32
SPELLING_COST = 12.0  # nats: a known word is never spelled


def train_tokenizer(captions: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Every word of the captions is one piece; the rest of the vocabulary spells words that were never seen.

    Trained alone, the unigram trainer takes pieces only from what words share, and cuts "background" in three.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        unk_token=SPECIAL[UNKNOWN_ID],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789'-.,!?"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    spelling: list[tuple[str, float]] = json.loads(tokenizer.to_str())["model"]["vocab"][len(SPECIAL) :]

    counts: Counter[str] = Counter()
    for caption in captions:
        normal = tokenizer.normalizer.normalize_str(caption)
        counts.update(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    total = sum(counts.values())
    vocabulary = dict.fromkeys(SPECIAL, 0.0)
    for word, count in counts.most_common(vocab_size - len(SPECIAL) - 128):
        vocabulary[word] = math.log(count / total)
    for piece, score in sorted(spelling, key=lambda row: (len(row[0]) > 1, -row[1])):
        if len(vocabulary) < vocab_size:
            vocabulary.setdefault(piece, score - SPELLING_COST)
    tokenizer.model = models.Unigram(list(vocabulary.items()), UNKNOWN_ID, False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[END_ID]}", special_tokens=[(SPECIAL[END_ID], END_ID)]
    )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, captions: list[str]) -> np.ndarray[Any, np.dtype[np.int16]]:
    """(N, 32) int16: pieces, </s>, padding. Longer captions keep their end token."""
    ids = np.full((len(captions), LENGTH), PAD_ID, np.int16)
    for row, encoding in enumerate(tokenizer.encode_batch(captions)):
        kept = encoding.ids if len(encoding.ids) <= LENGTH else [*encoding.ids[: LENGTH - 1], END_ID]
        ids[row, : len(kept)] = kept
    return ids
