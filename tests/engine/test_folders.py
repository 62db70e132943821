"""Where things are, which models there are, and pictures' names."""

from __future__ import annotations

import json
import os
import sys
from datetime import date
from pathlib import Path

import pytest

from engine import folders
from engine.problems import ProblemError
from engine.requests import BUILT_IN_MODEL

BUNDLE = {
    "format": 1,
    "name": "Small one",
    "family": "flux",
    "parts": {role: {"path": f"{role}.bin"} for role in ("transformer", "t5", "clip", "vae")},
    "sizes": {"default": [64, 64], "presets": [["Wide", 96, 64]], "step": 16, "min": 32, "max": 128},
    "defaults": {"steps": 4, "guidance": 3.5, "cfg": 1.0, "default_cfg": 2.5},
    "loras": [{"name": "Bold", "path": "bold.bin", "strength": 0.7, "words": ["bold"]}],
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TONFA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TONFA_MODELS", raising=False)
    return tmp_path / "home"


def write_bundle(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    content = {**BUNDLE, **changes}
    (folder / "bundle.json").write_text(json.dumps(content))
    for role in BUNDLE["parts"]:
        (folder / f"{role}.bin").write_bytes(b"12345")
    return folder


def model_in(home: Path, name: str) -> folders.ModelCard:
    return next(card for card in folders.list_models() if Path(card.folder).name == name)


def test_sources_and_assets_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (folders.repository() / "engine" / "folders.py").is_file()
    assert (folders.repository() / "pyproject.toml").is_file()
    assert folders.assets() == folders.repository() / "assets"


def test_nothing_of_a_person_lies_in_the_program(monkeypatch, tmp_path):
    monkeypatch.delenv("TONFA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (folders.cache(), folders.settings(), folders.logs(), folders.pictures(), folders.user_models()):
        assert not place.is_relative_to(folders.repository())


def test_a_model_is_listed_with_everything_the_window_shows(home):
    write_bundle(home / "models" / "small")
    card = model_in(home, "small")
    assert (card.name, card.family, card.problem) == ("Small one", "flux", "")
    assert card.default_size == (64, 64)
    assert card.presets == (("Wide", 96, 64),)
    assert (card.size_step, card.size_min, card.size_max) == (16, 32, 128)
    assert (card.steps, card.guidance, card.cfg, card.default_cfg) == (4, 3.5, 1.0, 2.5)
    assert card.file_bytes == 20
    assert card.loras == (folders.LoraCard("Bold", str(home / "models" / "small" / "bold.bin"), 0.7, ("bold",)),)


def test_a_listed_model_can_be_asked_for_by_path_folder_name_and_name(home):
    folder = write_bundle(home / "models" / "small")
    for words in (model_in(home, "small").model, str(folder), "small", "Small one", "small ONE"):
        assert folders.find_model(words) == folder
    assert folders.find_model(str(folder / "bundle.json")) == folder


def test_the_built_in_model_is_asked_for_by_its_short_name(monkeypatch, tmp_path, home):
    monkeypatch.setattr(folders, "assets", lambda: tmp_path / "assets")
    folder = write_bundle(tmp_path / "assets" / BUILT_IN_MODEL)
    write_bundle(home / "models" / "another", name="Aaa")
    assert next(card.model for card in folders.list_models()) == BUILT_IN_MODEL
    assert folders.find_model(BUILT_IN_MODEL) == folder


def test_an_unknown_model_is_a_problem_that_names_what_there_is(home, tmp_path):
    write_bundle(home / "models" / "small")
    with pytest.raises(ProblemError, match=r"no model 'big'.*small"):
        folders.find_model("big")
    (tmp_path / "alone.safetensors").write_bytes(b"")
    with pytest.raises(ProblemError, match="whole model"):
        folders.find_model(str(tmp_path / "alone.safetensors"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "newer Tonfa"),
        ({"format": "1"}, "format should be"),
        ({"name": 5}, "name should be text"),
        ({"sizes": {"default": [64, 64], "step": 0, "min": 32, "max": 128}}, "sizes.step"),
        ({"sizes": {"default": [64, 64], "step": 8, "min": 32, "max": 128}}, "sizes.step"),
        ({"sizes": {"default": [64, 64], "step": 24, "min": 32, "max": 128}}, "multiple of 16"),
        ({"sizes": {"default": [70, 70], "step": 64, "min": 70, "max": 100}}, "sizes.max"),
        ({"parts": {"transformer": {"path": "a" * 5000}}}, "cannot be read"),
        ({"parts": {"transformer": {"path": "\ud800"}}}, "not text"),
        ({"sizes": {"default": [64, 640], "step": 16, "min": 32, "max": 128}}, "a size should be"),
        ({"sizes": {"default": [64, 64], "step": 16, "min": 32, "max": 128, "presets": [["x", 1]]}}, "preset"),
        ({"defaults": {"steps": 0}}, "defaults.steps"),
        ({"defaults": {"steps": 4, "guidance": "high"}}, "defaults.guidance"),
        ({"loras": [{"name": "x", "path": "../../../etc/passwd"}]}, "outside its folder"),
        ({"loras": {"name": "x"}}, "loras should be a list"),
        ({"parts": {"transformer": {"path": "gone.bin"}}}, "gone.bin"),
        ({"parts": {"transformer": {"path": ""}}}, "no path"),
        ({"parts": []}, "parts should be an object"),
    ],
)
def test_a_damaged_bundle_is_listed_with_what_is_wrong(home, change, words):
    write_bundle(home / "models" / "bad", **change)
    assert words in model_in(home, "bad").problem


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format": 1, "format": 1}', b"[" * 100_000])
def test_a_bundle_that_is_no_json_is_listed_too(home, content):
    folder = write_bundle(home / "models" / "bad")
    (folder / "bundle.json").write_bytes(content)
    assert model_in(home, "bad").problem


def test_added_folders_come_from_the_environment_and_the_settings(home, tmp_path, monkeypatch):
    for name in ("one", "two", "three"):
        write_bundle(tmp_path / name / name, name=name)
    monkeypatch.setenv("TONFA_MODELS", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    (home / "settings").mkdir(parents=True)
    (home / "settings" / "models-folders.json").write_text(json.dumps([str(tmp_path / "three"), 5]))
    assert {"one", "two", "three"} <= {card.name for card in folders.list_models()}
    (home / "settings" / "models-folders.json").write_text("damaged")
    assert {"one", "two"} <= {card.name for card in folders.list_models()}


def test_a_comfyui_tree_is_read_in_place(home, tmp_path, monkeypatch):
    tree = tmp_path / "ComfyUI" / "models"
    for file in ("loras/style/bold.safetensors", "vae/ae.safetensors", "unet/flux.safetensors", "loras/old.pt"):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_bytes(b"x")
    before = sorted(tree.rglob("*"))
    for root in (tree, tree.parent):
        monkeypatch.setenv("TONFA_MODELS", str(root))
        assert folders.comfy_files("lora") == [tree / "loras" / "style" / "bold.safetensors"]
        assert [card.name for card in folders.list_loras()] == ["bold"]
        assert folders.comfy_files("vae") == [tree / "vae" / "ae.safetensors"]
        assert folders.comfy_files("transformer") == [tree / "unet" / "flux.safetensors"]
    assert sorted(tree.rglob("*")) == before


def test_a_lora_is_the_bundles_own_before_any_file(home, tmp_path, monkeypatch):
    folder = write_bundle(home / "models" / "small")
    card = folders.read_card(folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Bold").write_bytes(b"a file of that name")
    assert folders.find_lora("Bold", card) == folder / "bold.bin"
    assert folders.find_lora("bold", card) == folder / "bold.bin"
    (tmp_path / "other.safetensors").write_bytes(b"x")
    assert folders.find_lora("other.safetensors", card) == tmp_path / "other.safetensors"
    with pytest.raises(ProblemError, match=r"no LoRA 'missing'.*Bold"):
        folders.find_lora("missing", card)


def test_pictures_are_numbered_on_within_their_day(home):
    folder = folders.todays_pictures(date(2026, 11, 22))
    assert folder == home / "pictures" / "2026-11-22"
    assert folders.next_picture(folder, 7).name == "0001-7.png"
    (folder / "0001-7.png").touch()
    (folder / "0041-3.png").touch()
    (folder / "holiday.png").touch()
    assert folders.next_picture(folder, 7).name == "0042-7.png"


def test_a_hash_is_taken_once_and_again_when_the_file_changes(home, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    first = folders.sha256(file)
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert list(json.loads((folders.cache() / "hashes.json").read_text()).values()) == [first]
    (folders.cache() / "hashes.json").write_text("damaged")
    assert folders.sha256(file) == first
    file.write_bytes(b"abcd")
    assert folders.sha256(file) != first


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    folders.write_whole(tmp_path / "a.png", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(ProblemError, match="cannot be written"):
        folders.write_whole(tmp_path / "missing" / "a.png", b"new")


def test_a_name_as_long_as_names_may_be_is_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    folders.write_whole(path, b"picture")
    assert path.read_bytes() == b"picture"


def test_a_failure_is_told_even_where_nothing_can_be_removed(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / ("d" * 300)):
        with pytest.raises(ProblemError, match="cannot be written"):
            folders.write_whole(place / "a.png", b"new")


def test_what_is_unfinished_can_be_removed_at_once(tmp_path):
    temporary = folders.unfinished(tmp_path / "a.png")
    temporary.write_bytes(b"half")
    folders.discard_unfinished()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in folders")
def test_a_pipe_is_no_file(home, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (folders.read_json, folders.sha256):
        with pytest.raises(ProblemError, match="not a file"):
            read(tmp_path / "pipe")


def test_a_hash_can_be_stopped(home, tmp_path):
    class StopError(Exception):
        pass

    def stop():
        raise StopError

    (tmp_path / "weights").write_bytes(b"abc")
    with pytest.raises(StopError):
        folders.sha256(tmp_path / "weights", stop)


def test_the_window_lists_models_without_torch(home):
    import subprocess
    import sys

    code = "import sys; from engine import folders; folders.list_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folders.repository())
