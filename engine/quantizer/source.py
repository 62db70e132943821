"""What is converted and where to: everything about a request that can be refused before the work begins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints.bundle import Bundle, read_bundle
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.safetensors_file import SafetensorsFile
from engine.device import Device
from engine.families.flux import recognise
from engine.folders import BUNDLE_FILE, named_path
from engine.problems import bad_request
from engine.quantizer.calibrate import Amounts
from engine.quantizer.prompts import find_prompts
from engine.quantizer.quantize_t5 import is_t5
from engine.quantizer.result_file import result_file
from engine.requests import QuantizeRequest

VERSION = 1  # of what a part means; another version starts again


@dataclass(frozen=True, eq=False)
class Source:
    """A 16-bit file, and the bundle whose text encoders calibration needs."""

    file: SafetensorsFile
    bundle: Bundle | None
    prompts: tuple[str, ...] | None  # None: nothing to calibrate with
    is_t5: bool  # else FLUX's network


def open_source(request: QuantizeRequest) -> tuple[Source, Path]:
    """The source (of a bundle's folder its network) and the file to write. Raises ProblemError."""
    out = result_file(request.out)
    path = named_path(request.source)
    folder = path if path.is_dir() else path.parent
    bundle = read_bundle(folder) if (folder / BUNDLE_FILE).is_file() else None
    if path.is_dir() and bundle is not None:
        path = bundle.weights["transformer"].path
    file = open_checkpoint(path)
    if out.exists() and any(out.samefile(source) for source in file.stamps):
        raise bad_request("The result would replace its source.", "Choose another name for the result.")
    kind = recognise(file)
    if kind == "svdquant":
        raise bad_request(f"{path.name} is 4-bit already.", "Choose the 16-bit checkpoint it was made from.")
    if kind is None and not is_t5(file):
        raise bad_request(
            f"{path.name} holds neither FLUX's network nor a T5 encoder.", "Choose a 16-bit FLUX checkpoint."
        )
    if kind is None and request.precision != "int4":
        raise bad_request(f"Text encoders have no {request.precision} form.", "Choose the precision int4.")
    return Source(file, bundle, find_prompts(request.prompts, bundle), kind is None), out


def job_of(request: QuantizeRequest, source: Source, device: Device, amounts: Amounts) -> Mapping[str, Any]:
    """What decides the bytes of a part: the same values, the same part."""
    encoders: list[Any] = []
    if source.bundle is not None and source.prompts is not None:
        for role in ("t5", "clip"):
            path = source.bundle.weights[role].path
            encoders.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
    return {
        "version": VERSION,
        "source": sorted([str(path), *stamp] for path, stamp in source.file.stamps.items()),
        "encoders": encoders,
        "prompts": hashlib.sha256("\n".join(source.prompts or ()).encode()).hexdigest(),
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
