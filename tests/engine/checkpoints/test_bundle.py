"""Reading a bundle: what the engine takes from it beyond its card."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from engine.checkpoints.bundle import read_bundle
from engine.problems import ProblemError
from tests.end_to_end.tiny_bundle import make_tiny_bundle, tiny_description, write_bundle_json


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def folder(made, tmp_path):
    """The same files, with a bundle.json that a test may change."""
    for file in made.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "bundle.json").unlink()
    return tmp_path


def rewritten(folder, *path: str, value: Any) -> None:
    content = tiny_description(folder)
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(value)
    write_bundle_json(folder, content)


def test_every_part_is_found_with_its_settings(made):
    bundle = read_bundle(made)
    assert {role: part.path.name for role, part in bundle.weights.items()} == {
        "transformer": "transformer.safetensors",
        "t5": "t5.safetensors",
        "clip": "clip.safetensors",
        "vae": "vae.safetensors",
    }
    assert bundle.tokenizers["t5_tokenizer"].length == 16
    assert bundle.shift == {"base_tokens": 256, "base": 0.5, "max_tokens": 4096, "max": 1.15}
    assert bundle.preview is not None
    assert len(bundle.preview.rows) == 16
    assert bundle.part_hash("t5") == bundle.weights["t5"].sha256


def test_a_part_may_lie_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("comfy") / "t5.safetensors"
    elsewhere.write_bytes((folder / "t5.safetensors").read_bytes())
    rewritten(folder, "parts", "t5", "path", value=str(elsewhere))
    assert read_bundle(folder).weights["t5"].path == elsewhere


def test_a_part_that_is_not_the_one_named_is_a_problem(folder):
    rewritten(folder, "parts", "vae", "sha256", value="0" * 64)
    with pytest.raises(ProblemError, match=r"vae.safetensors is not the file"):
        read_bundle(folder).part_hash("vae")


def test_a_lora_that_is_not_the_one_named_is_a_problem(folder, tmp_path_factory):
    content = tiny_description(folder)
    content["loras"][0]["sha256"] = "0" * 64
    del content["loras"][1]["sha256"]
    write_bundle_json(folder, content)
    bundle = read_bundle(folder)
    with pytest.raises(ProblemError, match=r"lora-bold.safetensors is not the file"):
        bundle.lora_hash(folder / "lora-bold.safetensors")
    assert len(bundle.lora_hash(folder / "lora-soft.safetensors")) == 64
    stranger = tmp_path_factory.mktemp("loras") / "lora-bold.safetensors"
    stranger.write_bytes(b"x")
    assert len(bundle.lora_hash(stranger)) == 64


def test_a_part_without_a_hash_is_taken_as_it_is(folder):
    rewritten(folder, "parts", "vae", "sha256", value="")
    assert len(read_bundle(folder).part_hash("vae")) == 64


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("parts", "clip", "path"), "clip2.safetensors", "clip2.safetensors of the model .* is missing"),
        (("parts", "clip", "path"), 7, "parts.clip.path should be text"),
        (("parts", "t5_tokenizer", "length"), 1, "length should be"),
        (("parts", "t5_tokenizer", "pad_id"), -1, "pad_id should be"),
        (("defaults", "shift"), "steep", "shift should be"),
        (("defaults", "shift"), {"base_tokens": 256}, "shift.base"),
        (("defaults", "shift"), {"base_tokens": 1, "base": -10, "max_tokens": 2, "max": 10}, "mu within 10 at 32"),
        (("defaults", "shift"), {"base_tokens": 1, "base": 10, "max_tokens": 2, "max": -10}, "mu within 10 at 32"),
        (("defaults", "shift"), {"base_tokens": 1, "base": 0, "max_tokens": 6, "max": 9.9}, "mu within 10 at 128"),
        (("preview", "matrix"), [[1e30, 1, 1]], "preview matrix"),
        (("preview", "matrix"), [[1, 2]], "preview matrix"),
        (("preview", "matrix"), [["a", "b", "c"]], "preview matrix"),
        (("preview", "bias"), [1.0], "preview matrix"),
    ],
)
def test_a_wrong_field_is_named(folder, path, value, words):
    rewritten(folder, *path, value=value)
    with pytest.raises(ProblemError, match=words):
        read_bundle(folder)


def test_a_bundle_without_a_vae_is_a_problem(folder):
    content = tiny_description(folder)
    del content["parts"]["vae"]
    write_bundle_json(folder, content)
    with pytest.raises(ProblemError, match="names no vae"):
        read_bundle(folder)
