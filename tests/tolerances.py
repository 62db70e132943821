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
# Of the results, at most, such a difference carries across a boundary between two numbers of h: its mean over their
# distance, which is 2^-11 to 2^-10 of a number of fp16. Of a normal result's many small numbers more than of its
# largest ones: 4 % at K = 12288; bf16 has an eighth as many boundaries.
REROUNDED = {torch.float16: 0.08, torch.bfloat16: 0.01}
# The same two where e4m3 is multiplied: Hopper's and Ada's units add 32 products after cutting what is 2^13 below
# the largest of them. Done so in float64, results are off by 7e-6 of the largest, rms, from K = 512 to 12288, and
# 9 % of fp16's are rounded to another number; 10 sigma, and twice that.
SUMS_E4M3 = 7e-5
REROUNDED_E4M3 = {torch.float16: 0.18, torch.bfloat16: 0.04}
# Of the codes that a GEMM's epilogue makes: a last place of bf16 is 2^-5 of e4m3's steps, less of 4-bit ones, and
# REROUNDED results are off by one; near 0, where steps of floats are small, more.
CODES_FROM_SUMS = 0.02
# How far a linear's result is from the dense one's, relative (Frobenius), on normal activations. int4: steps of a
# seventh of the largest of 64, 0.35, and 0.35 / sqrt(12) = 0.10; nvfp4 0.095. e4m3: steps of 2^-3 of a number at
# most, 2^-3 / sqrt(12) = 0.036. w4a16 in bf16: input, weight and result are rounded by 2^-7 / sqrt(12) at most,
# each, 0.0039 in all.
PLAN_ERROR = {"w4a4": 0.14, "w4a8": 0.04, "w4a16": 0.006}
REROUNDED_GEMV = 0.03  # REROUNDED of modulation_w4a16, which is off by 2^-16 of its largest result
CANCELLED = 1e-4  # of what adds up to 0 in fp32, where bf16's codes stand 128 too high: 2^-20; one code: 2^-3
FP16_ROUNDING = 2**-11  # what a rounding to fp16 changes, relative, at most
SCORE_SUMS = 16  # attention_fp16's roundings of a score while it is summed over 128 channels: 8, and 16 on sm_75
STORED_ZEROS = 2e-3  # W4A16 files have -zero * scale in 16 bits: up to 15 levels, off by 2^-12 of that each in fp16
# What a format's codes stand for, relative (Frobenius), on normal activations with outliers that smoothing tames:
# a group's largest is about 2.5 deviations, and steps are a seventh of it: 0.36 / sqrt(12) = 0.10, twice that where
# an outlier is in the group; 15 steps of what is never negative: half of it. e4m3 and nvfp4: as PLAN_ERROR says.
FORMAT_ERROR = {"int4": 0.22, "uint4": 0.1, "e4m3": 0.03, "nvfp4": 0.11, "half": 2**-9}
# Of the codes that a reciprocal (a unit of fp32) puts on the other side of a boundary, at most: 2^-23 over a step
# of "half" in fp16, 2^-11, is 2.4e-4 for the worst number, a fifth of it on average; other steps are longer.
DIFFERENT_CODES = 2e-4
CODES_AT_TIES = 1  # what a code may differ by where two codes are equally near


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value of `expected`; compare it with RELATIVE[dtype]."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
