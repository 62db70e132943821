"""Noise that depends on the seed alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.requests import MAX_SEED
from engine.sampling.noise import image_noise, philox4x32, philox_normal


# Known answers of Random123 (Salmon et al. 2011), kat_vectors, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_philox_gives_the_published_words(counter, key, expected):
    assert philox4x32(np.array([counter], np.uint32), key)[0].tolist() == expected


def test_the_first_numbers_of_a_seed_never_change():
    """Pinned: recipes are promises. Worked out by hand from the published words of counter 0, key 0."""
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], np.float64)
    radius = np.sqrt(-2 * np.log((words[[0, 2]] + 1) / 2**32))
    angle = 2 * np.pi * words[[1, 3]] / 2**32
    by_hand = [radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]),
               radius[1] * np.cos(angle[1]), radius[1] * np.sin(angle[1])]  # fmt: skip
    assert philox_normal(0, 4).tolist() == np.array(by_hand, np.float32).tolist()


def test_noise_is_standard_normal():
    numbers = np.sort(philox_normal(7, 1_000_000).astype(np.float64))
    normal = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in numbers[::1000]])
    largest_gap = np.abs(normal - np.arange(0, len(numbers), 1000) / len(numbers)).max()
    assert largest_gap < 1.63 / math.sqrt(len(numbers))  # Kolmogorov-Smirnov at 1 %
    unsorted = philox_normal(7, 1_000_000)
    assert abs(np.corrcoef(unsorted[:-1], unsorted[1:])[0, 1]) < 0.004


def test_seeds_and_only_seeds_make_a_difference():
    assert torch.equal(image_noise(3, 16, 8, 8), image_noise(3, 16, 8, 8))
    for other in (2, 4, 3 + 2**32, MAX_SEED):
        assert not torch.equal(image_noise(3, 16, 8, 8), image_noise(other, 16, 8, 8))


def test_noise_runs_on_where_a_smaller_picture_ends():
    """One stream a seed, in (C, H, W) order: the words do not depend on how many are drawn."""
    assert np.array_equal(philox_normal(5, 4001)[:1000], philox_normal(5, 1000))


def test_the_other_kind_is_what_torch_draws_on_the_cpu():
    expected = torch.randn(1, 16, 4, 6, generator=torch.Generator("cpu").manual_seed(9))
    assert torch.equal(image_noise(9, 16, 4, 6, "torch"), expected)


def test_the_largest_seed_is_finite():
    for kind in ("philox", "torch"):
        assert torch.isfinite(image_noise(MAX_SEED, 16, 4, 4, kind)).all()
