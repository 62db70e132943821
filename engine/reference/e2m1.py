"""The 4-bit float of NVFP4: one sign bit, two exponent bits, one mantissa bit."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Between value i and value i + 1. A tie goes to the even code, whose mantissa bit is 0.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def decode_e2m1(codes: Tensor) -> Tensor:
    """codes: uint8 0..15, any shape, bit 3 is the sign. Returns their values, fp32, same shape."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def encode_e2m1(values: Tensor) -> Tensor:
    """values: fp32, any shape. Returns codes uint8 0..15: nearest value, ties to even, beyond 6 saturates.

    Zero keeps its sign (code 8 is -0), as the conversion instruction of the hardware does.
    """
    magnitude = values.abs()
    midpoints = torch.tensor(_MIDPOINTS, dtype=torch.float32, device=values.device)
    # Bucketize without `right` leaves a tie at the lower code: wrong where that code is odd.
    below = torch.bucketize(magnitude, midpoints, right=False)
    at_most = torch.bucketize(magnitude, midpoints, right=True)
    codes = torch.where(below % 2 == 1, at_most, below)
    return (codes + 8 * torch.signbit(values)).to(torch.uint8)
