"""What a file is: kind, family, precision, rank per layer, keys used and ignored and why. Reads headers only."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from engine import recipe
from engine.checkpoints.bundle import read_bundle
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.foreign import START_BYTES, foreign_kind
from engine.checkpoints.safetensors_file import PICKLE_SUFFIXES, SafetensorsFile
from engine.checkpoints.svdquant_file import SUFFIXES, check_svdquant_linear, quantized_layers
from engine.device import choose_device, choose_plan
from engine.families.flux import check_flux, linears_of, norms_of, read_config, recognise, stored_plans
from engine.folders import BUNDLE_FILE, list_models
from engine.lora import LoraReport, LoraStack, is_lora
from engine.models.flux import Flux, FluxConfig
from engine.pipelines.foresight import precision_of
from engine.problems import ProblemError, bad_file

Kind = Literal["svdquant", "transformer", "lora", "text_encoder", "vae", "bundle", "unknown"]
MOST_UNUSED = 200  # keys named in a report; a foreign file has thousands


@dataclass(slots=True)
class _Report:
    file: str
    kind: Kind
    family: str | None = None
    precision: str | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    plans: dict[str, int] = field(default_factory=dict)  # on this machine: how many layers
    plan_of_layer: dict[str, str] = field(default_factory=dict)
    usable: bool = False
    reason: str = ""
    keys_used: int = 0
    keys_unused: list[dict[str, str]] = field(default_factory=list)


def inspect_file(path: Path, check: Callable[[], None]) -> dict[str, Any]:
    """What `inspect` prints as JSON; the shape is in engine/cli.schema.json.

    A sound file that Tonfa cannot use is a result with usable false; a damaged one raises ProblemError.
    """
    if path.name == BUNDLE_FILE or (path / BUNDLE_FILE).is_file():
        return asdict(_bundle(path if path.is_dir() else path.parent, check))
    if not path.exists():
        raise bad_file(f"There is no file {path.name}.", "Check the name and the folder.", str(path))
    foreign = _foreign(path)
    if foreign:
        return asdict(_Report(str(path), "unknown", reason=foreign))
    file = open_checkpoint(path)
    check()
    if recognise(file) is not None:
        report = _transformer(file, check)
    elif is_lora(file):
        report = _lora(file, check)
    else:
        report = _other(file)
    report.keys_unused = report.keys_unused[:MOST_UNUSED]
    return asdict(report)


def _foreign(path: Path) -> str:
    """What a file of another kind is, in words; "" for what should be a safetensors file."""
    if path.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES) or not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            what = foreign_kind(file.read(START_BYTES))
    except OSError:
        return ""  # whoever opens it next says why it cannot be read
    with contextlib.suppress(ProblemError):
        if what == "a PNG picture" and recipe.JSON_KEY in recipe.read_png(path)[1]:
            what = "a picture with its recipe"
    return f"it is {what}, not a model" if what else ""


def _bundle(folder: Path, check: Callable[[], None]) -> _Report:
    bundle = read_bundle(folder)
    report = _transformer(open_checkpoint(bundle.weights["transformer"].path), check)
    report.file, report.kind = str(folder), "bundle"
    for role in (*bundle.weights, *bundle.tokenizers):
        bundle.part_hash(role, check)  # raises for a part that is not the one it names
    return report


def _transformer(file: SafetensorsFile, check: Callable[[], None]) -> _Report:
    config = check_flux(file)  # what generate would refuse is refused here
    layers = quantized_layers(file)
    report = _Report(str(file.path), "svdquant" if layers else "transformer", "flux", usable=True)
    ranks: Counter[int] = Counter()
    precisions = set()
    used: set[str] = set()
    for prefix, kind in layers.items():
        if kind == "svdquant":
            header = check_svdquant_linear(file, prefix)
            ranks[header.rank] += 1
            precisions.add(header.precision)
    for names in linears_of(config):
        stored = next((prefix for prefix in (names.public, names.public_v2) if prefix in layers), None)
        if stored is not None:
            used |= {key for key in file.tensors if key.rpartition(".")[0] == stored}
            continue
        for module in names.modules:
            keys = [f"{module}.weight"] + ([f"{module}.bias"] if names.has_bias else [])
            for key in keys:
                file.info(key)
            used |= {key for key in (*keys, f"{module}.bias", f"{module}.weight_scale") if key in file.tensors}
    for norm in norms_of(config):
        used |= {key for key in (f"{norm.public}.weight", f"{norm.module}.weight") if key in file.tensors}
    kept_for_tools = tuple("." + SUFFIXES[version]["smooth_orig"] for version in ("v1", "v2"))
    report.ranks = {str(rank): count for rank, count in sorted(ranks.items())}
    report.precision = " and ".join(sorted(precisions)) or _float_name(file)
    report.layers = len(linears_of(config))
    for key in sorted(file.tensors):
        if key.endswith(kept_for_tools):
            report.keys_unused.append({"key": key, "why": "kept for tools; nothing is computed from it"})
        elif key not in used:
            report.keys_unused.append({"key": key, "why": "FLUX's network has no such tensor"})
    report.keys_used = len(file.tensors) - len(report.keys_unused)
    odd = _with_minus_eight(file, list(layers), check)
    if odd:
        others = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        report.reason = f"{odd[0]}{others} with a code of -8 run w4a16 where the others run w4a8"
    report.plan_of_layer = plans_here(file, config, odd)
    report.plans = dict(Counter(report.plan_of_layer.values()))
    return report


def plans_here(file: SafetensorsFile, config: FluxConfig, odd: Collection[str] = ()) -> dict[str, str]:
    """By which plan each linear runs on the device that "auto" is. odd: layers with a code of -8."""
    precision = precision_of(file)
    plan = choose_plan(choose_device(), precision, "auto").plan
    return stored_plans(file, config, plan, odd if plan == "w4a8" else ())


def _with_minus_eight(file: SafetensorsFile, prefixes: list[str], check: Callable[[], None]) -> list[str]:
    """int4 layers that hold the code -8, which w4a8 has no place for (two's complement nibble 8)."""
    found = []
    for prefix in prefixes:
        check()
        if f"{prefix}.wscales" not in file.tensors or file.tensors[f"{prefix}.qweight"].dtype != torch.int8:
            continue
        if file.tensors[f"{prefix}.wscales"].dtype == torch.float8_e4m3fn:
            continue
        codes = file.read(f"{prefix}.qweight").view(torch.uint8)
        if bool(((codes & 15) == 8).any()) or bool(((codes >> 4) == 8).any()):
            found.append(prefix)
    return found


def _lora(file: SafetensorsFile, check: Callable[[], None]) -> _Report:
    """Fit the LoRA to the networks at hand, without weights, and report the best fit."""
    report = _Report(str(file.path), "lora")
    ranks: Counter[int] = Counter()
    for key, info in file.tensors.items():
        if key.endswith(".lora_A.weight") and info.shape:
            ranks[info.shape[0]] += 1
    report.ranks = {str(rank): count for rank, count in sorted(ranks.items())}
    report.layers = sum(ranks.values())
    report.precision = _float_name(file)
    best: LoraReport | None = None
    fits = ""
    for name, config in _networks_at_hand():
        check()
        with torch.device("meta"):
            network = Flux(config)
        try:
            told = LoraStack(network).set([(str(file.path), 1.0)])[0]
        except ProblemError as error:
            report.reason = error.problem.what
            continue
        if best is None or told.keys_used > best.keys_used:
            best, fits = told, name
    if best is None:
        return report
    report.keys_used = best.keys_used
    report.keys_unused = [{"key": one.key, "why": one.why} for one in best.keys_unused]
    report.usable = best.keys_used > 0
    if report.usable:
        report.family, report.reason = "flux", f"fits {fits}"
    else:
        report.reason = report.reason or "none of its keys fits a model on this computer or FLUX.1"
    return report


def _networks_at_hand() -> list[tuple[str, FluxConfig]]:
    """Every usable bundle's network, and FLUX.1 itself."""
    found: dict[FluxConfig, str] = {}
    for card in list_models():
        if card.problem:
            continue
        try:
            transformer = open_checkpoint(read_bundle(Path(card.folder)).weights["transformer"].path)
            found.setdefault(read_config(transformer), card.name)
        except ProblemError:
            continue  # the list of models says what is wrong with it
    found.setdefault(FluxConfig(), "FLUX.1")
    return [(name, config) for config, name in found.items()]


def _other(file: SafetensorsFile) -> _Report:
    keys = file.tensors.keys()
    kind: Kind = "unknown"
    reason = "Tonfa does not know what this file is for"
    usable = False
    if any(key.endswith(("SelfAttention.q.weight", "SelfAttention.q.qweight")) for key in keys):
        kind, usable, reason = "text_encoder", True, "T5"
    elif any(key.endswith("embeddings.token_embedding.weight") for key in keys):
        kind, usable, reason = "text_encoder", True, "CLIP"
    elif "decoder.conv_in.weight" in keys:
        usable = any(key.startswith("decoder.up_blocks.") for key in keys)
        kind, reason = "vae", "" if usable else "a VAE by other names than diffusers'; Tonfa cannot read it yet"
    elif any(".lora_" in key or "lora_up" in key or key.endswith(".alpha") for key in keys):
        kind, reason = "lora", "its keys are not in diffusers' or PEFT's format"
    elif any(key.endswith(".qweight") for key in keys):
        kind, reason = "svdquant", "it is not made for a family that Tonfa knows"
    used = len(keys) if usable else 0
    unused = [] if usable else [{"key": key, "why": reason} for key in sorted(keys)]
    return _Report(
        str(file.path),
        kind,
        precision="int4" if usable and any(key.endswith(".qweight") for key in keys) else _float_name(file),
        layers=sum(1 for key in keys if key.endswith((".weight", ".qweight"))),
        usable=usable,
        reason=reason,
        keys_used=used,
        keys_unused=unused,
    )


def _float_name(file: SafetensorsFile) -> str | None:
    """The commonest type of the file's numbers: "bf16", "fp16", "fp32", else torch's name."""
    counts = Counter(str(info.dtype).removeprefix("torch.") for info in file.tensors.values())
    if not counts:
        return None
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    name = counts.most_common(1)[0][0]
    return short.get(name, name)
