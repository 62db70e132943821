"""The command line is a contract: flags, JSON, exit codes, words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine import recipe
from engine.__main__ import lora_choice, main
from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.folders import repository
from engine.requests import LoraChoice
from tests.end_to_end.tiny_bundle import make_tiny_bundle, tiny_description, write_bundle_json, write_vae

SCHEMA = json.loads((repository() / "engine" / "cli.schema.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_tiny_bundle(folder / "tiny")
    make_tiny_bundle(folder / "tiny-int4", "int4", "Tiny int4")
    make_tiny_bundle(folder / "schnell", name="Schnell", guidance=False)
    return folder


@pytest.fixture(autouse=True)
def own_folders(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TONFA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TONFA_MODELS", str(models))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tonfa(capsys):
    """Run the command line with --json; returns exit code, the JSON object and standard error."""

    def run(*words: Any) -> tuple[int, dict[str, Any], str]:
        code = main([*map(str, words), "--json"])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        result = json.loads(lines[-1])
        jsonschema.validate(result, SCHEMA)
        assert len(lines) == 1
        return code, result, captured.err

    return run


def recipe_in(path: Path) -> recipe.Recipe:
    return recipe.recipe_of(recipe.read_png(path)[1], path.name)


def error(outcome: tuple[int, dict[str, Any], str], code: int = 2) -> str:
    """The problem's words; they stand in the JSON and on standard error."""
    found, result, stderr = outcome
    assert set(result) == {"error"}
    assert found == code, result
    words = f"{result['error']['what']} {result['error']['todo']}"
    assert words in stderr
    return words


def test_the_schema_is_sound():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


# ---------------------------------------------------------------------------------------------------- generate


def test_generate_writes_the_picture_and_says_everything_about_it(tonfa, tmp_path):
    code, result, stderr = tonfa(
        "generate", "--prompt", "a red fox", "--model", "tiny", "--out", "fox.png", "--seed", 7, "--steps", 3,
        "--width", 96, "--height", 64, "--guidance", 2.5, "--lora", "Bold look:0.5", "--lora", "Soft look",
    )  # fmt: skip
    assert code == 0
    assert result["out"] == [str(tmp_path / "fox.png")]
    assert (result["model"], result["family"], result["prompt"]) == ("Tiny", "flux", "a red fox")
    assert (result["seed"], result["steps"], result["width"], result["height"]) == (7, 3, 96, 64)
    assert (result["guidance"], result["cfg"], result["negative"]) == (2.5, 1.0, "")
    assert [lora["strength"] for lora in result["loras"]] == [0.5, 1.0]
    assert all(lora["keys_used"] == 6 and lora["keys_unused"] == [] for lora in result["loras"])
    assert sum(result["plan"].values()) > 10
    assert result["seconds"]["total"] >= result["seconds"]["denoise"] > 0
    assert result["peak_bytes"]["host"] > 100 * 2**20
    pixels, _ = recipe.read_png(tmp_path / "fox.png")
    assert pixels.shape == (64, 96, 3)
    assert "fox.png" in stderr


def test_without_json_standard_output_holds_the_paths_alone(capsys, tmp_path):
    assert main(["generate", "--prompt", "a fox", "--model", "tiny", "--out", "a.png", "--count", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    assert "Picture 1 of 2" in captured.err


def test_the_same_command_twice_gives_the_same_bytes(tonfa, tmp_path):
    for name in ("a.png", "b.png"):
        tonfa("generate", "--prompt", "a fox", "--model", "tiny-int4", "--out", name, "--negative", "a dog")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_size_that_snaps_is_a_warning(tonfa):
    code, result, stderr = tonfa("generate", "--prompt", "x", "--model", "tiny", "--out", "a.png", "--width", 70)
    assert (code, result["width"]) == (0, 64)
    assert "The width 70 became 64" in stderr


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.5", "style.safetensors", 0.5),
        ("style:-1", "style", -1.0),
        ("style:1e-1", "style", 0.1),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:0.7", r"C:\loras\style.safetensors", 0.7),
        ("style:v2", "style:v2", 1.0),
        ("style:nan", "style:nan", 1.0),
        ("style:inf", "style:inf", 1.0),
        ("style:0.5:0.25", "style:0.5", 0.25),
        ("style:", "style:", 1.0),
    ],
)
def test_a_lora_is_split_at_the_last_colon_before_a_finite_number(text, file, strength):
    assert lora_choice(text) == LoraChoice(file, strength)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "tiny", "--out", "a.png"], "No prompt"),
        (["--prompt", "x", "--model", "tiny"], "no file to write"),
        (["--prompt", " ", "--model", "tiny", "--out", "a.png"], "prompt is empty"),
        (["--prompt", "x", "--model", "nowhere", "--out", "a.png"], "no model 'nowhere'"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.jpg"], "PNG"),
        (["--prompt", "x", "--model", "tiny", "--out", "no/a.png"], "no folder"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--lora", "nothing:1"], "no LoRA 'nothing'"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--width", "4000"], "32 to 128"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--width", "wide"], "invalid int"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--steps", "0"], "steps"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--seed", str(2**53)], "seed"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--seed", "-1"], "seed"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--cfg", "nan"], "cfg"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--count", "0"], "count"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--threads", "0"], "threads"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--plan", "w2a2"], "plan"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--plan", "w4a4"], "16-bit"),
        (["--prompt", "x", "--model", "tiny", "--out", "a.png", "--device", "tpu"], "device"),
        (["--prompt", "x", "--model", "schnell", "--out", "a.png", "--guidance", "3"], "takes no guidance"),
        (["--prompt", "x", "--bogus"], "Unrecognized arguments: --bogus"),
        (["--prompt", "x", "--out", "a.png", "--recipe", "missing.png"], "no file missing.png"),
        (["--jobs", "missing.jsonl"], "missing.jsonl cannot be read"),
    ],
)
def test_a_bad_request_ends_with_two(tonfa, words, said, tmp_path):
    assert said in error(tonfa("generate", *words))
    assert list(tmp_path.glob("**/*.png")) == []


def test_a_strength_that_is_no_number_is_told_as_that(tonfa):
    for strength in ("abc", "nan", "0.5x", ""):
        words = error(
            tonfa(
                "generate", "--prompt", "x", "--model", "tiny", "--out", "a.png", "--lora", f"Bold look:{strength}"
            )
        )
        assert f"{strength!r} is no strength for the LoRA Bold look" in words


def test_one_size_alone_is_told_as_one(tonfa):
    words = error(tonfa("generate", "--prompt", "x", "--out", "a.png", "--height", 512))
    assert words == "Tonfa Mini makes pictures of 256 x 256 pixels only. Leave the height out."


def test_a_mistake_in_a_name_is_told_before_torch_is_imported(models, tmp_path):
    wishes = [
        ["generate", "--prompt", "x", "--model", "nowhere", "--out", "a.png"],
        ["generate", "--prompt", "x", "--model", "tiny", "--out", "a.png", "--lora", "nothing"],
        ["generate", "--prompt", "x", "--model", "tiny", "--out", "a.png", "--width", "4000"],
        ["generate", "--prompt", "x", "--model", "tiny", "--out", "no/a.png"],
        ["generate", "--recipe", "no.png", "--out", "a.png"],
        ["generate", "--jobs", "no.jsonl"],
        ["inspect", "no.safetensors"],
        ["quantize", "no.safetensors", "--out", "q.safetensors"],
        ["quantize", "no.safetensors", "--out", "no/q.safetensors"],
        ["verify", "no.png"],
    ]
    code = (
        f"import sys; from engine.__main__ import main; codes = [main(words) for words in {wishes!r}]; "
        "print(codes, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{[2] * len(wishes)} False\n"


def test_a_machine_without_the_card_ends_with_three(tonfa, monkeypatch):
    from engine import device

    monkeypatch.setattr(device.Monitor, "gpus", lambda self, pid=None: ())
    words = ("generate", "--prompt", "x", "--model", "tiny", "--out", "a.png", "--device", "cuda:0")
    assert "No NVIDIA graphics card" in error(tonfa(*words), code=3)


def test_a_bug_of_ours_ends_with_one_and_says_so(tonfa, tmp_path, monkeypatch):
    from engine import session

    def broken(path: Path, check: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(session, "inspect_file", broken)
    (tmp_path / "x").write_bytes(b"")
    assert "Something went wrong inside Tonfa" in error(tonfa("inspect", "x"), code=1)


def test_words_on_the_command_line_alone_are_problems_too(tonfa, capsys):
    assert "command" in error(tonfa()).lower()
    assert "invalid choice" in error(tonfa("paint"))
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--help"])
    assert ended.value.code == 0
    assert "--lora" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- recipes and jobs


def test_a_recipe_makes_the_picture_again_and_flags_change_it(tonfa, tmp_path):
    tonfa(
        "generate", "--prompt", "a red fox", "--model", "tiny", "--out", "a.png", "--seed", 5, "--steps", 3,
        "--noise", "torch", "--negative", "a dog", "--lora", "Bold look:0.4",
    )  # fmt: skip
    assert tonfa("generate", "--recipe", "a.png", "--out", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    changed = tonfa("generate", "--recipe", "a.png", "--out", "c.png", "--seed", 6, "--lora", "Soft look")[1]
    assert (changed["seed"], changed["steps"], changed["prompt"]) == (6, 3, "a red fox")
    assert [Path(lora["file"]).name for lora in changed["loras"]] == ["lora-soft.safetensors"]


def test_a_recipe_brings_its_plan_and_threads_where_the_network_is_the_same(tonfa, models, tmp_path):
    words = ("generate", "--prompt", "a fox", "--model", "tiny-int4", "--out", "a.png")
    assert tonfa(*words, "--plan", "w4a4", "--threads", 1)[1]["plan"]["w4a4"] > 0
    again = tonfa("generate", "--recipe", "a.png", "--out", "b.png")[1]
    assert again["plan"]["w4a4"] > 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "w4a4" not in tonfa("generate", "--recipe", "a.png", "--out", "c.png", "--plan", "w4a16")[1]["plan"]
    other = tonfa("generate", "--recipe", "a.png", "--model", "schnell", "--out", "d.png", "--lora", "Soft look")
    assert "takes no guidance" in error(other)
    wide = tonfa("generate", "--recipe", "a.png", "--model", "tiny", "--out", "e.png")[1]
    assert "w4a4" not in wide["plan"]


def test_a_strangers_recipe_names_no_folder(tonfa, models, tmp_path):
    tonfa("generate", "--prompt", "a fox", "--model", "tiny", "--out", "a.png")
    pixels, texts = recipe.read_png(tmp_path / "a.png")
    made = recipe.recipe_of(texts, "a.png")
    for name in (str(models / "tiny"), "tiny", "../tiny"):
        (tmp_path / "evil.png").write_bytes(recipe.png_bytes(pixels, replace(made, model=name)))
        assert "not on this computer" in error(tonfa("generate", "--recipe", "evil.png", "--out", "b.png"))
        assert tonfa("generate", "--recipe", "evil.png", "--model", "tiny", "--out", "b.png")[0] == 0


def test_another_programs_recipe_is_read_as_far_as_it_goes(tonfa, tmp_path):
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a red fox\nSteps: 3, Seed: 9, CFG scale: 2, Size: 96x64, Model: other")
    Image.new("RGB", (96, 64)).save(tmp_path / "other.png", pnginfo=info)
    result = tonfa("generate", "--recipe", "other.png", "--model", "tiny", "--out", "b.png")[1]
    assert (result["prompt"], result["steps"], result["seed"], result["cfg"]) == ("a red fox", 3, 9, 2.0)
    assert (result["width"], result["height"]) == (96, 64)


def test_jobs_run_one_after_another_and_a_bad_one_does_not_stop_the_rest(tonfa, tmp_path):
    lines = [
        {"prompt": "a fox", "out": "1.png", "lora": "Bold look:0.5"},
        {"prompt": "a fox", "out": "2.png", "model": "nowhere"},
        {"prompt": "a cat", "out": "3.png", "seed": 4, "lora": ["Bold look", "Soft look:0.2"]},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, result, _ = tonfa("generate", "--jobs", "jobs.jsonl", "--model", "tiny", "--steps", 1)
    assert code == 2
    first, second, third = result["jobs"]
    assert first["out"] == [str(tmp_path / "1.png")]
    assert "nowhere" in second["error"]["what"]
    assert (third["seed"], third["steps"]) == (4, 1)
    assert [lora["strength"] for lora in third["loras"]] == [1.0, 0.2]
    assert third["seconds"]["load"] < 1


def test_a_job_line_ends_where_the_file_says_so_and_a_byte_order_mark_is_none(tonfa, tmp_path):
    lines = ['{"prompt": "a\u2028b", "out": "1.png"}\r', '{"prompt": "a\x85b", "out": "2.png"}', ""]
    (tmp_path / "jobs.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    code, result, _ = tonfa("generate", "--jobs", "jobs.jsonl", "--model", "tiny", "--steps", 1)
    assert (code, [job["prompt"] for job in result["jobs"]]) == (0, ["a\u2028b", "a\x85b"])


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in folders")
def test_a_pipe_is_no_jobs_file(tonfa, tmp_path):
    os.mkfifo(tmp_path / "jobs")
    assert "not a file" in error(tonfa("generate", "--jobs", "jobs"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "Line 2"),
        ("[1]", "JSON object"),
        ('{"prompt": "x", "out": "a.png", "colour": 1}', "no field 'colour'"),
        ('{"out": "a.png"}', "no prompt"),
        ('{"prompt": "x"}', "no file to write"),
        ('{"prompt": 5, "out": "a.png"}', "prompt must be text"),
        ('{"prompt": "x", "out": "a.png", "steps": "many"}', "steps"),
        ('{"prompt": "x", "out": "a.png", "seed": 1.5}', "seed"),
        ('{"prompt": "x", "out": "a.png", "lora": {"a": 1}}', "lora must be"),
        ("[" * 10_000, "Line 2"),
    ],
)
def test_a_wrong_line_of_jobs_is_named_before_anything_runs(tonfa, tmp_path, line, said):
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": "x", "out": "1.png"}) + "\n" + line)
    words = error(tonfa("generate", "--jobs", "jobs.jsonl", "--model", "tiny"))
    assert "Line 2" in words
    assert said in words
    assert not (tmp_path / "1.png").exists()


# ------------------------------------------------------------------------------------------ inspect, verify, doctor


def test_inspect_tells_what_each_file_is(tonfa, models, tmp_path):
    int4 = tonfa("inspect", models / "tiny-int4" / "transformer.safetensors")[1]
    assert (int4["kind"], int4["family"], int4["precision"], int4["usable"]) == ("svdquant", "flux", "int4", True)
    assert int4["ranks"] == {"32": 16}
    assert int4["keys_used"] > 100
    assert all(one["key"].endswith("smooth_orig") for one in int4["keys_unused"])
    wide = tonfa("inspect", models / "tiny" / "transformer.safetensors")[1]
    assert (wide["kind"], wide["precision"], wide["ranks"]) == ("transformer", "bf16", {})
    assert wide["keys_unused"] == []
    lora = tonfa("inspect", models / "tiny" / "lora-bold.safetensors")[1]
    assert (lora["kind"], lora["ranks"], lora["usable"], lora["keys_used"]) == ("lora", {"4": 3}, True, 6)
    bundle = tonfa("inspect", models / "tiny-int4")[1]
    assert (bundle["kind"], bundle["precision"]) == ("bundle", "int4")
    for file, kind in (("t5", "text_encoder"), ("clip", "text_encoder"), ("vae", "vae")):
        found = tonfa("inspect", models / "tiny" / f"{file}.safetensors")[1]
        assert (found["kind"], found["usable"]) == (kind, True)
    t5 = tonfa("inspect", repository() / "assets" / "tonfa-mini" / "t5.safetensors")[1]
    assert (t5["kind"], t5["precision"]) == ("text_encoder", "int4")


@pytest.mark.parametrize("wrong", ["shape", "type", "bias"])
def test_inspect_refuses_what_generate_refuses(tonfa, models, tmp_path, wrong):
    import torch

    shutil.copytree(models / "tiny", tmp_path / "model")
    path = tmp_path / "model" / "transformer.safetensors"
    file = open_safetensors(path)
    tensors = {name: file.read(name) for name in file.tensors}
    name = next(name for name in tensors if name.endswith("proj_mlp.weight"))
    tensors[name] = {
        "shape": tensors[name][:, :7].contiguous(), "type": tensors[name].to(torch.int32), "bias": tensors[name]
    }[wrong]  # fmt: skip
    if wrong == "bias":
        name = name.replace(".weight", ".bias")
        tensors[name] = tensors[name][:7].clone()
    write_safetensors(path, tensors, file.metadata)
    write_bundle_json(tmp_path / "model", tiny_description(tmp_path / "model"))
    refused = error(tonfa("generate", "--prompt", "x", "--model", tmp_path / "model", "--out", "a.png"))
    assert name in refused
    assert error(tonfa("inspect", path)) == refused
    assert error(tonfa("inspect", tmp_path / "model")) == refused


def test_a_sound_but_foreign_file_is_a_result_a_damaged_one_a_problem(tonfa, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"some.weight": torch.zeros(2, 2)}, tmp_path / "foreign.safetensors")
    code, result, _ = tonfa("inspect", "foreign.safetensors")
    assert (code, result["kind"], result["usable"]) == (0, "unknown", False)
    assert result["reason"]
    assert result["keys_unused"] == [{"key": "some.weight", "why": result["reason"]}]
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 50)
    assert "damaged.safetensors" in error(tonfa("inspect", "damaged.safetensors"))
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    assert "pickle" in error(tonfa("inspect", "model.ckpt"))
    assert "missing.safetensors" in error(tonfa("inspect", "missing.safetensors"))


def test_a_lora_of_another_model_says_why_its_keys_are_not_used(tonfa, tmp_path):
    import torch
    from safetensors.torch import save_file

    down, up = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "lora_B"
    save_file(
        {down: torch.zeros(4, 100), down.replace("lora_A", up): torch.zeros(100, 4)}, tmp_path / "lora.safetensors"
    )
    result = tonfa("inspect", "lora.safetensors")[1]
    assert (result["kind"], result["usable"], result["keys_used"]) == ("lora", False, 0)
    assert "made for a layer of 100 x 100" in result["keys_unused"][0]["why"]


def test_verify_answers_by_its_exit_code(tonfa, tmp_path, monkeypatch):
    tonfa("generate", "--prompt", "a fox", "--model", "tiny", "--out", "a.png")
    code, result, _ = tonfa("verify", "a.png")
    assert (code, result["same"], result["differs"]) == (0, True, [])
    pixels, _ = recipe.read_png(tmp_path / "a.png")
    made = recipe_in(tmp_path / "a.png")
    pixels = np.where(np.arange(64)[:, None, None] < 2, 0, pixels).astype(np.uint8)
    (tmp_path / "b.png").write_bytes(recipe.png_bytes(pixels, made))
    code, result, _ = tonfa("verify", "b.png")
    assert (code, result["same"]) == (2, False)
    monkeypatch.setattr("engine.session.__version__", "0.0.9")
    code, result, stderr = tonfa("verify", "b.png")
    assert (code, [one["what"] for one in result["differs"]]) == (3, ["Tonfa"])
    assert "another Tonfa" in stderr


def test_inspect_of_a_file_of_another_kind_says_what_it_is(tonfa, tmp_path, models):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "notes.txt").write_text("buy milk, für morgen\n" * 100)
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    tonfa("generate", "--prompt", "a fox", "--model", "tiny", "--out", "fox.png", "--steps", 1)
    for file, what in (
        ("plain.png", "a PNG picture"),
        ("photo.jpg", "a JPEG picture"),
        ("notes.txt", "a text file"),
        ("model.gguf", "a GGUF file"),
        ("fox.png", "a picture with its recipe"),
    ):
        code, result, _ = tonfa("inspect", file)
        assert (code, result["kind"], result["usable"]) == (0, "unknown", False)
        assert result["reason"] == f"it is {what}, not a model"
    for file in ("page.safetensors", "picture.safetensors"):
        (tmp_path / file).write_bytes(
            b"<!DOCTYPE html>" if "page" in file else (tmp_path / "plain.png").read_bytes()
        )
    assert "is a web page, not a safetensors file" in error(tonfa("inspect", "page.safetensors"))
    assert "is a PNG picture, not a safetensors file" in error(tonfa("inspect", "picture.safetensors"))
    (tmp_path / "old.pt").write_text("text")
    assert "pickle" in error(tonfa("inspect", "old.pt"))


def test_inspect_for_people_says_what_there_is_and_nothing_else(capsys, models, tmp_path):
    assert main(["inspect", str(models / "tiny-int4" / "transformer.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "a network in 4 bits of the family flux" in told
    assert "rank 32 in 16" in told
    assert "Usable       yes" in told
    assert "and 12 more: kept for tools" in told
    (tmp_path / "notes.txt").write_text("buy milk")
    assert main(["inspect", "notes.txt"]) == 0
    told += capsys.readouterr().out
    assert "no: it is a text file, not a model" in told
    assert "None" not in told
    assert "{}" not in told


def test_quantize_makes_a_file_that_generate_and_inspect_take(tonfa, models, tmp_path):
    words = ("--out", "q.safetensors", "--rank", 16, "--rounding", "nearest", "--no-smooth")
    code, result, _ = tonfa("quantize", models / "tiny" / "transformer.safetensors", *words)
    assert (code, result["precision"], result["rank"]) == (0, "int4", 16)
    assert len(result["per_layer"]) == 16
    found = tonfa("inspect", "q.safetensors")[1]
    assert (found["kind"], found["precision"], found["ranks"]) == ("svdquant", "int4", {"16": 16})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["q.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.safetensors", "--out", "q.safetensors"], "missing.safetensors"),
        (["x.safetensors"], "--out"),
        (["x.safetensors", "--out", "q.safetensors", "--rank", "17"], "rank"),
        (["~nosuchuser/x.safetensors", "--out", "q.safetensors"], "x.safetensors"),
        (["x" * 300, "--out", "q.safetensors"], "No file can be called"),
        (["x.safetensors", "--out", "q" * 300 + ".safetensors"], "No file can be called"),
        (["x.safetensors", "--out", "q.safetensors", "--precision", "int3"], "precision"),
        (["x.safetensors", "--out", "q.safetensors", "--keep", "fc2"], "keep"),
    ],
)
def test_a_bad_wish_to_quantize_ends_with_two(tonfa, words, said):
    assert said in error(tonfa("quantize", *words))


def test_verify_of_a_picture_without_recipe_is_a_problem(tonfa, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert "no recipe" in error(tonfa("verify", "plain.png"))


def test_doctor_lists_problems_and_ends_well(tonfa, monkeypatch):
    from engine.pipelines import doctor

    monkeypatch.setattr(doctor.Monitor, "gpus", lambda self, pid=None: ())
    code, result, _ = tonfa("doctor")
    assert code == 0
    assert result["gpus"] == []
    assert any("No NVIDIA graphics card" in one["what"] for one in result["problems"])
    assert result["cpu"]["threads"] >= 1


def test_doctor_for_people_names_the_machine_the_models_and_the_folders(capsys, models, tmp_path):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for words in (" threads, ", " GB of memory", "Card ", "Tonfa Mini 0.1", "Tiny int4", str(tmp_path / "home")):
        assert words in told


def test_doctor_names_every_models_folder_and_one_that_is_not_there(tonfa, capsys, models, monkeypatch):
    assert main(["doctor"]) == 0
    assert str(models) in capsys.readouterr().out
    monkeypatch.setenv("TONFA_MODELS", "/nowhere/models")
    told = [one for one in tonfa("doctor")[1]["problems"] if "/nowhere/models" in one["what"]]
    assert [one["todo"] for one in told] == ["Check the name in TONFA_MODELS."]


def test_doctor_tells_the_plans_of_a_card(tonfa, monkeypatch):
    from engine.monitor import GpuSample
    from engine.pipelines import doctor

    card = GpuSample(0, "A card", "GPU-1", 90, "580", 2**37, 2**30, None, None, None, None)
    monkeypatch.setattr(doctor.Monitor, "gpus", lambda self, pid=None: (card,))
    monkeypatch.setattr("torch.version.cuda", None)
    result = tonfa("doctor")[1]
    (gpu,) = result["gpus"]
    assert (gpu["arch"], gpu["plan_int4"], gpu["plan_nvfp4"]) == ("sm_90", "w4a8", "w4a16")
    told = [one for one in result["problems"] if "Pictures are made on the processor" in one["what"]]
    assert [one["todo"] for one in told] == ["Run the installer again."]  # this torch is for the CPU


def test_doctor_counts_the_layers_of_each_model_by_plan(tonfa, monkeypatch):
    from engine.device import Device
    from engine.pipelines import inspect_file

    models = {one["name"]: one for one in tonfa("doctor")[1]["models"]}
    assert models["Tiny"]["precision"] == "16-bit"
    assert models["Tiny"]["plans"].keys() == {"bf16"}
    assert models["Tiny int4"]["precision"] == "int4"
    card = Device("cuda:0", "A card", 90, "580", "bfloat16")
    monkeypatch.setattr(inspect_file, "choose_device", lambda: card)
    models = {one["name"]: one for one in tonfa("doctor")[1]["models"]}
    assert models["Tiny int4"]["plans"] == {"bf16": 10, "w4a16": 4, "w4a8": 16}


def test_inspect_names_a_layer_with_a_code_of_minus_eight(tonfa, models, tmp_path, monkeypatch):
    from engine.device import Device
    from engine.pipelines import inspect_file

    monkeypatch.setattr(inspect_file, "choose_device", lambda: Device("cuda:0", "A card", 90, "580", "bfloat16"))
    source = models / "tiny-int4" / "transformer.safetensors"
    file = open_safetensors(source)
    tensors = {key: file.read(key).clone() for key in file.tensors}
    prefix = "single_transformer_blocks.0.qkv_proj"
    tensors[f"{prefix}.qweight"][0, 0] = 8  # two codes: -8 and 0
    write_safetensors(tmp_path / "odd.safetensors", tensors, dict(file.metadata))
    result = tonfa("inspect", "odd.safetensors")[1]
    assert result["plans"] == {"bf16": 10, "w4a16": 5, "w4a8": 15}
    assert result["plan_of_layer"][prefix] == "w4a16"
    assert result["plan_of_layer"]["single_transformer_blocks.1.qkv_proj"] == "w4a8"
    assert len(result["plan_of_layer"]) == 30
    assert result["reason"].startswith(prefix)
    assert "w4a16" in result["reason"]
    assert tonfa("inspect", source)[1]["plans"] == {"bf16": 10, "w4a16": 4, "w4a8": 16}


def test_bench_without_a_card_says_so(tonfa):
    assert "graphics card" in error(tonfa("bench", "--step", "--shapes", "mini", "--device", "cpu"), code=3)
    assert "shapes" in error(tonfa("bench", "--shapes", "huge"))


def test_bench_is_a_table_for_people(capsys, models, monkeypatch):
    from engine import session

    linear = {
        "operation": "svdq_linear, plain", "shape": "qkv, 288 x 512 -> 1536, rank 32", "plan": "w4a8", "us": 8.5,
        "torch_us": 4.4, "fp8_us": None, "bound": "fp8", "ceiling": 0.07,
    }  # fmt: skip
    result = {
        "card": "A card", "arch": "sm_90", "torch": "2.11", "plan": "w4a8", "shapes": "mini",
        "ceilings": {"copy_bytes_per_second": 3e12, "matrix_flops": 7e14, "fp8_flops": None}, "kernels": [linear],
        "steps": [{"what": "w4a8, as a graph", "ms": 1.5, "weights_bytes": 2**30}],
    }  # fmt: skip

    def measured(self, request, check):
        yield from ()
        return result

    monkeypatch.setattr(session.Engine, "_bench", measured)
    assert main(["bench", "--shapes", "mini"]) == 0
    told = capsys.readouterr().out
    assert "| svdq_linear, plain | qkv, 288 x 512 -> 1536, rank 32 | 8.5 | 4.4 |  | 7% of FP8 matrix |" in told
    assert "| w4a8, as a graph | 1.50 | 1.00 |" in told
    assert main(["bench", "--json"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out.splitlines()[-1]), SCHEMA)


# ------------------------------------------------------------------------------------------------------ processes


def start(*words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(repository())}
    return subprocess.Popen(
        [sys.executable, "-m", "engine", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_and_leaves_no_partial_file(tmp_path, number):
    process = start(
        "generate",
        "--prompt",
        "a fox",
        "--model",
        "tiny",
        "--out",
        "a.png",
        "--steps",
        "1000",
        "--count",
        "50",
        "--json",
    )
    assert process.stderr is not None
    assert process.stdout is not None
    said = b""
    while b"Picture 1 of 50\n" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(number)
    out = process.stdout.read()
    process.stderr.read()
    assert process.wait(60) == 130
    result = json.loads(out.splitlines()[-1])
    jsonschema.validate(result, SCHEMA)
    assert "error" in result
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


def stopped(preparation: str, *words: str) -> tuple[dict[str, Any], str]:
    """Run the command line in a process that first runs `preparation`; it must end as stopped work does."""
    code = f"import os, signal, sys\n{preparation}\nfrom engine.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--json"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(repository())},
        timeout=200,
    )
    assert done.returncode == 130, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    jsonschema.validate(result, SCHEMA)
    return result, done.stderr.decode()


IMAGE = ("generate", "--prompt", "a fox", "--model", "tiny", "--out", "a.png")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_torch_is_imported_ends_with_130(number):
    at_torch = f"""
class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, AtTorch())
"""
    result, said = stopped(at_torch, *IMAGE)
    assert "Stopped." in result["error"]["what"]
    assert "Stopped." in said
    assert "Traceback" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_twice_in_the_middle_of_writing_leaves_nothing_and_says_so(tmp_path):
    while_writing = """
rename = os.replace
def replace(source, target):
    if str(target).endswith("a.png"):
        assert os.path.exists(source)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    rename(source, target)
os.replace = replace
"""
    result, said = stopped(while_writing, *IMAGE)
    assert "Stopped." in result["error"]["what"]
    assert "Stopped." in said
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_stopped_jobs_end_with_130_whatever_failed_before(tmp_path):
    lines = [{"prompt": "a", "out": "1.png", "model": "nowhere"}, {"prompt": "b", "out": "2.png"}, {"prompt": "c"}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(json.dumps({"out": "3.png", **line}) for line in lines))
    while_writing = """
rename = os.replace
def replace(source, target):
    rename(source, target)
    if str(target).endswith("2.png"):
        os.kill(os.getpid(), signal.SIGINT)
os.replace = replace
"""
    words = ("generate", "--jobs", "jobs.jsonl", "--model", "tiny", "--count", "3")
    result, _ = stopped(while_writing.replace("2.png", "2-0.png"), *words)
    first, second = result["jobs"]
    assert "nowhere" in first["error"]["what"]
    assert "Stopped." in second["error"]["what"]
    assert not list(tmp_path.glob("3*.png"))


def test_logs_and_errors_hold_no_prompts(tmp_path):
    secret = "xyzzy plugh"
    process = start("generate", "--prompt", secret, "--model", "tiny", "--out", "a.png")
    out, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert secret.encode() not in out + stderr
    for path in (tmp_path / "home").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def test_help_comes_without_torch(tmp_path):
    code = (
        "import sys; from engine.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository(), stdout=subprocess.DEVNULL)


def test_a_vae_by_other_names_says_so(tonfa, tmp_path):
    from safetensors.torch import load_file, save_file

    write_vae(tmp_path / "vae.safetensors")
    tensors = load_file(tmp_path / "vae.safetensors")
    renamed = {name.replace("up_blocks.", "up."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "ae.safetensors")
    result = tonfa("inspect", "ae.safetensors")[1]
    assert (result["kind"], result["usable"]) == ("vae", False)
    assert "other names" in result["reason"]
