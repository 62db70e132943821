"""Bundles that are made once and shared by all tests here; nobody may change their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a 16-bit transformer."""
    return make_tiny_bundle(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an int4 SVDQuant transformer."""
    return make_tiny_bundle(tmp_path_factory.mktemp("models") / "tiny-int4", "int4", "Tiny int4")
