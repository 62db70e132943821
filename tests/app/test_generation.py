"""From Generate to the picture, by the events the engine really sends. No screen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PySide6.QtWidgets import QApplication

from app.state.composer import ComposerState
from app.state.generation import GenerationState
from app.state.history import History
from app.state.memory import MemoryNow
from engine.events import (
    Cancelled,
    Failed,
    Finished,
    ImageDone,
    ImageStarted,
    Loading,
    Planned,
    Prepared,
    StepDone,
)
from engine.problems import Problem, ProblemKind, engine_stopped
from engine.requests import ImageRequest, InspectRequest, PrepareRequest
from tests.app.conftest import NotingEngine, picture

GIB = 2**30
MEMORY = Problem(ProblemKind.MEMORY, "This needs 11.5 GB of memory; 7.9 GB is free.", "Choose a smaller size.")


@pytest.fixture
def made(generation: GenerationState, composer: ComposerState, history: History) -> Callable[[str], int]:
    """Makes one picture from start to end and says its job."""

    def make(prompt: str) -> int:
        composer.set_prompt(prompt)
        assert generation.generate()
        job = generation.jobs[-1]
        seed = job.request.seed
        generation.on_event(job.id, ImageStarted(1, 1, seed, 8, 256, 256))
        for step in range(1, 9):
            generation.on_event(job.id, StepDone(1, 1, step, 8, 0.1 * step, picture(16, 16)))
        generation.on_event(job.id, ImageDone(1, 1, seed, picture(256, 256), "", {}, 1.25))
        generation.on_event(job.id, Finished())
        return job.id

    return make


def ready(generation: GenerationState, engine: NotingEngine) -> None:
    generation.prepare()
    job = engine.submitted[-1][0]
    generation.on_event(job, Loading("Reading Tonfa Mini", 0.5))
    generation.on_event(job, Prepared("tonfa-mini", "cpu", "w4a16", 2.0))
    generation.on_event(job, Finished())


def test_loading_is_told_and_the_button_keeps_the_wish(generation: GenerationState, engine: NotingEngine) -> None:
    generation.prepare()
    assert isinstance(engine.submitted[0][1], PrepareRequest)
    generation.on_event(1, Loading("Reading Tonfa Mini", 0.5))
    assert generation.model.loading == 0.5
    assert generation.button()[0] == "Generate when ready"
    assert generation.status()[0] == "Loading Tonfa Mini"
    generation.on_event(1, Prepared("tonfa-mini", "cpu", "w4a16", 2.0))
    generation.on_event(1, Finished())
    assert generation.model.loading is None
    assert "in system memory" in generation.model.words
    assert generation.button()[0] == "Generate"
    assert generation.status()[0] == "Ready"


def test_a_prompt_becomes_a_request_and_a_picture_in_the_timeline(
    generation: GenerationState, engine: NotingEngine, history: History, made: Callable[[str], int]
) -> None:
    made("a red fox")
    request = engine.submitted[-1][1]
    assert isinstance(request, ImageRequest)
    assert request.prompt == "a red fox"
    assert request.out, "pictures go to the user's folder"
    shown = generation.shown
    assert shown is not None
    assert shown is history.picture(0)
    left, right, short = generation.caption(shown)
    assert "8 steps" in left
    assert "256 × 256" in left
    assert "8 steps" not in short
    assert right == "1.2 s"
    assert not generation.working


def test_nothing_is_asked_for_without_a_prompt(generation: GenerationState, engine: NotingEngine) -> None:
    assert not generation.generate()
    assert engine.submitted == []


def test_steps_are_told_with_time_left_and_speed(
    generation: GenerationState, composer: ComposerState, made: Callable[[str], int]
) -> None:
    made("first")  # measures what comes after the last step: 1.25 - 0.8 s
    composer.set_prompt("second")
    generation.generate()
    job = generation.jobs[0].id
    assert generation.step_words()[0] == "Starting"
    generation.on_event(job, ImageStarted(1, 1, 3, 8, 256, 256))
    generation.on_event(job, StepDone(1, 1, 2, 8, 0.5, picture(16, 16)))
    words, speed = generation.step_words()
    assert words == "Step 2 of 8  ·  1.9 s left"  # 6 steps of 0.25 s and 0.45 s of decoding
    assert speed == "4.0 steps a second"
    running = generation.running
    assert running is not None
    assert running.fraction == pytest.approx(0.25)
    assert running.preview is not None


def test_the_button_says_the_truth(
    generation: GenerationState, composer: ComposerState, engine: NotingEngine
) -> None:
    ready(generation, engine)
    composer.set_count(9)
    assert generation.button()[0] == "Generate 9 pictures"
    composer.set_prompt("x")
    generation.generate()
    assert generation.button()[0] == "Add to queue"


def test_the_queue_is_counted_and_its_time_added(
    generation: GenerationState, composer: ComposerState, engine: NotingEngine
) -> None:
    generation.on_planned(Planned(GIB, 0, 2 * GIB, 4 * GIB, 6.0, "fits"))
    composer.set_prompt("x")
    for _ in range(4):
        generation.generate()
    assert len(generation.waiting) == 3
    assert generation.status()[:2] == ("Making the picture", "3 more waiting, about 18 s")
    generation.remove(generation.waiting[-1].id)
    assert engine.cancelled == [4]
    generation.on_event(4, Cancelled())
    assert len(generation.waiting) == 2


def test_stop_stops_this_one_and_stop_all_begins_at_the_back(
    generation: GenerationState, composer: ComposerState, engine: NotingEngine
) -> None:
    composer.set_prompt("x")
    for _ in range(3):
        generation.generate()
    generation.stop()
    assert engine.cancelled == [1]
    assert generation.status()[0] == "Stopping"
    generation.on_event(1, Cancelled())
    assert generation.running is not None
    assert generation.running.job.id == 2
    generation.stop_all()
    assert engine.cancelled == [1, 3, 2]
    for job in (3, 2):
        generation.on_event(job, Cancelled())
    assert not generation.working
    assert generation.status()[0] == "Stopped"
    assert generation.trouble is None, "who stops a picture needs no explanation"


def test_what_there_was_of_a_stopped_picture_stays_until_the_next(
    generation: GenerationState, composer: ComposerState, engine: NotingEngine, made: Callable[[str], int]
) -> None:
    made("first")
    composer.set_prompt("second")
    generation.generate()
    job = generation.jobs[0].id
    generation.on_event(job, ImageStarted(1, 1, 3, 8, 256, 256))
    generation.on_event(job, StepDone(1, 1, 5, 8, 0.5, picture(16, 16)))
    generation.stop()
    generation.on_event(job, Cancelled())
    assert generation.shown is None, "the stage shows what there is of it"
    assert generation.step_words()[0] == "Stopped at step 5 of 8"
    assert generation.button()[0] == "Generate"
    generation.generate()
    assert generation.stopped is None
    assert generation.status()[0] == "Making the picture"


def test_taking_a_waiting_one_out_leaves_the_running_one_as_it_is(
    generation: GenerationState, composer: ComposerState
) -> None:
    composer.set_prompt("x")
    for _ in range(2):
        generation.generate()
    first, second = (job.id for job in generation.jobs)
    generation.on_event(first, ImageStarted(1, 1, 3, 8, 256, 256))
    generation.on_event(first, StepDone(1, 1, 5, 8, 0.5, picture(16, 16)))
    generation.remove(second)
    generation.on_event(second, Cancelled())
    assert generation.running is not None
    assert (generation.running.job.id, generation.running.step) == (first, 5)
    assert generation.status()[0] == "Making the picture"


def test_a_failure_says_what_to_do_and_the_rest_waits_for_the_answer(
    generation: GenerationState, composer: ComposerState, engine: NotingEngine
) -> None:
    composer.set_prompt("x")
    generation.generate()
    generation.generate()
    generation.on_event(1, ImageStarted(1, 1, 3, 8, 256, 256))
    generation.on_event(1, StepDone(1, 1, 5, 8, 0.5, picture(16, 16)))
    engine.held = True  # as EngineThread is after a failure
    generation.on_event(1, Failed(MEMORY))
    trouble = generation.trouble
    assert trouble is not None
    assert "smaller size" in trouble.problem.todo
    assert trouble.button == "Try again"
    assert generation.stopped is not None
    assert generation.step_words()[0] == "Stopped at step 5 of 8"
    assert generation.running is None
    assert generation.status() == ("Waiting for you", "1 more in the queue", "danger")
    generation.answer(retry=False)
    assert engine.went_on == 1
    assert generation.trouble is None
    assert generation.running is not None, "the next one begins"
    assert generation.running.job.id == 2


def test_continue_makes_the_same_picture_first(
    generation: GenerationState, composer: ComposerState, engine: NotingEngine
) -> None:
    composer.set_prompt("x")
    generation.generate()
    generation.generate()
    engine.held = True
    generation.on_event(1, Failed(engine_stopped("Exit code -9.")))
    assert generation.trouble is not None
    assert generation.trouble.button == "Continue"
    generation.on_restarted("Exit code -9.")
    generation.answer(retry=True)
    images = [
        (job, request, first) for job, request, first in engine.submitted if isinstance(request, ImageRequest)
    ]
    assert images[-1][1] == images[0][1]
    assert images[-1][2], "before what waits"
    assert [job.id for job in generation.jobs] == [images[-1][0], 2]


def test_an_idle_engine_that_dies_is_told_once_and_loads_the_model_again(
    generation: GenerationState, engine: NotingEngine
) -> None:
    ready(generation, engine)
    generation.on_restarted("Exit code -9.")
    assert generation.trouble is not None
    assert generation.trouble.problem.what == "The engine stopped and was started again."
    assert generation.trouble.button == "", "there is nothing to continue"
    assert isinstance(engine.submitted[-1][1], PrepareRequest)


def test_a_model_that_does_not_load_can_be_tried_again(generation: GenerationState, engine: NotingEngine) -> None:
    generation.prepare()
    generation.on_event(1, Failed(Problem(ProblemKind.FILE, "A file is missing.", "Download the model again.")))
    assert generation.model.words == "Not loaded"
    assert generation.trouble is not None
    assert generation.trouble.button == "Try again"
    generation.answer(retry=True)
    assert isinstance(engine.submitted[-1][1], PrepareRequest)


def test_looking_at_an_older_picture_is_not_disturbed(
    generation: GenerationState, composer: ComposerState, history: History, made: Callable[[str], int]
) -> None:
    made("first")
    older = history.picture(0)
    composer.set_prompt("second")
    generation.generate()
    assert generation.shown is None, "who asks for a picture wants to see it come"
    generation.show(older)
    job = generation.jobs[0].id
    generation.on_event(job, ImageStarted(1, 1, 3, 8, 256, 256))
    generation.on_event(job, ImageDone(1, 1, 3, picture(64, 64), "", {}, 1.0))
    generation.on_event(job, Finished())
    assert generation.shown is older
    assert history.rowCount() == 2


def test_several_pictures_of_one_request_all_enter_the_timeline(
    generation: GenerationState, composer: ComposerState, history: History
) -> None:
    composer.set_prompt("x")
    composer.set_count(3)
    generation.on_planned(Planned(GIB, 0, 2 * GIB, 4 * GIB, 6.0, "fits"))
    generation.generate()
    for image in (1, 2, 3):
        generation.on_event(1, ImageStarted(image, 3, 10 + image, 8, 256, 256))
        assert generation.status()[0] == f"Making picture {image} of 3"
        generation.on_event(1, ImageDone(image, 3, 10 + image, picture(64, 64), "", {}, 1.0))
    generation.on_event(1, Finished())
    assert [history.picture(row).seed for row in range(3)] == [13, 12, 11]  # type: ignore[union-attr]
    assert generation.shown is history.picture(0)


def test_a_dropped_file_is_recognised_by_its_content(
    generation: GenerationState, composer: ComposerState, engine: NotingEngine
) -> None:
    composer.add_lora("/x/vae.safetensors")
    generation.inspect_lora("/x/vae.safetensors")
    assert engine.submitted[-1][1] == InspectRequest("/x/vae.safetensors")
    generation.on_event(1, Finished({"kind": "vae", "usable": False, "reason": "not a network"}))
    assert not composer.loras[-1].on
    assert "vae" in composer.loras[-1].words()


def test_what_of_a_lora_is_used_is_learned_from_the_picture(
    generation: GenerationState, composer: ComposerState
) -> None:
    file = composer.loras[0].file
    composer.switch_lora(file, True)
    composer.set_prompt("x")
    generation.generate()
    result = {
        "loras": [
            {"file": file, "strength": 0.8, "keys_used": 88, "layers_used": 44, "layers": 45,
             "keys_unused": [{"key": "text_encoder.a", "why": "trains the text encoder"}]}
        ]
    }  # fmt: skip
    generation.on_event(1, Finished(result))
    assert composer.loras[0].words() == "44 of 45 layers used"


def test_the_prediction_is_asked_once_for_what_is_set(
    qapp: QApplication,
    qtbot: object,
    generation: GenerationState,
    composer: ComposerState,
    engine: NotingEngine,
) -> None:
    for steps in range(1, 9):
        composer.set_steps(steps)
    qtbot.waitUntil(lambda: len(engine.plans) == 1, timeout=2000)  # type: ignore[attr-defined]
    assert engine.plans[0].steps == 8
    generation.on_planned(Planned(3 * GIB, 0, 12 * GIB, 16 * GIB, 1.2, "fits"))
    assert generation.prediction() == ("fits", "Fits · about 1 s")
    now = MemoryNow(16 * GIB, 4 * GIB, 1 * GIB, 1 * GIB, 0.1, None, "")
    assert generation.memory_bar(now) == (4 * GIB, 1 * GIB, 2 * GIB, 16 * GIB)


def test_a_plan_that_fails_says_why(generation: GenerationState) -> None:
    generation.on_planned(Failed(Problem(ProblemKind.FILE, "The model's file is damaged.", "Download it again.")))
    assert generation.prediction() == ("", "The model's file is damaged.")


def test_events_of_unknown_jobs_change_nothing(generation: GenerationState, history: History) -> None:
    generation.on_event(99, ImageDone(1, 1, 3, picture(64, 64), "", {}, 1.0))
    generation.on_event(99, Finished())
    assert history.rowCount() == 0
    assert generation.shown is None


def test_progress_is_announced_in_quarters(generation: GenerationState, composer: ComposerState) -> None:
    said: list[str] = []
    generation.announced.connect(said.append)
    composer.set_prompt("x")
    generation.generate()
    generation.on_event(1, ImageStarted(1, 1, 3, 20, 256, 256))
    for step in range(1, 21):
        generation.on_event(1, StepDone(1, 1, step, 20, 0.1 * step))
    generation.on_event(1, ImageDone(1, 1, 3, picture(64, 64), "", {}, 1.0))
    assert said == ["Making the picture", "25 percent", "50 percent", "75 percent", "Picture done"]


def test_a_model_that_kills_the_engine_while_loading_is_not_loaded_for_ever(
    generation: GenerationState, engine: NotingEngine
) -> None:
    generation.prepare()
    generation.on_event(1, Loading("Reading", 0.5))
    generation.on_event(1, Failed(engine_stopped("Exit code -9.")))
    generation.on_restarted("Exit code -9.")
    assert len(engine.submitted) == 1, "the person decides"
    generation.answer(retry=True)
    assert isinstance(engine.submitted[-1][1], PrepareRequest)


def test_a_picture_stopped_while_its_model_loads_leaves_no_loading_behind(
    generation: GenerationState, composer: ComposerState
) -> None:
    composer.set_prompt("x")
    generation.generate()
    generation.on_event(1, Loading("Reading", 0.5))
    generation.on_event(1, Cancelled())
    assert generation.model.loading is None
    assert generation.status()[0] == "Ready"


def test_without_a_model_there_is_one_sentence_and_one_step(generation: GenerationState) -> None:
    generation.say_no_model("")
    assert generation.trouble is not None
    assert generation.trouble.problem.what == "No model was found."
    assert "bundle.json" in generation.trouble.problem.todo
    generation.say_no_model("The file vae.safetensors is missing. Download the model again.")
    assert "vae" in generation.trouble.problem.what
