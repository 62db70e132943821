"""Pictures of the built-in model on a card, by the whole engine: one recipe one hash; a kernel that fails.

On the processor test_prompt_to_picture.py holds the same promises.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from engine import folders
from engine.checkpoints.bundle import Bundle, read_bundle
from engine.device import choose_device
from engine.events import Finished, ImageDone
from engine.requests import BUILT_IN_MODEL, ImageRequest, LoraChoice
from engine.session import Engine
from tests.measure.mini_on_a_card import PROMPTS, loaded, teacher_forced
from tests.tolerances import CODES_AT_TIES, RELATIVE

pytestmark = pytest.mark.gpu
PLANS = ("w4a4", "w4a8", "w4a16")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(folders.find_model(BUILT_IN_MODEL))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TONFA_HOME", str(tmp_path_factory.mktemp("home")))
        yield Engine()


def picture(engine: Engine, plan: str, loras: Sequence[LoraChoice] = (), **fields: Any) -> str:
    request = ImageRequest("a red fox in the snow", device="cuda", plan=plan, loras=tuple(loras), seed=7, **fields)
    *_, done, final = engine.run(1, request)
    assert isinstance(final, Finished), final
    assert isinstance(done, ImageDone)
    return hashlib.sha256(done.pixels.tobytes()).hexdigest()


@pytest.mark.parametrize("plan", PLANS)
def test_a_picture_is_one_hash_also_with_loras_at_strength_0(engine, bundle, plan):
    first = picture(engine, plan)
    assert picture(engine, plan) == first
    names = [one.name for one in bundle.card.loras]
    for count in (1, 8):
        silent = [LoraChoice(names[i % len(names)], 0.0) for i in range(count)]
        assert picture(engine, plan, silent) == first
    assert picture(engine, plan, [LoraChoice(names[0], 0.8)]) != first
    assert picture(engine, plan) == first
    engine.unload()
    assert picture(engine, plan) == first


@pytest.mark.parametrize("plan", PLANS)
def test_each_kernel_and_each_step_is_the_references(bundle, plan):
    """Teacher forcing. A step may be off by what moving its input by one unit of h does, half as much again."""
    model = loaded(bundle, choose_device("cuda"), plan)
    forced = teacher_forced(bundle, model, plan, PROMPTS[0], steps=3)
    for kind, agreement in forced.kernels.items():
        assert agreement.codes <= 0.01, (kind, agreement)
        assert agreement.steps <= CODES_AT_TIES, (kind, agreement)
        assert agreement.values <= RELATIVE[model.dtype], (kind, agreement)
        assert agreement.low <= RELATIVE[model.dtype], (kind, agreement)  # of inputs that were rounded to h
    assert all(error < 1.5 * moved for error, moved in zip(forced.errors, forced.moved, strict=True)), forced


@pytest.mark.parametrize("blocking", ["0", "1"], ids=["found at a step's end", "CUDA_LAUNCH_BLOCKING"])
def test_a_kernel_that_fails_is_named_and_the_engine_says_that_the_card_is_lost(tmp_path, blocking):
    code = """
from engine import jit
from engine.jit import sources
from engine.pipelines.loaded_model import LoadedModel
from engine.requests import ImageRequest
from engine.session import Engine
import pathlib, torch

step = LoadedModel.step
def broken(self, check, *inputs):
    sources.KERNELS = pathlib.Path(FOLDER)
    jit.launch(jit.Variant("crash"), (2,), (32,), inputs[0], 7)
    return step(self, check, *inputs)
LoadedModel.step = broken
engine = Engine()
*_, final = engine.run(1, ImageRequest("a red fox", device="cuda"))
print(final.problem.what, final.problem.detail)
print(final.ends_engine)
"""
    (tmp_path / "crash.cu").write_text(
        'extern "C" __global__ void crash(float* x, int n) { x[n * 1000000000000ll] = 1; }'
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_LAUNCH_BLOCKING": blocking}
    done = subprocess.run(
        [sys.executable, "-c", f"FOLDER = {str(tmp_path)!r}\n{code}"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, lost = done.stdout.splitlines()
    told = " ".join(lines)
    assert told.startswith("The graphics card could not do its work.")
    assert "llegal" in told.lower()
    assert ("crash, grid (2,), block (32,)" if blocking == "1" else "Launched last") in told
    assert lost == "True"
