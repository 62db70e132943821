"""Where a picture starts: standard normal noise that depends on the seed alone.

"philox": Philox4x32-10 (Salmon et al. 2011) in numpy, Box-Muller in float64, so that neither device nor batch nor
the version of torch matters. "torch": torch.randn on the CPU, which other programs' recipes assume.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.requests import NoiseKind

Words = NDArray[np.uint32]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox4x32. counter: (n, 4) uint32; key: two 32-bit words. Returns (n, 4) uint32."""
    a, b, c, d = (counter[:, column].astype(np.uint64) for column in range(4))
    key0, key1 = key
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (right >> _HALF) ^ b ^ np.uint64(key0),
            right & _LOW,
            (left >> _HALF) ^ d ^ np.uint64(key1),
            left & _LOW,
        )
        key0, key1 = (key0 + _WEYL[0]) & 0xFFFFFFFF, (key1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


def philox_normal(seed: int, count: int) -> NDArray[np.float32]:
    """(count,) standard normal numbers. Key = the seed's two words, counter = 0, 1, ...: four numbers each.

    Box-Muller on the word pairs (0, 1) and (2, 3): radius from (word + 1) / 2^32, which is never 0, angle from the
    other word; cosine first.
    """
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), np.uint32)
    counter[:, 0], counter[:, 1] = blocks & _LOW, blocks >> _HALF
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[:, 0::2] + 1.0) / 2.0**32))
    angle = words[:, 1::2] * (2.0 * np.pi / 2.0**32)
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)  # (blocks, pair, cos | sin)
    return normal.reshape(-1)[:count].astype(np.float32)


def image_noise(seed: int, channels: int, height: int, width: int, kind: NoiseKind = "philox") -> Tensor:
    """Noise of one picture: (1, channels, height, width) fp32 on the CPU; height and width of the latents."""
    if kind == "torch":
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(1, channels, height, width, generator=generator)
    return torch.from_numpy(philox_normal(seed, channels * height * width)).view(1, channels, height, width)
