"""What crosses the boundary of the engine: it survives a pipe, it is plain, and it is checked when made."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine import events, requests
from engine.problems import EXIT_CODE, Problem, ProblemError, ProblemKind
from engine.requests import ImageRequest, LoraChoice, QuantizeRequest

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
PROBLEM = Problem(ProblemKind.MEMORY, "It does not fit.", "Choose a smaller size.", "12 of 8 GB")
SAMPLES = {
    "str": "words",
    "int": 3,
    "float": 1.5,
    "bool": True,
    "Problem": PROBLEM,
    "Json": {"seed": 1, "loras": []},
    "Pixels": PICTURE,
    "Pixels | None": PICTURE,
}

REQUESTS = [
    ImageRequest("a red fox", loras=(LoraChoice("3D look", 0.5),), width=256, height=256, seed=2**53 - 1),
    ImageRequest("ein Fuchs 狐 🦊", negative="blue", steps=4, cfg=2.5, guidance=3.5, device="cuda:1", threads=2),
    requests.PrepareRequest(),
    requests.InspectRequest("model.safetensors"),
    requests.VerifyRequest("picture.png"),
    requests.DoctorRequest(),
    requests.BenchRequest("mini", step=True),
    QuantizeRequest("in.safetensors", "out.safetensors", keep=(("single.*", "bf16"),)),
]


def all_events() -> list[events.Event]:
    """One of every kind of event, each field filled by its declared type."""
    made = []
    for kind in typing.get_args(events.Event):
        hints = typing.get_type_hints(kind)
        fields = {}
        for field in dataclasses.fields(kind):
            name = str(field.type)
            fields[field.name] = SAMPLES.get(name, _sample(hints[field.name]))
        made.append(kind(**fields))
    return made


def _sample(hint: object) -> object:
    """A value for a declared type that is not in SAMPLES: the first of its choices."""
    if origin := typing.get_origin(hint):
        arguments = typing.get_args(hint)
        if origin is typing.Literal:
            return arguments[0]
        if origin is tuple:
            return ()
        return _sample(arguments[0])
    return hint() if isinstance(hint, type) and hint in (str, int, float, bool, dict) else None


def same(left: object, right: object) -> bool:
    """Equality that looks into arrays."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if dataclasses.is_dataclass(left) and not isinstance(left, type):
        return type(left) is type(right) and all(
            same(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left)
        )
    return left == right


def test_every_kind_of_request_is_tried_here():
    assert {type(request) for request in REQUESTS} == set(typing.get_args(requests.Request))


@pytest.mark.parametrize("value", [*REQUESTS, *all_events(), PROBLEM], ids=lambda value: type(value).__name__)
def test_it_survives_a_pipe(value):
    assert same(pickle.loads(pickle.dumps(value)), value)


@pytest.mark.parametrize("value", [*REQUESTS, PROBLEM], ids=lambda value: type(value).__name__)
def test_it_can_be_written_as_json_and_read_back(value):
    fields = json.loads(json.dumps(dataclasses.asdict(value)))
    if "loras" in fields:
        fields["loras"] = tuple(LoraChoice(**lora) for lora in fields["loras"])
    if "keep" in fields:
        fields["keep"] = tuple(tuple(pair) for pair in fields["keep"])
    if "kind" in fields:
        fields["kind"] = ProblemKind(fields["kind"])
    assert type(value)(**fields) == value


@pytest.mark.parametrize("value", [*REQUESTS, *all_events(), PROBLEM], ids=lambda value: type(value).__name__)
def test_nobody_can_change_it_on_the_way(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


def test_final_events_are_the_three_that_end_a_job():
    assert set(typing.get_args(events.Final)) == {events.Finished, events.Cancelled, events.Failed}
    assert set(typing.get_args(events.Final)) < set(typing.get_args(events.Event))


BAD = {
    "prompt empty": {"prompt": "  \n"},
    "prompt too long": {"prompt": "a" * 10_001},
    "prompt with NUL": {"prompt": "a\0b"},
    "prompt with half a character": {"prompt": "\ud800"},
    "prompt no text": {"prompt": 3},
    "negative too long": {"negative": "a" * 10_001},
    "model empty": {"model": " "},
    "width too small": {"width": 8},
    "width no number": {"width": "256"},
    "height a fraction": {"height": 256.5},
    "steps none": {"steps": 0},
    "steps yes": {"steps": True},
    "seed negative": {"seed": -1},
    "seed too large": {"seed": 2**53},
    "last seed too large": {"seed": 2**53 - 1, "count": 2},
    "count none": {"count": 0},
    "guidance NaN": {"guidance": float("nan")},
    "guidance infinite": {"guidance": float("inf")},
    "cfg below one": {"cfg": 0.5},
    "threads none": {"threads": 0},
    "plan unknown": {"plan": "w2a2"},
    "noise unknown": {"noise": "gauss"},
    "device unknown": {"device": "tpu"},
    "device without number": {"device": "cuda:x"},
    "device with half a number": {"device": "cuda:"},
    "device with a foreign number": {"device": "cuda:²"},
    "model no text": {"model": None},
    "LoRAs no list": {"loras": "3D look"},
    "previews maybe": {"previews": "maybe"},
    "out with NUL": {"out": "a\0.png"},
    "guidance beyond any number": {"guidance": 10**400},
    "device cpu with number": {"device": "cpu:0"},
    "too many LoRAs": {"loras": (LoraChoice("a"),) * 65},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD.keys())
def test_a_request_that_makes_no_sense_is_refused_with_a_next_step(fields):
    with pytest.raises(ProblemError) as caught:
        ImageRequest(**{"prompt": "a fox", **fields})
    problem = caught.value.problem
    assert problem.kind is ProblemKind.REQUEST
    assert problem.what.endswith(".")
    assert problem.todo.endswith(".")


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraChoice(" "),
        lambda: LoraChoice("a", float("nan")),
        lambda: LoraChoice("a", 101),
        lambda: LoraChoice("a\0b"),
        lambda: LoraChoice(5),
        lambda: requests.PrepareRequest(" "),
        lambda: requests.PrepareRequest(threads=0),
        lambda: requests.PrepareRequest(threads="2"),
        lambda: requests.PrepareRequest(plan="w2a2"),
        lambda: requests.PrepareRequest(device="tpu"),
        lambda: requests.InspectRequest(""),
        lambda: requests.InspectRequest("a\0b"),
        lambda: requests.InspectRequest(None),
        lambda: requests.VerifyRequest("a\0b"),
        lambda: requests.VerifyRequest("a.png", "m\0"),
        lambda: requests.VerifyRequest(7),
        lambda: QuantizeRequest("in\0", "out"),
        lambda: QuantizeRequest("in", 5),
        lambda: QuantizeRequest("in", "out", prompts="\ud800"),
        lambda: QuantizeRequest("in", "out", device="tpu"),
        lambda: QuantizeRequest("in", "out", seed=-1),
        lambda: QuantizeRequest("", "out"),
        lambda: QuantizeRequest("in", "out", precision="int3"),
        lambda: QuantizeRequest("in", "out", rank=17),
        lambda: QuantizeRequest("in", "out", keep=(("a", "fp32"),)),
    ],
)
def test_so_are_its_parts_and_other_requests(make):
    with pytest.raises(ProblemError):
        make()


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(("x",))


@given(
    st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(ImageRequest)]), values, max_size=4)
)
def test_whatever_is_asked_it_is_a_request_or_a_problem(fields):
    try:
        request = ImageRequest(**{"prompt": "a fox", **fields})
    except ProblemError:
        return
    assert same(pickle.loads(pickle.dumps(request)), request) or fields.get("guidance") != fields.get("guidance")


def test_every_kind_of_problem_has_an_exit_code():
    assert set(EXIT_CODE) == set(ProblemKind)
    assert set(EXIT_CODE.values()) == {1, 2, 3}


def test_a_problem_reads_as_what_and_todo():
    assert str(PROBLEM) == "It does not fit. Choose a smaller size."
    assert str(ProblemError(PROBLEM)) == str(PROBLEM)
    assert copy.copy(PROBLEM) == PROBLEM


def test_the_front_door_names_what_it_has():
    assert engine.__all__ == ["Engine", "events", "problems", "requests"]
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = engine.nothing_here
