"""The 4-bit float: every value, every tie, what is too large."""

from __future__ import annotations

import torch

from engine.reference.e2m1 import E2M1_VALUES, decode_e2m1, encode_e2m1


def test_every_code_is_the_code_of_its_value() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert decode_e2m1(encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert decode_e2m1(encode_e2m1(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_rounding_takes_the_nearest_value_and_saturates_at_six() -> None:
    values = torch.linspace(-9, 9, 10_001)
    table = torch.tensor(E2M1_VALUES)
    nearest = (values.unsqueeze(-1) - table).abs().amin(dim=-1)
    assert torch.equal((values - decode_e2m1(encode_e2m1(values))).abs(), nearest)
    assert decode_e2m1(encode_e2m1(torch.tensor([1e30, -1e30]))).tolist() == [6, -6]
