"""Recipes in pictures: they come back as they were, carry no paths, and strangers' ones do no harm."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from engine import recipe
from engine.problems import ProblemError
from engine.recipe import Machine, Recipe, UsedFile, UsedLora

MADE = Recipe(
    prompt="a red fox, in the snow",
    negative="a dog",
    seed=2**53 - 1,
    noise="philox",
    width=96,
    height=64,
    sampler="euler",
    steps=8,
    shift={"base_tokens": 256, "base": 0.5, "max_tokens": 4096, "max": 1.15},
    guidance=4.5,
    cfg=2.5,
    plan="w4a16",
    dtype="float32",
    attention="torch",
    model="Tonfa Mini",
    family="flux",
    model_version="1",
    files={"transformer": UsedFile("transformer.safetensors", "ab" * 32)},
    machine=Machine("cpu: a processor", "", "2.13.0", "", 2),
    program="0.1.0",
    loras=(UsedLora("3D look", "cd" * 32, 0.75),),
)
PIXELS = np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3)


def png(tmp_path, texts: dict[str, str]):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value, zip=True)
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path, pnginfo=info)
    return path


def recipe_in(path):
    return recipe.recipe_of(recipe.read_png(path)[1], path.name)


def test_pixels_and_recipe_come_back_as_they_were(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(recipe.png_bytes(PIXELS, MADE))
    pixels, texts = recipe.read_png(path)
    assert np.array_equal(pixels, PIXELS)
    assert recipe_in(path) == MADE
    assert set(texts) == {"parameters", "tonfa"}


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300),
    negative=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=100),
    seed=st.integers(0, 2**53 - 1),
    cfg=st.floats(1, 100),
)
def test_any_words_come_back(tmp_path_factory, prompt, negative, seed, cfg):
    path = tmp_path_factory.mktemp("p") / "picture.png"
    made = replace(MADE, prompt=prompt, negative=negative, seed=seed, cfg=cfg)
    path.write_bytes(recipe.png_bytes(PIXELS, made))
    assert recipe_in(path) == made


def test_the_common_line_is_what_other_programs_read():
    lines = MADE.common_text().splitlines()
    assert lines[0] == "a red fox, in the snow <lora:3D look:0.75>"
    assert lines[1] == "Negative prompt: a dog"
    for words in ("Steps: 8", "Sampler: Euler", "CFG scale: 2.5", f"Seed: {2**53 - 1}", "Size: 96x64",
                  "Model: Tonfa Mini", "Model hash: ababababab", "Distilled CFG Scale: 4.5"):  # fmt: skip
        assert words in lines[2]


def test_a_picture_without_recipe_can_be_saved(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(recipe.png_bytes(PIXELS, None))
    with pytest.raises(ProblemError, match="no recipe"):
        recipe_in(path)


def test_settings_of_another_programs_picture_are_read(tmp_path):
    text = (
        "a castle, (sunset:1.2)\non a hill <lora:detail:0.8>\nNegative prompt: blurry,\ntext\n"
        "Steps: 28, Sampler: DPM++ 2M, CFG scale: 7, Seed: 12345, Size: 832x1216, Model hash: 00aa11bb22, "
        'Model: some model, Lora hashes: "detail: 99ff", Version: v1.10'
    )
    texts = recipe.read_png(png(tmp_path, {"parameters": text}))[1]
    assert recipe.settings_of(texts, "x") == {
        "prompt": "a castle, (sunset:1.2)\non a hill",
        "negative": "blurry,\ntext",
        "steps": 28,
        "seed": 12345,
        "width": 832,
        "height": 1216,
        "cfg": 7.0,
    }


@pytest.mark.parametrize("text", ["", "only words", "Steps: 5", "Steps: many, Size: 1x1, CFG scale: nan", "\n" * 9])
def test_a_poor_common_line_is_read_as_far_as_it_goes(text):
    found = recipe.settings_of({"parameters": text}, "x")
    assert "prompt" in found
    assert "cfg" not in found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1), ("seed", 1.5), ("seed", True), ("steps", 10**9), ("width", 2**40), ("cfg", "x"),
        ("guidance", []), ("loras", {}), ("loras", [1]), ("loras", [{}] * 65), ("files", []), ("machine", None),
        ("prompt", None), ("prompt", "x" * 30_000), ("shift", "steep"), ("shift", {"a": "b"}), ("format", 2),
        ("format", None),
    ],
)  # fmt: skip
def test_a_recipe_with_a_wrong_field_is_a_problem(tmp_path, key, value):
    content = {**MADE.to_json(), key: value}
    with pytest.raises(ProblemError, match=r"picture.png"):
        recipe_in(png(tmp_path, {"tonfa": json.dumps(content)}))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 200_000, '{"a":' * 40 + "1" + "}" * 40, "NaN"])
def test_a_recipe_that_is_none_is_a_problem(tmp_path, text):
    with pytest.raises(ProblemError):
        recipe_in(png(tmp_path, {"tonfa": text}))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_picture_is_a_problem_and_nothing_else(tmp_path_factory, data):
    content = bytearray(recipe.png_bytes(PIXELS[:8, :8], MADE))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = tmp_path_factory.mktemp("p") / "picture.png"
    path.write_bytes(content[:cut])
    try:
        pixels, texts = recipe.read_png(path)
        recipe.recipe_of(texts, path.name)
        assert pixels.dtype == np.uint8
    except ProblemError:
        pass


@pytest.mark.parametrize("steps", ["²", "٣", "-1", "3.0", "9" * 30])
def test_signs_that_only_look_like_a_number_are_left_out(steps):
    found = recipe.settings_of({"parameters": f"a fox\nSteps: {steps}, Seed: 4"}, "x")
    assert (found.get("steps"), found["seed"]) == (None, 4)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in folders")
def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ProblemError, match="not a file"):
        recipe.read_png(tmp_path / "pipe.png")


def test_a_picture_bomb_is_a_problem(tmp_path):
    header = io.BytesIO()
    Image.new("RGB", (1, 1)).save(header, "PNG")
    import struct
    import zlib

    content = bytearray(header.getvalue())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path = tmp_path / "bomb.png"
    path.write_bytes(content)
    with pytest.raises(ProblemError):
        recipe.read_png(path)


def test_a_text_bomb_is_a_problem(tmp_path):
    with pytest.raises(ProblemError):
        recipe_in(png(tmp_path, {"tonfa": '"' + "a" * (80 * 2**20) + '"'}))


def test_other_kinds_of_pictures_are_refused(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path, "JPEG")
    with pytest.raises(ProblemError, match="PNG"):
        recipe.read_png(path)
    with pytest.raises(ProblemError, match="no file"):
        recipe.read_png(tmp_path / "missing.png")
