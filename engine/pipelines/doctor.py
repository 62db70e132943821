"""A look at this machine: what it is, which plan its linears run by, what is missing and the one thing to do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from engine.checkpoints.bundle import read_bundle
from engine.device import OLDEST_ARCH, best_plan, cuda_problem
from engine.folders import ModelCard, list_models, models_folders, user_models
from engine.monitor import Monitor, cpu_name, cpu_threads
from engine.pipelines.foresight import read_transformer
from engine.pipelines.inspect_file import plans_here
from engine.problems import ProblemError


def look_at_machine() -> dict[str, Any]:
    """What `doctor` prints as JSON (shape: engine/cli.schema.json). Never fails: what is wrong is listed."""
    sample = Monitor().sample()
    problems: list[dict[str, str]] = []
    gpus = []
    for card in sample.gpus:
        plans = {precision: best_plan(card.arch, precision).plan for precision in ("int4", "nvfp4")}
        gpus.append(
            {
                "name": card.name,
                "arch": f"sm_{card.arch}",
                "memory_bytes": card.total_bytes,
                "free_bytes": card.free_bytes,
                "driver": card.driver,
                "plan_int4": plans["int4"],
                "plan_nvfp4": plans["nvfp4"],
            }
        )
        if card.arch < OLDEST_ARCH:
            problems.append(_problem(f"{card.name} is older than sm_75.", "Pictures are made on the processor."))
    if not gpus:
        problems.append(
            _problem(
                "No NVIDIA graphics card was found; pictures are made on the processor.",
                "If there is one, install NVIDIA's driver.",
            )
        )
    elif wrong := cuda_problem(sample.gpus):
        problems.append(_problem(f"{wrong} Pictures are made on the processor.", _mend(wrong)))
    models = []
    for folder in models_folders():
        if not folder.is_dir() and folder != user_models().absolute():  # the user's own is made when it is needed
            problems.append(_problem(f"There is no models folder {folder}.", "Check the name in TONFA_MODELS."))
    for model in list_models():
        told = None if model.problem else _layers_of(model)
        if told is not None:
            models.append(told)
        if model.problem:
            problems.append(_problem(f"The model {model.name} cannot be used.", model.problem))
    if not any(not model.problem for model in list_models()):
        problems.append(
            _problem("There is no model that can be used.", "Put a model's folder into a models folder.")
        )
    return {
        "gpus": gpus,
        "cpu": {"name": cpu_name(), "threads": cpu_threads(), "memory_bytes": sample.total_bytes},
        "models": models,
        "problems": problems,
    }


def _layers_of(model: ModelCard) -> dict[str, Any] | None:
    """How many layers of a model run by which plan here, from its header; None where that cannot be read."""
    try:
        transformer = read_transformer(read_bundle(Path(model.folder)))
    except ProblemError:
        return None  # generate and inspect say why
    plans = dict(Counter(plans_here(transformer.file, transformer.config).values()))
    return {"name": model.name, "precision": transformer.precision or "16-bit", "plans": plans}


def _mend(wrong: str) -> str:
    return "Update NVIDIA's driver." if "driver" in wrong else "Run the installer again."


def _problem(what: str, todo: str) -> dict[str, str]:
    return {"what": what, "todo": todo}
