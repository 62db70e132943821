"""One tolerance per precision: how far two ways to compute the same may be apart, relative to the largest value.

A result rounded once is off by half a unit in the last place; two roundings, sums in another order and a reciprocal
instead of a division stay within twice the unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {
    torch.float32: 1e-5,  # sums of a few thousand products in another order
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}
# Sums of up to 12288 products in fp32, relative to the largest result: the order is free, and a tensor unit cuts
# what it adds off at 24 bits; about sqrt(K / 16) cuts of 2^-23 add up. Beside it stands RELATIVE.
SUMS = 1e-5
# Of the results, at most, such a difference carries across a boundary between two numbers of h: fp16 has 8 times as
# many as bf16, and at K = 12288 4 % of its results were measured.
REROUNDED = {torch.float16: 0.08, torch.bfloat16: 0.01}
CODES_AT_TIES = 1  # what a code may differ by where two codes are equally near


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value of `expected`; compare it with RELATIVE[dtype]."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
