"""Pixels there and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app import images
from tests.app.conftest import picture


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 130)], ids=["one", "odd", "wide"])
def test_pixels_survive_the_way_to_a_picture_and_back(shape: tuple[int, int]) -> None:
    pixels = picture(*shape)
    image = images.to_qimage(pixels)
    assert (image.height(), image.width()) == shape
    assert np.array_equal(images.to_pixels(image), pixels)


def test_the_picture_owns_its_memory() -> None:
    pixels = picture(8, 8)
    image = images.to_qimage(pixels)
    kept = images.to_pixels(image)
    pixels[:] = 0
    assert np.array_equal(images.to_pixels(image), kept)


def test_a_slice_is_as_good_as_an_array() -> None:
    pixels = picture(16, 16)[::2, ::-2]
    assert np.array_equal(images.to_pixels(images.to_qimage(pixels)), pixels)


def test_what_is_no_picture_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        images.to_qimage(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="float32"):
        images.to_qimage(np.zeros((8, 8, 3), np.float32))


@pytest.mark.parametrize("shape", [(600, 200), (100, 300), (40, 40)], ids=["tall", "wide", "smaller"])
def test_a_thumbnail_is_the_middle_square(shape: tuple[int, int]) -> None:
    thumbnail = images.thumbnail(images.to_qimage(picture(*shape)), 80)
    assert (thumbnail.width(), thumbnail.height()) == (80, 80)
    middle = thumbnail.pixelColor(40, 40)
    assert abs(middle.red() - 127) < 12
    assert abs(middle.green() - 127) < 12


def test_only_pictures_are_loaded(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    images.to_qimage(picture()).save(str(good))
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    assert images.load(good) is not None
    assert images.load(bad) is None
    assert images.load(tmp_path / "missing.png") is None
