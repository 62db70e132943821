"""What the left column holds becomes a request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.state.composer import ComposerState, LoraSetting, LoraUse
from engine.folders import ModelCard
from engine.problems import ProblemError
from engine.requests import MAX_SEED, ImageRequest, LoraChoice

LORA = "/nowhere/lora-3d.safetensors"


def test_a_request_says_what_the_column_says(composer: ComposerState) -> None:
    composer.set_prompt("  a red fox ")
    composer.set_negative("grey")
    composer.set_seed(7)
    composer.set_count(3)
    composer.switch_lora(LORA, True)
    composer.set_strength(LORA, -0.45)
    request = composer.next_request("/pictures")
    assert request == ImageRequest(
        "a red fox",
        negative="grey",
        loras=(LoraChoice(LORA, -0.45),),
        width=256,
        height=256,
        steps=8,
        seed=7,
        count=3,
        guidance=4.5,
        out="/pictures",
    )


def test_the_models_own_loras_are_listed_and_off(composer: ComposerState) -> None:
    assert composer.loras == (LoraSetting(LORA, "3D look", 0.8, 0.8, on=False),)
    composer.set_prompt("a red fox")
    assert composer.next_request("").loras == ()


def test_a_blank_prompt_is_a_problem_with_a_next_step(composer: ComposerState) -> None:
    with pytest.raises(ProblemError) as raised:
        composer.next_request("")
    assert "Type" in raised.value.problem.todo


def test_a_new_seed_every_time_unless_kept(composer: ComposerState) -> None:
    composer.set_prompt("x")
    shown = composer.seed
    assert composer.next_request("").seed == shown, "the seed that is shown is the one that is used"
    assert composer.next_request("").seed != shown
    composer.set_seed_mode("keep")
    assert composer.next_request("").seed == composer.next_request("").seed


def test_one_up_passes_all_seeds_of_a_count(composer: ComposerState) -> None:
    composer.set_prompt("x")
    composer.set_seed(100)
    composer.set_seed_mode("one up")
    composer.set_count(4)
    assert [composer.next_request("").seed for _ in range(3)] == [100, 104, 108]


def test_who_types_a_seed_keeps_it(composer: ComposerState) -> None:
    assert composer.seed_mode == "random"
    composer.set_seed(12)
    assert str(composer.seed_mode) == "keep"
    composer.set_seed(MAX_SEED * 10)
    assert composer.seed == MAX_SEED


def test_sizes_snap_to_what_the_model_takes(composer: ComposerState) -> None:
    composer.set_size(250, 2000)
    assert (composer.width, composer.height) == (256, 384)
    composer.set_size(1, 137)
    assert (composer.width, composer.height) == (128, 144)


def test_a_lora_file_is_added_once_and_switched_on(composer: ComposerState) -> None:
    assert composer.add_lora("/x/Storybook ink.safetensors")
    assert composer.loras[-1].name == "Storybook ink"
    composer.switch_lora("/x/Storybook ink.safetensors", False)
    assert not composer.add_lora("/x/Storybook ink.safetensors")
    assert composer.loras[-1].on
    composer.move_lora("/x/Storybook ink.safetensors", -1)
    assert composer.loras[0].name == "Storybook ink"
    composer.move_lora("/x/Storybook ink.safetensors", -1)  # already first
    composer.remove_lora("/x/Storybook ink.safetensors")
    assert [one.name for one in composer.loras] == ["3D look"]


def test_the_row_says_how_much_of_a_lora_is_used(composer: ComposerState) -> None:
    composer.switch_lora(LORA, True)
    composer.set_lora_use(LORA, LoraUse(44, 44))
    assert composer.loras[0].words() == "all 44 layers used"
    composer.set_lora_use(LORA, LoraUse(40, 44, (("key", "made for another model"),)))
    assert composer.loras[0].words() == "40 of 44 layers used"
    assert composer.loras[0].partly_used
    composer.set_lora_use(LORA, None, "made for another model")
    assert not composer.loras[0].on
    assert composer.loras[0].words() == "made for another model"


def test_another_model_keeps_prompt_seed_and_added_loras(composer: ComposerState, card: ModelCard) -> None:
    composer.set_prompt("a red fox")
    composer.set_seed(5)
    composer.add_lora("/x/mine.safetensors")
    composer.set_model(replace(card, model="other", name="Other", loras=(), default_size=(384, 384), steps=4))
    assert (composer.prompt, composer.seed) == ("a red fox", 5)
    assert [one.file for one in composer.loras] == ["/x/mine.safetensors"]
    assert (composer.width, composer.steps) == (384, 4)


def test_a_recipe_comes_back_with_its_own_seed(composer: ComposerState) -> None:
    composer.set_prompt("a red fox")
    composer.switch_lora(LORA, True)
    composer.set_strength(LORA, 1.5)
    made = composer.next_request("")
    composer.set_prompt("something else")
    composer.switch_lora(LORA, False)
    composer.set_steps(20)
    composer.restore(made, made.seed + 2)
    again = composer.next_request("")
    assert again == replace(made, seed=made.seed + 2)


def test_a_new_start_goes_on_where_the_last_one_ended(
    composer: ComposerState, card: ModelCard, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.touch()
    composer.set_prompt("a secret")
    composer.set_size(320, 192)
    composer.set_steps(12)
    composer.set_count(3)
    composer.set_guidance(2.5)
    composer.set_seed(41)
    composer.add_lora(str(mine))
    composer.set_strength(str(mine), -0.5)
    composer.add_lora("/gone/gone.safetensors")
    composer.move_lora(str(mine), -1)
    told = json.loads(json.dumps(composer.remembered()))
    assert "a secret" not in json.dumps(told)
    again = ComposerState()
    again.set_model(card)
    again.remember(told)
    assert again.prompt == ""
    assert (again.width, again.height, again.steps, again.count, again.guidance) == (320, 192, 12, 3, 2.5)
    assert (again.seed, again.seed_mode) == (41, "keep")
    assert [(one.name, one.strength, one.on) for one in again.loras] == [
        ("mine", -0.5, True),
        ("3D look", 0.8, False),
    ]


def test_one_up_goes_on_after_a_new_start_and_a_random_seed_is_new(
    composer: ComposerState, card: ModelCard
) -> None:
    composer.set_prompt("x")
    composer.set_seed(100)
    composer.set_seed_mode("one up")
    composer.next_request("")
    again = ComposerState()
    again.set_model(card)
    again.remember(composer.remembered())
    again.set_prompt("x")
    assert again.next_request("").seed == 101
    composer.set_seed_mode("random")
    third = ComposerState()
    third.set_model(card)
    seed = third.seed
    third.remember(composer.remembered())
    assert third.seed == seed


@pytest.mark.parametrize(
    "told",
    [
        {}, {"width": "x", "steps": None, "loras": 5, "seed_mode": "never"}, {"steps": 1e300, "seed": float("nan")},
        {"loras": [1, {"file": 5}, {"file": "/gone"}, {}], "guidance": True, "width": -5, "count": 10**9},
        {"seed_mode": ["keep"], "loras": [{"file": LORA, "strength": "x", "own": None, "on": 1}]},
    ],
)  # fmt: skip
def test_a_damaged_memory_is_as_good_as_none(composer: ComposerState, told: dict[str, Any]) -> None:
    composer.remember(told)
    composer.set_prompt("x")
    assert composer.next_request("").steps == 8


def test_a_model_without_guidance_gets_none(composer: ComposerState, card: ModelCard) -> None:
    composer.set_model(replace(card, guidance=None))
    composer.set_guidance(7)
    composer.set_prompt("x")
    assert composer.next_request("").guidance is None
