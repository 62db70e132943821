"""A graphics card made ready for a network: its kernels compiled and loaded, the fastest attention chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine import folders, jit
from engine.layers.attention_backend import Backend
from engine.layers.attention_choice import choose
from engine.models.flux import Flux
from engine.problems import machine_cannot

Report = Callable[[str, float], None]  # what is being done, fraction 0 .. 1; may raise to stop


def prepare_kernels(network: Flux, inputs: tuple[Tensor | None, ...], report: Report) -> None:
    """Compile and load everything that a step with such inputs launches; nothing to do where that was done before.

    A step in which nothing is launched finds the kernels. Raises ProblemError where one does not compile.
    """
    with jit.noted() as variants, torch.inference_mode():
        network(*inputs)
    try:
        for done, total in jit.prepare(variants, jit.current_arch()):
            report(f"Preparing your graphics card, {done} of {total}", done / total)
        jit.load(variants)
    except jit.KernelError as error:
        raise machine_cannot(
            "The kernels for this graphics card cannot be made.",
            "Update NVIDIA's driver, or choose the device cpu.",
            str(error),
        ) from error


def choose_attention(network: Flux, tokens: int, dtype: torch.dtype, device: torch.device) -> Backend:
    """The attention that was fastest for so many tokens on this card: measured once, then read from the cache."""
    config = network.config
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    return choose(heads, tokens, head_dim, dtype, device, folders.cache())
