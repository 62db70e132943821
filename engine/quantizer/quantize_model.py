"""A 16-bit checkpoint in, a 4-bit SVDQuant checkpoint out, as a generator of events.

calibrate -> smooth -> low_rank -> round_weights -> pack, block by block: at any time one block of the 16-bit
network is in memory. What is finished waits on disk beside the result (parts.py), so a second start goes on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.bundle import Bundle, read_bundle
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from engine.device import Device, choose_device
from engine.events import Cancelled, Event, Finished, Notice, QuantizeProgress
from engine.families.flux import read_config, recognise
from engine.folders import BUNDLE_FILE, named_path
from engine.models.flux import FluxConfig
from engine.problems import bad_request
from engine.quantizer import pack
from engine.quantizer.calibrate import Amounts, BlockStream, Calibration, made_up_rows, weights_of
from engine.quantizer.parts import PartsFolder
from engine.quantizer.plan import Unit, plan_units
from engine.quantizer.prompts import choose_prompts, embed_prompts, find_prompts
from engine.quantizer.quantize_layer import LayerWeights, Rows, Settings, quantize_shared_input
from engine.quantizer.quantize_t5 import is_t5, quantize_t5
from engine.quantizer.weight_only import MODULATION_GROUP, quantize_weight_only
from engine.requests import QuantizeRequest
from engine.sampling.sigmas import ResolutionShift, Shift

DEFAULT_AMOUNTS = Amounts()
WITHOUT_PROMPTS = "There are no prompts to calibrate with, so the conversion looks at the weights alone."
VERSION = 1  # of what a part means; another version starts again
PIXELS_PER_TOKEN = 16  # a side
# Passes over a unit's rows that its search, its Hessian and its errors come to, beside one pass of calibration.
COST_OF_QUANTIZING = 8


class _StopWork(Exception):  # noqa: N818 - not an error
    """The user cancelled."""


@dataclass(frozen=True, eq=False)
class Source:
    """What is converted: a 16-bit file, and the bundle whose text encoders calibration needs."""

    file: SafetensorsFile
    config: FluxConfig
    bundle: Bundle | None
    prompts: tuple[str, ...] | None  # None: nothing to calibrate with


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
    out = _checked_out(request)
    file, bundle = open_source(request)
    if is_t5(file):
        yield from _quantize_text_encoder(request, file, bundle, out, check, started)
        return
    source = _network_source(request, file, bundle)
    device = choose_device(request.device)
    parts: PartsFolder | None = None
    try:
        stream = BlockStream(source.file, source.config, torch.device(device.torch_name), _dtype(device))
        units = plan_units(stream.network, request.precision, request.keep)
        check()
        parts = PartsFolder(out, _job(request, source, device, amounts))
        if source.prompts is None:
            yield Notice(WITHOUT_PROMPTS)
        yield from _make_parts(request, source, stream, units, parts, amounts, check)
        result = _assemble(request, source, units, parts, out, check)
    except _StopWork:
        yield Cancelled()
        return
    finally:
        if parts is not None:
            parts.remove_if_empty()
    parts.remove()
    yield Finished({**result, "seconds": round(perf_counter() - started, 3)})


# ---------------------------------------------------------------------------------------------- before the work


def open_source(request: QuantizeRequest) -> tuple[SafetensorsFile, Bundle | None]:
    """The file to convert (of a bundle's folder its network), and the bundle it lies in. Raises ProblemError."""
    path = named_path(request.source)
    folder = path if path.is_dir() else path.parent
    bundle = read_bundle(folder) if (folder / BUNDLE_FILE).is_file() else None
    if path.is_dir() and bundle is not None:
        path = bundle.weights["transformer"].path
    return open_checkpoint(path), bundle


def _network_source(request: QuantizeRequest, file: SafetensorsFile, bundle: Bundle | None) -> Source:
    kind = recognise(file)
    if kind is None:
        raise bad_request(
            f"{file.path.name} holds neither FLUX's network nor a T5 encoder.", "Choose a 16-bit FLUX checkpoint."
        )
    if kind == "svdquant":
        raise bad_request(f"{file.path.name} is 4-bit already.", "Choose the 16-bit checkpoint it was made from.")
    return Source(file, read_config(file), bundle, find_prompts(request.prompts, bundle))


def _checked_out(request: QuantizeRequest) -> Path:
    out = named_path(request.out)
    try:
        if out.suffix != ".safetensors" or "\0" in out.name or out.is_dir():
            raise bad_request(
                f"The result cannot be written as {out.name!r}.", "Choose a name that ends in .safetensors."
            )
        if not out.parent.is_dir():
            raise bad_request(f"There is no folder {out.parent}.", "Make the folder, or choose another.")
        if not os.access(out.parent, os.W_OK):
            raise bad_request(f"The folder {out.parent} cannot be written to.", "Choose another folder.")
        if out.exists() and out.samefile(named_path(request.source)):
            raise bad_request("The result would replace its source.", "Choose another name for the result.")
    except (OSError, ValueError) as error:
        raise bad_request(f"The result cannot be written: {error}.", "Choose another name for it.") from None
    return out.absolute()


def _dtype(device: Device) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, device.dtype)
    return dtype


def _job(request: QuantizeRequest, source: Source, device: Device, amounts: Amounts) -> Mapping[str, Any]:
    """What decides the bytes of a part: the same values, the same part."""
    encoders: list[Any] = []
    if source.bundle is not None and source.prompts is not None:
        for role in ("t5", "clip"):
            path = source.bundle.weights[role].path
            encoders.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
    prompts = hashlib.sha256("\n".join(source.prompts or ()).encode()).hexdigest()
    return {
        "version": VERSION,
        "source": sorted([str(path), *stamp] for path, stamp in source.file.stamps.items()),
        "encoders": encoders,
        "prompts": prompts,
        "device": device.name,
        "threads": torch.get_num_threads(),  # matrix products may differ in their last bit
        "torch": torch.__version__,
        "amounts": asdict(amounts),
        "precision": request.precision,
        "rank": request.rank,
        "rounding": request.rounding,
        "smooth": request.smooth,
        "keep": [list(pair) for pair in request.keep],
        "seed": request.seed,
    }


def _quantize_text_encoder(
    request: QuantizeRequest,
    file: SafetensorsFile,
    bundle: Bundle | None,
    out: Path,
    check: Callable[[], None],
    started: float,
) -> Iterator[Event]:
    if request.precision != "int4":
        raise bad_request(f"Text encoders have no {request.precision} form.", "Choose the precision int4.")
    prompts = find_prompts(request.prompts, bundle)
    device = torch.device(choose_device(request.device).torch_name)
    if prompts is None:
        yield Notice(WITHOUT_PROMPTS)
    try:
        per_layer = yield from quantize_t5(
            file, out, bundle, prompts, device, request.seed, request.rounding == "gptq", check
        )
    except _StopWork:
        yield Cancelled()
        return
    seconds = round(perf_counter() - started, 3)
    yield Finished({"out": str(out), "precision": "int4", "rank": 0, "seconds": seconds, "per_layer": per_layer})


# ------------------------------------------------------------------------------------------------------ the work


class _Clock:
    """Predicts the rest from the work done so far."""

    def __init__(self, total: float) -> None:
        self._total, self._done, self._started = max(total, 1.0), 0.0, perf_counter()

    def advance(self, work: float) -> None:
        self._done += work

    @property
    def left_s(self) -> float:
        if self._done <= 0:
            return 0.0
        return max(0.0, (perf_counter() - self._started) * (self._total / self._done - 1))


def _make_parts(
    request: QuantizeRequest,
    source: Source,
    stream: BlockStream,
    units: list[Unit],
    parts: PartsFolder,
    amounts: Amounts,
    check: Callable[[], None],
) -> Iterator[Event]:
    """Make every unit that is not finished yet."""
    total = sum(len(unit.linears) for unit in units if unit.kind in ("svdquant", "modulation"))
    todo = [unit for unit in units if parts.read(unit.name) is None]
    done = total - sum(len(unit.linears) for unit in todo if unit.kind in ("svdquant", "modulation"))
    if not todo:
        return
    for unit in todo:
        if unit.kind in ("wide", "norms"):
            check()
            parts.write(unit.name, _wide_part(source.file, unit), {})
    todo = [unit for unit in todo if unit.kind in ("svdquant", "modulation")]
    last = max((unit.block for unit in todo if unit.block is not None), default=-1)
    calibration, conditionings = None, None
    work_of_block = _work_of_blocks(stream)
    clock = _Clock(COST_OF_QUANTIZING * sum(work_of_block))
    if todo and source.prompts is not None:
        yield QuantizeProgress("Reading the prompts", done, total, 0.0)
        calibration = _calibration(request, source, stream, source.prompts, amounts, check)
        pass_work = calibration.num_samples * calibration.tokens / amounts.rows
        walk_work = pass_work * calibration.num_walk_passes / (calibration.num_walk_passes + 1)
        quantize = {unit.block for unit in todo}
        clock = _Clock(
            (walk_work + pass_work) * sum(work_of_block)
            + COST_OF_QUANTIZING * sum(work_of_block[block] for block in quantize if block is not None)
        )
        for index, what in enumerate(calibration.walk(check)):
            clock.advance(walk_work / calibration.num_walk_passes * work_of_block[index % stream.num_blocks])
            yield QuantizeProgress(what, done, total, clock.left_s)
        conditionings = calibration.conditionings(check)
    settings = Settings(request.precision, request.rank, request.rounding, request.smooth)
    hessian = None
    if conditionings is not None and request.rounding == "gptq":
        hessian = conditionings.calibration.T @ conditionings.calibration / len(conditionings.calibration)
    for index in range(last + 1):
        here = [unit for unit in todo if unit.block == index]
        if calibration is None and not here:
            continue
        with stream.block(index) as block:
            rows: dict[str, Rows] = {}
            if calibration is not None:
                inputs = [unit.name for unit in here if unit.kind == "svdquant"]
                yield QuantizeProgress(f"Looking at {stream.name(index)}", done, total, clock.left_s)
                rows = calibration.look_at(index, block, inputs, check)
                clock.advance(pass_work * work_of_block[index])
            for unit in here:
                check()
                yield QuantizeProgress(f"Quantizing {unit.name}", done, total, clock.left_s)
                if unit.kind == "modulation":
                    tensors, errors = _modulation_part(stream, unit, hessian, conditionings)
                else:
                    tensors, errors = _svdquant_part(stream, unit, rows.get(unit.name), settings, check)
                parts.write(unit.name, tensors, errors)
                done += len(unit.linears)
                clock.advance(COST_OF_QUANTIZING * work_of_block[index] / len(here))
    yield QuantizeProgress("Writing the file", total, total, 0.0)


def _calibration(
    request: QuantizeRequest,
    source: Source,
    stream: BlockStream,
    prompts: tuple[str, ...],
    amounts: Amounts,
    check: Callable[[], None],
) -> Calibration:
    assert source.bundle is not None
    sets = choose_prompts(prompts, amounts.prompts, amounts.held_out_prompts, request.seed)
    embedded = embed_prompts(source.bundle, (*sets.calibration, *sets.held_out), stream.device, check)
    width, height = source.bundle.card.default_size
    told = source.bundle.shift
    shift: Shift = told if isinstance(told, int | float) else ResolutionShift(**told)  # type: ignore[arg-type]
    guidance = source.bundle.card.guidance
    return Calibration(
        stream,
        embedded,
        amounts,
        (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN),
        shift,
        1.0 if guidance is None else guidance,
        request.seed,
    )


def _work_of_blocks(stream: BlockStream) -> list[float]:
    """Of each block, relative to the largest: its parameters."""
    sizes = []
    for index in range(stream.num_blocks):
        block = stream.network.get_submodule(stream.name(index))
        sizes.append(float(sum(parameter.numel() for parameter in block.parameters())))
    return [size / max(sizes) for size in sizes]


def _svdquant_part(
    stream: BlockStream, unit: Unit, rows: Rows | None, settings: Settings, check: Callable[[], None]
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
    quantized = quantize_shared_input(layers, rows, settings, check)
    for names, layer in zip(unit.linears, quantized, strict=True):
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
    units: list[Unit],
    parts: PartsFolder,
    out: Path,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Write the one file from all parts; returns the result without its seconds."""
    files = []
    for unit in units:
        file = parts.read(unit.name)
        if file is None:
            raise bad_request(f"{unit.name} went missing from {parts.path.name}.", "Start the conversion again.")
        files.append(file)
    errors: dict[str, Any] = {}
    for unit in units:
        if unit.kind == "svdquant":
            errors |= parts.errors(unit.name)
    about = {
        "rounding": request.rounding,
        "smooth": request.smooth,
        "calibrated": source.prompts is not None,
        "seed": request.seed,
    }
    metadata = pack.metadata(source.config, request.precision, request.rank, about)
    with SafetensorsWriter(out, pack.layout_of(iter(files)), metadata) as writer:
        written: set[str] = set()
        for file in files:
            check()
            for name in file.tensors.keys() - written:  # parts of one module that stays wide hold the same tensors
                writer.write(name, file.read(name))
            written |= file.tensors.keys()
    per_layer = [
        {
            "name": name,
            "error_rtn": steps["rtn"],
            "error_smooth": steps["smooth"],
            "error_svdquant": steps["svdquant"],
            "error_final": steps["final"],
        }
        for name, steps in errors.items()
    ]
    return {"out": str(out), "precision": request.precision, "rank": request.rank, "per_layer": per_layer}
