"""A 16-bit checkpoint in, a 4-bit SVDQuant checkpoint out, as a generator of events.

calibrate -> smooth -> low_rank -> round_weights -> pack, block by block: at any time one block of the 16-bit
network is in memory. What is finished waits on disk beside the result (parts.py), so a second start goes on.
A T5 encoder has its own, shorter way: quantize_t5.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from engine.device import choose_device
from engine.events import Cancelled, Event, Finished, Notice, QuantizeProgress
from engine.families.flux import read_config
from engine.problems import bad_request
from engine.quantizer import pack
from engine.quantizer.calibrate import Amounts, BlockStream, Calibration, made_up_rows, weights_of
from engine.quantizer.parts import PartsFolder
from engine.quantizer.plan import Unit, plan_units
from engine.quantizer.progress import Progress
from engine.quantizer.prompts import choose_prompts, embed_prompts
from engine.quantizer.quantize_layer import LayerWeights, Rows, Settings, quantize_shared_input
from engine.quantizer.quantize_t5 import quantize_t5
from engine.quantizer.source import Source, job_of, open_source
from engine.quantizer.weight_only import MODULATION_GROUP, quantize_weight_only
from engine.requests import QuantizeRequest
from engine.sampling.sigmas import ResolutionShift, Shift

Check = Callable[[], None]
PerLayer = list[dict[str, Any]]  # name and the four errors, as `Finished.result` has them

DEFAULT_AMOUNTS = Amounts()
PIXELS_PER_TOKEN = 16  # a side
# What the search, the Hessian and the errors of a block come to, in passes of its linears' rows through it.
PASSES_OF_QUANTIZING = 8


class _StopWork(Exception):  # noqa: N818 - not an error
    """The user cancelled."""


def quantize_model(
    request: QuantizeRequest, cancelled: Callable[[], bool] = lambda: False, amounts: Amounts = DEFAULT_AMOUNTS
) -> Iterator[Event]:
    """Yields QuantizeProgress and Notice, and at the end Finished or Cancelled. Raises ProblemError.

    The result appears under its name when it is complete, never before; finished layers stay in `OUT.part/` until
    then. Same request, same files, same machine: same bytes. Finished.result has the errors after each step.
    """

    def check() -> None:
        if cancelled():
            raise _StopWork

    started = perf_counter()
    source, out = open_source(request)
    if source.prompts is None:
        yield Notice("There are no prompts to calibrate with, so the conversion looks at the weights alone.")
    try:
        if source.is_t5:
            per_layer = yield from _quantize_t5(request, source, out, check)
            precision, rank = "int4", 0
        else:
            per_layer = yield from _quantize_network(request, source, out, amounts, check)
            precision, rank = request.precision, request.rank
    except _StopWork:
        yield Cancelled()
        return
    seconds = round(perf_counter() - started, 3)
    yield Finished(
        {"out": str(out), "precision": precision, "rank": rank, "seconds": seconds, "per_layer": per_layer}
    )


def _quantize_t5(
    request: QuantizeRequest, source: Source, out: Path, check: Check
) -> Generator[Event, None, PerLayer]:
    device = torch.device(choose_device(request.device).torch_name)
    gptq = request.rounding == "gptq"
    return (
        yield from quantize_t5(source.file, out, source.bundle, source.prompts, device, request.seed, gptq, check)
    )


def _quantize_network(
    request: QuantizeRequest, source: Source, out: Path, amounts: Amounts, check: Check
) -> Generator[Event, None, PerLayer]:
    device = choose_device(request.device)
    dtype: torch.dtype = getattr(torch, device.dtype)
    stream = BlockStream(source.file, read_config(source.file), torch.device(device.torch_name), dtype)
    units = plan_units(stream.network, request.precision, request.keep)
    check()
    parts = PartsFolder(out, job_of(request, source, device, amounts))
    try:
        yield from _make_parts(request, source, stream, units, parts, amounts, check)
        per_layer = _assemble(request, source, stream, units, parts, out, check)
    finally:
        parts.remove_if_empty()
    parts.remove()
    return per_layer


# ------------------------------------------------------------------------------------------------------ the work


def _make_parts(
    request: QuantizeRequest,
    source: Source,
    stream: BlockStream,
    units: Sequence[Unit],
    parts: PartsFolder,
    amounts: Amounts,
    check: Check,
) -> Iterator[Event]:
    """Make every unit that is not finished yet, in the order data flows."""
    todo = [unit for unit in units if parts.read(unit.name) is None]
    for unit in todo:
        if unit.kind in ("wide", "norms"):
            check()
            parts.write(unit.name, _wide_part(source.file, unit), {})
    four_bit = [unit for unit in units if unit.kind in ("svdquant", "modulation")]
    todo = [unit for unit in four_bit if unit in todo]
    if not todo:
        return
    blocks = range(1 + max(unit.block for unit in todo if unit.block is not None))
    left, total = (sum(len(unit.linears) for unit in some) for some in (todo, four_bit))
    calibration = None
    if source.prompts is not None:
        yield QuantizeProgress("Reading the prompts", total - left, total, 0.0)
        calibration = _calibration(request, source, stream, source.prompts, amounts, check)
    progress = Progress(total - left, total, stream.block_sizes, _passes(stream, calibration, todo))
    hessian, conditionings = None, None
    if calibration is not None:
        for count, what in enumerate(calibration.walk(check)):
            progress.advance(count % stream.num_blocks, calibration.passes_of_step)
            yield progress.event(what)
        conditionings = calibration.conditionings(check)
        if request.rounding == "gptq":
            hessian = conditionings.calibration.T @ conditionings.calibration / len(conditionings.calibration)
    settings = Settings(request.precision, request.rank, request.rounding, request.smooth)
    for index in blocks:
        here = [unit for unit in todo if unit.block == index]
        if calibration is None and not here:
            continue
        with stream.block(index) as block:
            rows: dict[str, Rows] = {}
            if calibration is not None:
                yield progress.event(f"Looking at {stream.name(index)}")
                inputs = [unit.name for unit in here if unit.kind == "svdquant"]
                rows = calibration.look_at(index, block, inputs, check)
                progress.advance(index, amounts.timesteps * calibration.passes_of_step)
            for unit in here:
                check()
                yield progress.event(f"Quantizing {unit.name}")
                if unit.kind == "modulation":
                    tensors, errors = _modulation_part(stream, unit, hessian, conditionings)
                else:
                    tensors, errors = _svdquant_part(stream, unit, rows.get(unit.name), settings, check)
                parts.write(unit.name, tensors, errors)
                progress.advance(index, PASSES_OF_QUANTIZING / len(here), len(unit.linears))
    yield progress.event("Writing the file")


def _passes(stream: BlockStream, calibration: Calibration | None, todo: Sequence[Unit]) -> list[float]:
    """What is to be done with every block, in passes of its linears' rows."""
    blocks = {unit.block for unit in todo}
    passes = [float(PASSES_OF_QUANTIZING) if index in blocks else 0.0 for index in range(stream.num_blocks)]
    if calibration is not None:  # every timestep but the last walks all blocks; then all are looked at together
        calibrating = (2 * calibration.num_walk_passes + 1) * calibration.passes_of_step
        passes = [count + calibrating for count in passes]
    return passes


def _calibration(
    request: QuantizeRequest,
    source: Source,
    stream: BlockStream,
    prompts: tuple[str, ...],
    amounts: Amounts,
    check: Check,
) -> Calibration:
    assert source.bundle is not None
    card, told = source.bundle.card, source.bundle.shift
    sets = choose_prompts(prompts, amounts.prompts, amounts.held_out_prompts, request.seed)
    embedded = embed_prompts(source.bundle, (*sets.calibration, *sets.held_out), stream.device, check)
    shift: Shift = told if isinstance(told, int | float) else ResolutionShift(**told)  # type: ignore[arg-type]
    tokens = (card.default_size[1] // PIXELS_PER_TOKEN, card.default_size[0] // PIXELS_PER_TOKEN)
    guidance = 1.0 if card.guidance is None else card.guidance
    return Calibration(stream, embedded, amounts, tokens, shift, guidance, request.seed)


def _svdquant_part(
    stream: BlockStream, unit: Unit, rows: Rows | None, settings: Settings, check: Check
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layers = []
    for names in unit.linears:
        weight, bias = weights_of(stream, names)
        shift = names.input_shift if settings.precision == "int4" else 0.0
        layers.append(LayerWeights(names.name, weight, bias, len(names.modules), shift))
    if rows is None:
        rows = made_up_rows(layers[0].weight.shape[1], unit.linears[0].input_shift != 0, stream.device)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, Any] = {}
    for names, layer in zip(unit.linears, quantize_shared_input(layers, rows, settings, check), strict=True):
        tensors |= pack.quantized_tensors(names, layer.weights)
        errors[names.name] = asdict(layer.errors)
    return tensors, errors


def _modulation_part(
    stream: BlockStream, unit: Unit, hessian: Tensor | None, conditionings: Rows | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    names = unit.linears[0]
    weight, bias = weights_of(stream, names)
    made = quantize_weight_only(weight, bias, MODULATION_GROUP, symmetric=True, hessian=hessian)
    errors = {}
    if conditionings is not None:
        x = conditionings.held_out
        exact = x @ weight.T
        errors[names.name] = float((x @ made.dense().T - exact).norm() / exact.norm().clamp_min(1e-30))
    return pack.modulation_tensors(names, made), errors


def _wide_part(file: SafetensorsFile, unit: Unit) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for names in unit.linears:
        tensors |= pack.wide_tensors(file, names, unit.kept)
    for norm in unit.norms:
        tensors |= pack.norm_tensors(file, norm)
    return tensors


# ------------------------------------------------------------------------------------------------ after the work


def _assemble(
    request: QuantizeRequest,
    source: Source,
    stream: BlockStream,
    units: Sequence[Unit],
    parts: PartsFolder,
    out: Path,
    check: Check,
) -> PerLayer:
    """Write the one file from all parts; returns the errors of every SVDQuant layer."""
    files = []
    errors: dict[str, Any] = {}
    for unit in units:
        file = parts.read(unit.name)
        if file is None:
            raise bad_request(f"{unit.name} went missing from {parts.path.name}.", "Start the conversion again.")
        files.append(file)
        if unit.kind == "svdquant":
            errors |= parts.errors(unit.name)
    about = {
        "rounding": request.rounding,
        "smooth": request.smooth,
        "calibrated": source.prompts is not None,
        "seed": request.seed,
    }
    metadata = pack.metadata(stream.config, request.precision, request.rank, about)
    with SafetensorsWriter(out, pack.layout_of(files), metadata) as writer:
        written: set[str] = set()
        for file in files:
            check()
            for name in file.tensors.keys() - written:  # parts of one module that stays wide hold the same tensors
                writer.write(name, file.read(name))
            written |= file.tensors.keys()
    return [
        {"name": name, **{f"error_{step}": error for step, error in steps.items()}}
        for name, steps in errors.items()
    ]
