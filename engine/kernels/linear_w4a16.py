"""linear_w4a16: 16-bit activations times unsigned 4-bit weights: the 4-bit T5, and modulations of many rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.jit import Variant, launch
from engine.kernels._arrange import pack_linear_w4a16
from engine.reference import linear_w4a16 as reference
from engine.reference.linear_w4a16 import W4A16Weights

BLOCK_ROWS = TILE_COLUMNS = THREADS = 128
GROUP_SIZES = (64, 128)
VARIANTS = {
    (dtype, group): Variant("linear_w4a16", (("H_BF16", int(dtype == torch.bfloat16)), ("GROUP", group)))
    for dtype in (torch.bfloat16, torch.float16)
    for group in GROUP_SIZES
}


@dataclass(frozen=True, eq=False)
class ArrangedW4A16:
    """A weight-only linear as its kernel reads it. On a CPU there are only `weights`, on a card `qweight`."""

    dtype: torch.dtype  # h, of activations and result
    in_features: int
    out_features: int
    group_size: int
    bias: Tensor | None  # (N,) fp32
    weights: W4A16Weights | None = None  # logical, for the reference
    qweight: Tensor | None = None  # (N/128, K/G, 64 G + 512) uint8: records of codes, scales, zeros

    @property
    def num_bytes(self) -> int:
        """What the linear takes on its device."""
        return sum(tensor.nbytes for tensor in (self.bias, self.qweight) if tensor is not None)


def arrange(weights: W4A16Weights, dtype: torch.dtype, arch: str | None) -> ArrangedW4A16:
    """Bring weights into the order that the kernel reads, on the device they are on. arch: None for the CPU.

    Raises ValueError for a group size, width or type that the kernel does not have.
    """
    n, k, group = weights.out_features, weights.in_features, weights.group_size
    bias = None if weights.bias is None else weights.bias.float()
    linear = ArrangedW4A16(dtype, k, n, group, bias)
    if arch is None:
        return replace(linear, weights=weights)
    if group not in GROUP_SIZES or n % 8:
        raise ValueError(
            f"linear_w4a16: N must be a multiple of 8 and groups of {GROUP_SIZES}; got N {n}, groups of {group}"
        )
    if (dtype, group) not in VARIANTS or (arch == "75" and dtype != torch.float16):
        raise ValueError(f"linear_w4a16: sm_{arch} has no kernel for {dtype}")
    return replace(linear, qweight=pack_linear_w4a16(weights, dtype))


def linear_w4a16(x: Tensor, linear: ArrangedW4A16) -> Tensor:
    """x: (..., K) h. Returns (..., N) h: x @ h(W).T + bias, summed in fp32.

    CPU tensors go to the reference, so every model also runs, slowly, without a GPU.
    Raises ValueError, before anything is launched, for what does not fit together.
    """
    if linear.weights is not None:
        return reference.linear_w4a16(x, linear.weights, linear.dtype)
    k, n = linear.in_features, linear.out_features
    if x.shape[-1] != k or x.dtype != linear.dtype or not x.is_cuda:
        raise ValueError(
            f"linear_w4a16: x must be (..., {k}) {linear.dtype} on a card, "
            f"got {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    rows = x.reshape(-1, k).contiguous()
    if rows.data_ptr() % 16:
        raise ValueError(f"linear_w4a16: x must start at a multiple of 16 bytes, got byte {rows.data_ptr() % 16}")
    m = rows.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m:
        grid = (-(-m // BLOCK_ROWS), -(-n // TILE_COLUMNS))
        variant = VARIANTS[linear.dtype, linear.group_size]
        launch(variant, grid, (THREADS,), rows, linear.qweight, k, linear.bias, m, n, out, n)
    return out.view(*x.shape[:-1], n)


def variants(arch: str) -> list[Variant]:
    """What can be launched on an architecture; sm_75 has no bf16 products."""
    return [variant for (dtype, _), variant in VARIANTS.items() if arch != "75" or dtype == torch.float16]
