"""Calibration prompts: where they come from, and what the network is told of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoints.bundle import Bundle
from engine.checkpoints.safetensors_file import open_safetensors
from engine.folders import named_path
from engine.problems import bad_file, bad_request
from engine.requests import MAX_PROMPT_CHARACTERS
from engine.text.clip import ClipEncoder
from engine.text.prompts import TextEncoders
from engine.text.t5 import T5Encoder
from engine.text.tokenizer import PromptTokenizer

PROMPTS_FILE = "calibration_prompts.txt"  # beside a bundle.json
MAX_FILE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class PromptSets:
    """Prompts to look at while quantizing, and others to measure the errors with."""

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EmbeddedPrompts:
    """text: (P, T, J) fp32; pooled: (P, C) fp32; on the CPU, one row a prompt."""

    text: Tensor
    pooled: Tensor


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; blank lines and lines that start with # are left out. Raises ProblemError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise bad_file(f"{path.name} is larger than 4 MB.", "Give a text file with one prompt a line.")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise bad_file(
            f"{path.name or path} cannot be read as text.", "Give a text file with one prompt a line.", repr(error)
        ) from None
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not prompts:
        raise bad_file(f"{path.name} holds no prompts.", "Write one prompt a line.")
    if any(len(prompt) > MAX_PROMPT_CHARACTERS or "\0" in prompt for prompt in prompts):
        raise bad_file(f"{path.name} has a line that is no prompt.", "Give a text file with one prompt a line.")
    return prompts


def choose_prompts(prompts: tuple[str, ...], num_calibration: int, num_held_out: int, seed: int) -> PromptSets:
    """Split prompts in a seeded order; each set is filled by repeating what there is.

    The last calibration prompt is empty: what a network is asked for beside the prompt when cfg is above 1. With a
    single prompt both sets hold it; the noise still differs.
    """
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    held_out = min(num_held_out, max(1, len(shuffled) // 5)) if len(shuffled) > 1 else 0
    seen, unseen = shuffled[held_out:], shuffled[:held_out] or shuffled
    calibration = [seen[i % len(seen)] for i in range(num_calibration - 1)] + [""]
    return PromptSets(tuple(calibration), tuple(unseen[i % len(unseen)] for i in range(num_held_out)))


def find_prompts(named: str, bundle: Bundle | None) -> tuple[str, ...] | None:
    """The prompts of a request or of the bundle; None where there are none, so nothing can be calibrated.

    A bundle without a prompts file is looked at with the words it knows and the prompts it suggests.

    Raises ProblemError for a file that was named but cannot serve.
    """
    if named:
        if bundle is None:
            raise bad_request(
                "Prompts need text encoders, and there is no bundle.json beside the source.",
                "Put the file into a model's folder, or leave the prompts out.",
            )
        return read_prompts(named_path(named))
    if bundle is None:
        return None
    path = Path(bundle.card.folder) / PROMPTS_FILE
    if path.is_file():
        return read_prompts(path)
    return (*bundle.card.suggestions, *bundle.card.words) or None


def embed_prompts(
    bundle: Bundle, prompts: tuple[str, ...], device: torch.device, check: Callable[[], None]
) -> EmbeddedPrompts:
    """Encode with the bundle's T5 and CLIP, which are freed again. check may raise to stop. Raises ProblemError."""
    # fp16 overflows in T5's MLP; bf16 and fp32 do not
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    t5 = T5Encoder(open_safetensors(bundle.weights["t5"].path), device, dtype, check)
    clip = ClipEncoder(open_safetensors(bundle.weights["clip"].path), device, dtype, check)
    tokenizers = [
        PromptTokenizer(part.part.path, part.length, part.pad_id)
        for part in (bundle.tokenizers["t5_tokenizer"], bundle.tokenizers["clip_tokenizer"])
    ]
    encoders = TextEncoders(t5, clip, *tokenizers)
    known = {prompt: encoders.encode(prompt, check) for prompt in dict.fromkeys(prompts)}
    return EmbeddedPrompts(
        text=torch.cat([known[prompt].text.cpu() for prompt in prompts]).clone(),
        pooled=torch.cat([known[prompt].pooled.cpu() for prompt in prompts]).clone(),
    )
