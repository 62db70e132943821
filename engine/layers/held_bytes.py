"""How much memory a network holds, counted from its tensors: parameters, buffers, and what kernels read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor, nn


def held_bytes(network: nn.Module) -> int:
    """Bytes of every tensor that the modules hold, memory that several share once. Also of meta tensors."""
    storages = {}
    for module in network.modules():
        for tensor in _tensors(dict(vars(module))):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _tensors(held: object) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for name, value in held.items():
            if name != "_modules":  # they are asked themselves
                yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(held) and not isinstance(held, type):
        for field in dataclasses.fields(held):
            yield from _tensors(getattr(held, field.name))
