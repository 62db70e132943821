"""From a request to pixels with a whole tiny model: what the engine promises."""

from __future__ import annotations

import gc
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from engine import folders, recipe, session
from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.events import (
    Cancelled,
    Event,
    Failed,
    Final,
    Finished,
    ImageDone,
    ImageStarted,
    Loading,
    Notice,
    Prepared,
    StepDone,
)
from engine.models.flux import Flux
from engine.pipelines.image_decoder import ImageDecoder
from engine.problems import ProblemError, ProblemKind, machine_cannot
from engine.requests import ImageRequest, LoraChoice, PrepareRequest, Request, VerifyRequest
from engine.session import Engine
from tests.end_to_end.tiny_bundle import make_tiny_bundle, tiny_description, write_bundle_json


@pytest.fixture(scope="module")
def engine() -> Engine:
    """One engine for all tests here: state that leaks from one to the next would show."""
    return Engine()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONFA_HOME", str(tmp_path / "home"))


def run(engine: Engine, request: Request, job: int = 1) -> list[Event]:
    events = list(engine.run(job, request))
    assert [isinstance(event, Final) for event in events] == [False] * (len(events) - 1) + [True]
    return events


def pictures(events: list[Event]) -> list[ImageDone]:
    assert isinstance(events[-1], Finished), events[-1]
    return [event for event in events if isinstance(event, ImageDone)]


def draw(engine: Engine, model: Path, prompt: str = "a red fox", **fields: Any) -> np.ndarray:
    (done,) = pictures(run(engine, ImageRequest(prompt, model=str(model), **fields)))
    return done.pixels


def recipe_in(path: Path) -> recipe.Recipe:
    return recipe.recipe_of(recipe.read_png(path)[1], path.name)


def failure(events: list[Event]) -> tuple[ProblemKind, str]:
    assert isinstance(events[-1], Failed), events[-1]
    return events[-1].problem.kind, str(events[-1].problem)


# ---------------------------------------------------------------------------------------- the way of one picture


def test_events_come_in_order_and_cross_processes(engine, tiny):
    engine.unload()
    events = run(engine, ImageRequest("a red fox", model=str(tiny), count=2, seed=5))
    kinds = [type(event) for event in events if not isinstance(event, Loading)]
    one = [ImageStarted, StepDone, StepDone, ImageDone]
    assert kinds == [*one, *one, Finished]
    fractions = [event.fraction for event in events if isinstance(event, Loading)]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    starts = [event for event in events if isinstance(event, ImageStarted)]
    assert [(start.image, start.images, start.seed) for start in starts] == [(1, 2, 5), (2, 2, 6)]
    for event in events:
        assert type(pickle.loads(pickle.dumps(event))) is type(event)


def test_a_picture_is_saved_with_its_recipe(engine, tiny, tmp_path):
    out = tmp_path / "fox.png"
    request = ImageRequest("a red fox", model=str(tiny), out=str(out), loras=(LoraChoice("Bold look", 0.5),))
    events = run(engine, request)
    (done,) = pictures(events)
    assert done.file == str(out)
    assert np.array_equal(np.asarray(Image.open(out)), done.pixels)
    made = recipe_in(out)
    assert made.to_json() == done.recipe
    assert (made.prompt, made.seed, made.width, made.steps, made.guidance) == ("a red fox", 0, 64, 2, 3.5)
    assert made.loras[0].name == "Bold look"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["fox.png"]
    whole = out.read_bytes()
    for secret in (str(tmp_path), str(tiny), str(Path.home())):
        assert secret.encode() not in whole
    assert events[-1].result["out"] == [str(out)]


def test_previews_are_small_and_can_be_left_out(engine, tiny):
    for wanted in (True, False):
        events = run(engine, ImageRequest("a cat", model=str(tiny), previews=wanted))
        steps = [event for event in events if isinstance(event, StepDone)]
        assert len(steps) == 2
        for step in steps:
            assert (step.preview is not None) == wanted
            if step.preview is not None:
                assert step.preview.shape == (8, 8, 3)
                assert step.preview.dtype == np.uint8


def test_different_prompts_seeds_and_settings_give_different_pictures(engine, tiny):
    base = draw(engine, tiny)
    for fields in ({"seed": 1}, {"guidance": 1.0}, {"steps": 3}, {"cfg": 3.0}, {"noise": "torch"}):
        assert not np.array_equal(base, draw(engine, tiny, **fields)), fields
    assert not np.array_equal(base, draw(engine, tiny, "a cat"))


# ------------------------------------------------------------------------------------------ same recipe, same bytes


def test_a_picture_does_not_depend_on_the_count_or_on_what_was_drawn_before(engine, tiny):
    alone = draw(engine, tiny, seed=12)
    series = pictures(run(engine, ImageRequest("a red fox", model=str(tiny), seed=10, count=3)))
    assert [one.seed for one in series] == [10, 11, 12]
    assert np.array_equal(series[2].pixels, alone)
    draw(engine, tiny, "a cat", width=96, cfg=2.0, loras=(LoraChoice("Bold look"),))
    assert np.array_equal(draw(engine, tiny, seed=12), alone)


def test_another_engine_draws_the_same(engine, tiny):
    assert np.array_equal(draw(engine, tiny, cfg=2.0), draw(Engine(), tiny, cfg=2.0))


@pytest.mark.parametrize("kind", ["16-bit", "int4"])
def test_strength_zero_is_no_lora_and_a_removed_one_leaves_nothing(engine, tiny, tiny_int4, kind):
    model = tiny if kind == "16-bit" else tiny_int4
    plain = draw(engine, model)
    both = (LoraChoice("Bold look", 0.8), LoraChoice("Soft look", -0.5))
    styled = draw(engine, model, loras=both)
    assert not np.array_equal(styled, plain)
    assert np.array_equal(draw(engine, model, loras=(LoraChoice("Bold look", 0.0),)), plain)
    off = (LoraChoice("Bold look", 0.8), LoraChoice("Soft look", 0.0))
    assert np.array_equal(draw(engine, model, loras=off), draw(engine, model, loras=off[:1]))
    assert np.array_equal(draw(engine, model), plain)
    assert np.array_equal(draw(engine, model, loras=both), styled)


def test_parts_that_take_turns_give_the_same_bytes(tiny, monkeypatch):
    expected = draw(Engine(), tiny, loras=(LoraChoice("Bold look"),), cfg=2.0)
    plan = session.memory.plan

    def apart(*arguments: Any) -> Any:
        layout = plan(*arguments)
        return type(layout)(layout.stages, False, layout.peak_bytes, "moves")

    monkeypatch.setattr(session.memory, "plan", apart)
    engine = Engine()
    for _ in range(2):
        assert np.array_equal(draw(engine, tiny, loras=(LoraChoice("Bold look"),), cfg=2.0), expected)
    assert engine._model is not None
    assert engine._model._encoders is None


def test_both_predictions_of_cfg_are_one_batch(engine, tiny, monkeypatch):
    batches = []
    forward = Flux.forward

    def counted(network: Flux, image: torch.Tensor, *arguments: Any) -> torch.Tensor:
        batches.append(image.shape[0])
        return forward(network, image, *arguments)

    monkeypatch.setattr(Flux, "forward", counted)
    draw(engine, tiny, cfg=2.0)
    draw(engine, tiny)
    assert batches == [2, 2, 1, 1]


def test_verify_makes_the_same_bytes_and_sees_a_changed_pixel(engine, tiny, tmp_path):
    out = tmp_path / "fox.png"
    request = ImageRequest(
        "a red fox", negative="a dog", model=str(tiny), seed=4, width=96, out=str(out), noise="torch",
        loras=(LoraChoice("Soft look", 0.4),), threads=1,
    )  # fmt: skip
    pictures(run(engine, request))
    draw(engine, tiny, "a cat")
    final = run(engine, VerifyRequest(str(out), str(tiny)))[-1]
    assert final.result == {
        "file": str(out), "same": True, "differs": [], "pixels_different": 0, "largest_difference": 0
    }  # fmt: skip
    pixels, _ = recipe.read_png(out)
    pixels[3, 4] = 255 - pixels[3, 4]
    out.write_bytes(recipe.png_bytes(pixels, recipe_in(out)))
    result = run(engine, VerifyRequest(str(out), str(tiny)))[-1].result
    assert not result["same"]
    assert result["pixels_different"] == 1


def test_verify_finds_a_model_by_its_name_and_says_first_what_differs(engine, tiny, tmp_path, monkeypatch):
    out = tmp_path / "fox.png"
    pictures(run(engine, ImageRequest("a red fox", model=str(tiny), out=str(out))))
    assert "not on this computer" in failure(run(engine, VerifyRequest(str(out))))[1]
    monkeypatch.setenv("TONFA_MODELS", str(tiny.parent))
    monkeypatch.setattr(session.torch, "__version__", "9.9")
    events = run(engine, VerifyRequest(str(out)))
    assert [type(event) for event in events[:-1] if not isinstance(event, Loading | StepDone)] == [
        Notice, ImageStarted
    ]  # fmt: skip
    assert [one["what"] for one in events[-1].result["differs"]] == ["torch"]
    assert events[-1].result["same"]


# ------------------------------------------------------------------------------------------- what cannot be done


def test_a_negative_prompt_brings_the_second_prediction(engine, tiny):
    events = run(engine, ImageRequest("a red fox", negative="a dog", model=str(tiny), cfg=1.0))
    assert events[-1].result["cfg"] == 2.0
    assert any(isinstance(event, Notice) and "cfg 2" in event.what for event in events)
    assert run(engine, ImageRequest("a fox", negative="a dog", model=str(tiny), cfg=4.0))[-1].result["cfg"] == 4.0


def test_guidance_for_a_network_without_it_is_a_problem(engine, tmp_path):
    model = make_tiny_bundle(tmp_path / "schnell", guidance=False)
    kind, words = failure(run(engine, ImageRequest("a fox", model=str(model), guidance=3.0)))
    assert kind is ProblemKind.REQUEST
    assert "guidance" in words
    assert run(engine, ImageRequest("a fox", model=str(model)))[-1].result["guidance"] is None


def test_sizes_snap_and_say_so(engine, tiny):
    events = run(engine, ImageRequest("a fox", model=str(tiny), width=70, height=90))
    (done,) = pictures(events)
    assert done.pixels.shape == (96, 64, 3)
    assert [event.what for event in events if isinstance(event, Notice)] == [
        "The width 70 became 64: Tiny takes multiples of 16.",
        "The height 90 became 96: Tiny takes multiples of 16.",
    ]


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"width": 256}, ProblemKind.REQUEST, "32 to 128 pixels"),
        ({"height": 16}, ProblemKind.REQUEST, "32 to 128 pixels"),
        ({"plan": "w4a4"}, ProblemKind.REQUEST, "16-bit"),
        ({"device": "cuda:7"}, None, "card"),
        ({"loras": (LoraChoice("nowhere"),)}, ProblemKind.REQUEST, "no LoRA"),
        ({"out": "missing-folder/fox.png"}, ProblemKind.REQUEST, "no folder"),
        ({"out": "fox.jpg"}, ProblemKind.REQUEST, "PNG"),
    ],
)
def test_what_cannot_be_done_is_a_problem_before_anything_is_loaded(tiny, fields, kind, words):
    engine = Engine()
    found, text = failure(run(engine, ImageRequest("a fox", model=str(tiny), **fields)))
    assert kind in (None, found)
    assert words in text
    assert engine._model is None


@pytest.mark.parametrize("file", ["transformer", "t5", "clip", "vae"])
@pytest.mark.parametrize("damage", ["cut short", "emptied", "garbled header", "other shapes"])
def test_a_damaged_part_is_a_problem_that_names_it(engine, tiny, tmp_path, file, damage):
    model = tmp_path / "damaged"
    shutil.copytree(tiny, model)
    path = model / f"{file}.safetensors"
    content = path.read_bytes()
    if damage == "other shapes":
        other = tiny / ("clip.safetensors" if file != "clip" else "t5.safetensors")
        path.write_bytes(other.read_bytes())
    else:
        damaged = {"cut short": content[:-1000], "emptied": b"", "garbled header": b"\xff" * 100 + content[100:]}
        path.write_bytes(damaged[damage])
    for _ in range(2):
        kind, words = failure(run(engine, ImageRequest("a fox", model=str(model))))
        assert kind is ProblemKind.FILE
        assert path.name in words
    draw(engine, tiny)


def test_a_finished_picture_is_shown_even_if_it_cannot_be_saved(engine, tiny, tmp_path, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise machine_cannot("The disk is full.", "Make room.")

    monkeypatch.setattr(folders, "write_whole", full)
    events = run(engine, ImageRequest("a fox", model=str(tiny), out=str(tmp_path / "fox.png")))
    assert isinstance(events[-2], ImageDone)
    assert events[-2].file == ""
    assert failure(events) == (ProblemKind.MACHINE, "The disk is full. Make room.")


def test_too_little_memory_is_told_before_loading(tiny, monkeypatch):
    free = psutil.virtual_memory()._replace(available=2**20)
    monkeypatch.setattr(session.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(session.memory, "PROCESS_BYTES", 64 * 2**30)
    engine = Engine()
    kind, words = failure(run(engine, ImageRequest("a fox", model=str(tiny))))
    assert kind is ProblemKind.MEMORY
    assert "GB" in words
    assert engine._model is None
    assert engine.plan(ImageRequest("a fox", model=str(tiny))).fits == "too large"


# ------------------------------------------------------------------------------------------------------- cancel


def test_a_job_cancelled_before_it_begins_does_nothing(engine, tiny):
    engine.cancel(7)
    assert run(engine, ImageRequest("a fox", model=str(tiny)), job=7) == [Cancelled()]
    draw(engine, tiny)


def cancelled_at(engine: Engine, request: Request, kind: type, job: int = 3) -> list[Event]:
    """Run and cancel at the first event of that kind."""
    events: list[Event] = []
    for event in engine.run(job, request):
        events.append(event)
        if isinstance(event, kind):
            engine.cancel(job)
    return events


@pytest.mark.parametrize("kind", [Loading, ImageStarted, StepDone, ImageDone])
def test_cancel_ends_the_job_soon_and_the_next_one_is_as_ever(tiny, tmp_path, kind):
    engine = Engine()
    expected = draw(Engine(), tiny)
    out = tmp_path / "out"
    out.mkdir()
    request = ImageRequest("a fox", model=str(tiny), steps=50, count=20, out=str(out))
    events = cancelled_at(engine, request, kind)
    assert isinstance(events[-1], Cancelled)
    assert len([event for event in events if isinstance(event, kind)]) <= 2
    assert all(path.suffix == ".png" and not path.name.startswith(".") for path in out.iterdir())
    assert np.array_equal(draw(engine, tiny), expected)


def test_cancel_is_asked_for_before_every_block(engine, tiny):
    """On the processor a step may take seconds; a block does not."""
    draw(engine, tiny)
    assert engine._model is not None
    blocks = list(engine._model.network.blocks())
    seen: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: (seen.append(i), engine.cancel(9))[0])
        for i, block in enumerate(blocks)
    ]
    events = run(engine, ImageRequest("a fox", model=str(tiny)), job=9)
    for handle in handles:
        handle.remove()
    assert events[-1] == Cancelled()
    assert seen == [0]


def test_a_stopped_load_gives_its_memory_back(tiny, monkeypatch):
    engine = Engine()
    made: list[weakref.ref[Any]] = []
    original = session.LoadedModel.__init__

    def noted(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(weakref.ref(self))

    monkeypatch.setattr(session.LoadedModel, "__init__", noted)
    events = cancelled_at(engine, ImageRequest("a fox", model=str(tiny)), Loading)
    assert isinstance(events[-1], Cancelled)
    assert engine._model is None
    gc.collect()
    assert made[0]() is None


# ------------------------------------------------------------------------------------------------- in advance


def test_a_prepared_model_is_not_loaded_again(tiny):
    engine = Engine()
    events = run(engine, PrepareRequest(str(tiny)))
    assert isinstance(events[-2], Prepared)
    assert events[-2].load_seconds > 0
    events = run(engine, ImageRequest("a fox", model=str(tiny)))
    assert not any(isinstance(event, Loading) for event in events)


def test_a_replaced_file_is_another_model(tmp_path):
    model = make_tiny_bundle(tmp_path / "model")
    engine = Engine()
    draw(engine, model)
    make_tiny_bundle(model, "int4")
    assert any(isinstance(event, Loading) for event in run(engine, ImageRequest("a fox", model=str(model))))


def test_the_plan_says_bytes_at_once_and_seconds_after_the_first_picture(tiny):
    engine = Engine()
    request = ImageRequest("a fox", model=str(tiny))
    first = engine.plan(request)
    assert engine._model is None
    assert first.seconds is None
    assert first.fits == "fits"
    assert first.device_bytes == 0
    assert 0 < first.host_bytes < first.free_bytes <= first.total_bytes
    draw(engine, tiny, "a fox")
    again = engine.plan(request)
    assert again.seconds is not None
    longer = engine.plan(ImageRequest("a fox", model=str(tiny), steps=200)).seconds
    assert longer is not None
    assert longer > again.seconds
    assert Engine().plan(request).seconds > again.seconds  # it would have to load first


@pytest.mark.parametrize("plan", ["w4a16", "w4a4", "w4a8"])
def test_a_4bit_model_runs_by_every_plan(engine, tiny_int4, plan):
    result = run(engine, ImageRequest("a fox", model=str(tiny_int4), plan=plan))[-1].result
    assert result["plan"][plan] >= 4 * 2 + 2 * 4
    assert "bf16" in result["plan"]


def test_a_folder_gets_numbered_pictures_and_a_name_gets_the_seeds(engine, tiny, tmp_path):
    for _ in range(2):
        pictures(run(engine, ImageRequest("a fox", model=str(tiny), seed=8, out=str(tmp_path / "."))))
    pictures(run(engine, ImageRequest("a fox", model=str(tiny), seed=8, count=2, out=str(tmp_path / "fox.png"))))
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == ["0001-8.png", "0002-8.png", "fox-8.png", "fox-9.png"]


def test_a_picture_decoded_in_tiles_says_so_in_its_recipe(tiny, tmp_path, monkeypatch):
    engine, out = Engine(), tmp_path / "fox.png"
    request = ImageRequest("a fox", model=str(tiny), out=str(out))
    with monkeypatch.context() as short:
        short.setattr(ImageDecoder, "_whole", lambda self, z: None)
        pictures(run(engine, request))
    assert recipe.recipe_of(recipe.read_png(out)[1], "it").decode == "tiled"
    events = run(engine, VerifyRequest(str(out), str(tiny)))
    assert any(isinstance(event, Notice) and "decode" in event.what for event in events)
    assert [one["what"] for one in events[-1].result["differs"]] == ["decode"]


def test_a_network_that_makes_no_numbers_is_named_and_not_the_vae(tmp_path):
    model, engine = make_tiny_bundle(tmp_path / "model"), Engine()
    file = open_safetensors(model / "transformer.safetensors")
    tensors = {name: file.read(name) for name in file.tensors}
    tensors["proj_out.weight"] = torch.full_like(tensors["proj_out.weight"], 3e38)
    write_safetensors(model / "transformer.safetensors", tensors, file.metadata)
    write_bundle_json(model, tiny_description(model))
    kind, words = failure(run(engine, ImageRequest("a fox", model=str(model))))
    assert kind is ProblemKind.FILE
    assert "network of Tiny" in words
    kind, words = failure(run(engine, ImageRequest("a fox", model=str(model), loras=(LoraChoice("Bold look"),))))
    assert kind is ProblemKind.REQUEST
    assert "strengths" in words


def test_a_preview_matrix_for_another_network_is_told_before_loading(tmp_path):
    model, engine = make_tiny_bundle(tmp_path / "model"), Engine()
    content = tiny_description(model)
    content["preview"]["matrix"].pop()
    write_bundle_json(model, content)
    kind, words = failure(run(engine, ImageRequest("a fox", model=str(model))))
    assert kind is ProblemKind.FILE
    assert "15 rows" in words
    assert engine._model is None


def test_a_lora_of_the_bundle_that_was_exchanged_is_told(tmp_path):
    model, engine = make_tiny_bundle(tmp_path / "model"), Engine()
    shutil.copy(model / "lora-soft.safetensors", model / "lora-bold.safetensors")
    kind, words = failure(run(engine, ImageRequest("a fox", model=str(model), loras=(LoraChoice("Bold look"),))))
    assert kind is ProblemKind.FILE
    assert "lora-bold.safetensors is not the file" in words


def test_a_prepared_model_takes_the_threads_it_is_asked_for(tiny):
    assert isinstance(run(Engine(), PrepareRequest(str(tiny), threads=1))[-1], Finished)
    with pytest.raises(ProblemError, match="threads"):
        PrepareRequest(str(tiny), threads=0)


def test_unloading_frees_the_network(tiny):
    engine = Engine()
    draw(engine, tiny)
    assert engine._model is not None
    network = weakref.ref(engine._model.network)
    engine.unload()
    assert network() is None


ODD = [
    "\0",
    "a" * 5000,
    "a/" * 3000,
    "..",
    "/",
    "~nobody/x",
    "con",
    "\ud800",
    "/dev/null",
    "/proc/self/mem",
    "a\nb",
]


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text)[:20])
@pytest.mark.parametrize("name", ["model", "lora", "out", "verify"])
def test_odd_names_end_in_a_problem_of_the_person(tiny, engine, name, text):
    try:
        requests = {
            "model": lambda: ImageRequest("x", model=text),
            "lora": lambda: ImageRequest("x", model=str(tiny), loras=(LoraChoice(text),)),
            "out": lambda: ImageRequest("x", model=str(tiny), out=text.strip("./") + "x"),  # never a folder
            "verify": lambda: VerifyRequest(text),
        }
        request: Request = requests[name]()
    except ProblemError:
        return  # refused when it was made
    final = run(engine, request)[-1]
    assert isinstance(final, Failed)
    assert final.problem.kind in (ProblemKind.REQUEST, ProblemKind.FILE), final.problem
