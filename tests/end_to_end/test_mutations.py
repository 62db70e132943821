"""Whatever stands in the JSON of a bundle, its tokenizer or its parts' configurations: a picture or a problem."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.bundle import read_bundle
from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.events import Failed, Finished
from engine.pipelines.image_decoder import ImageDecoder
from engine.problems import ProblemError, ProblemKind
from engine.requests import ImageRequest
from engine.session import Engine
from engine.text.clip import ClipEncoder
from engine.text.prompts import TextEncoders
from engine.text.t5 import T5Encoder
from engine.text.tokenizer import PromptTokenizer

CPU = torch.device("cpu")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 63, 64, 1000, 2**20, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e30,
    1e308, "", " ", "x", "..", "/", "/dev/null", "\0", "\ud800", "a" * 5000, "transformer.safetensors",
    [], [0], [1, 2, 3], [[1, 2, 3]], ["a"], {}, {"a": 1}, [[[[[[]]]]]],
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated(content: Any, seed: int) -> Any:
    """A copy in which one to three values are others, are missing, or have another name."""
    dice = random.Random(seed)
    content = copy.deepcopy(content)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        container, key = dice.choice(list(places(content)))
        value = container[key]
        match dice.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[f"{key}x"] = container.pop(key)
            case 2 if isinstance(container, list):
                container.append(copy.deepcopy(value))
            case 3 if isinstance(value, int | float) and not isinstance(value, bool):
                container[key] = dice.choice((value * 2, -value, value + 1, value - 1, float(value), value * 1000))
            case _:
                container[key] = copy.deepcopy(dice.choice(VALUES))
    return content


def only_problems(work: Callable[[], object]) -> bool:
    """Whether it went well; any exception but ProblemError fails the test."""
    try:
        work()
    except ProblemError as error:
        problem = error.problem
    else:
        return True
    assert problem.kind is not ProblemKind.ENGINE
    assert problem.what
    assert problem.todo
    return False


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONFA_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A bundle whose files a test may exchange one by one."""
    made = tmp_path / "model"
    made.mkdir()
    for file in tiny.iterdir():
        (made / file.name).symlink_to(file)
    return made


def exchange(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text, "utf-8")


def sound(path: Path) -> Any:
    content = json.loads(path.read_text("utf-8"))
    for part in [*content.get("parts", {}).values(), *content.get("loras", [])]:
        part.pop("sha256", None)  # else the hash alone would answer
    return content


SEEDS = range(10)
EACH = 30  # mutations of one seed


@pytest.mark.parametrize("seed", SEEDS)
def test_any_bundle_json_ends_in_a_plan_or_a_problem(folder, seed):
    engine, original = Engine(), sound(folder / "bundle.json")
    ends = []
    for number in range(EACH):
        exchange(folder / "bundle.json", json.dumps(mutated(original, seed * EACH + number)))
        good = only_problems(lambda: read_bundle(folder))
        ends.append(only_problems(lambda: engine.plan(ImageRequest("a fox", model=str(folder)))))
        assert good or not ends[-1]
    assert set(ends) == {True, False}


@pytest.mark.parametrize("seed", SEEDS)
def test_any_bundle_json_ends_in_a_picture_or_a_problem(folder, seed):
    engine, original = Engine(), sound(folder / "bundle.json")
    request = ImageRequest("a fox", model=str(folder), steps=1, width=64, height=64)
    for number in range(4):
        exchange(folder / "bundle.json", json.dumps(mutated(original, 10_000 + seed * 4 + number)))
        final = list(engine.run(number, request))[-1]
        assert isinstance(final, Finished | Failed)
        assert isinstance(final, Finished) or final.problem.kind is not ProblemKind.ENGINE, final.problem.detail


@pytest.mark.parametrize("seed", SEEDS)
def test_any_tokenizer_json_ends_in_embeddings_or_a_problem(folder, tmp_path, seed):
    original = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    t5 = T5Encoder(open_safetensors(folder / "t5.safetensors"), CPU, torch.float32)
    clip = ClipEncoder(open_safetensors(folder / "clip.safetensors"), CPU, torch.float32)
    path = tmp_path / "tokenizer.json"

    def encode() -> None:
        tokenizer = PromptTokenizer(path, 16, 0)
        encoders = TextEncoders(t5, clip, tokenizer, tokenizer)
        for prompt in ("", "a red fox", "zzz 狐" * 30):
            encoders.encode(prompt)

    for number in range(EACH):
        path.write_text(json.dumps(mutated(original, 20_000 + seed * EACH + number)), "utf-8")
        only_problems(encode)


def use_t5(path: Path) -> None:
    T5Encoder(open_safetensors(path), CPU, torch.float32).encode([3, 4, 1] + [0] * 13)


def use_clip(path: Path) -> None:
    ClipEncoder(open_safetensors(path), CPU, torch.float32).encode([3, 4, 1] + [0] * 13)


def use_vae(path: Path) -> None:
    ImageDecoder(open_safetensors(path), CPU, torch.float32).decode(torch.zeros(1, 16, 4, 4))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "use"), [("t5", use_t5), ("clip", use_clip), ("vae", use_vae)])
def test_any_configuration_of_a_part_ends_in_numbers_or_a_problem(folder, tmp_path, name, use, seed):
    file = open_safetensors(folder / f"{name}.safetensors")
    tensors = {tensor: file.read(tensor) for tensor in file.tensors}
    ends = []
    for number in range(EACH):
        config = mutated(json.loads(file.metadata["config"]), 30_000 + seed * EACH + number)
        write_safetensors(tmp_path / "part.safetensors", tensors, {"config": json.dumps(config)})
        ends.append(only_problems(lambda: use(tmp_path / "part.safetensors")))
    assert set(ends) == {True, False}
