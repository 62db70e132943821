"""Fill a network from a safetensors file: compared with the header first, then read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints.safetensors_file import SafetensorsFile
from engine.problems import bad_file

Check = Callable[[], None]  # called between pieces of work; raises to stop
HALF_OR_FLOAT = (torch.bfloat16, torch.float16, torch.float32)


def whole(config: Mapping[str, Any], name: str, default: int, low: int, high: int, where: str) -> int:
    """A whole number of a config from outside. Raises ProblemError naming the field and the range."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad_file(
            f"The configuration in {where} says {name} = {str(value)[:40]}; expected {low} to {high}.",
            "Download the model again.",
        )
    return value


def text_choice(config: Mapping[str, Any], name: str, choices: tuple[str, ...], where: str) -> str:
    """One of `choices`, the first where the config says nothing."""
    value = config.get(name, choices[0])
    if value not in choices:
        raise bad_file(
            f"The configuration in {where} says {name} = {str(value)[:40]!r}; expected {' or '.join(choices)}.",
            "Use another file of this text encoder.",
        )
    return str(value)


def config_of(file: SafetensorsFile) -> Mapping[str, Any]:
    """The JSON in the file's metadata, {} where there is none. Raises ProblemError where it is no object."""
    config = file.read_config() or {}
    if not isinstance(config, dict):
        raise bad_file(f"The configuration in {file.path.name} is not an object.", "Download the model again.")
    return config


def fill(
    network: nn.Module,
    file: SafetensorsFile,
    key_of: Callable[[str], str],
    device: torch.device,
    dtype: torch.dtype,
    check: Check,
    done: frozenset[str] = frozenset(),
) -> None:
    """Give a network on the meta device its weights.

    key_of: the network's name of a tensor -> the file's. done: names that are filled already. Floating tensors
    become `dtype` on `device`. Raises ProblemError naming the tensor that is missing, or its shape or type.
    """
    wanted = {name: tensor for name, tensor in network.named_parameters() if name not in done}
    for name, tensor in wanted.items():
        info = file.info(key_of(name))
        if tuple(info.shape) != tuple(tensor.shape):
            raise file.fault(key_of(name), f"expected the shape {list(tensor.shape)}, it is {list(info.shape)}")
        if info.dtype not in HALF_OR_FLOAT:
            raise file.fault(key_of(name), f"expected numbers of 16 or 32 bits, it holds {info.dtype}")
    for name in wanted:
        check()
        weight = file.read(key_of(name)).to(device, dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


def known(ids: list[int], vocabulary_size: int, file: SafetensorsFile) -> list[int]:
    """The ids, if the encoder has an embedding for each: a tokenizer's post-processor may add any number."""
    if max(ids) >= vocabulary_size:
        raise bad_file(
            f"A token has the number {max(ids)}; {file.path.name} knows those below {vocabulary_size}.",
            "Download the model again: its tokenizer and text encoder do not belong together.",
        )
    return ids


def finite(embeds: Tensor, file: SafetensorsFile) -> Tensor:
    """The embeddings, if every number is one; a damaged file must not end in a black picture."""
    if not bool(torch.isfinite(embeds).all()):
        raise bad_file(
            f"{file.path.name} makes embeddings that are not numbers.", "Download this text encoder again."
        )
    return embeds
