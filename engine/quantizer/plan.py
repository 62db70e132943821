"""What becomes of every layer of a checkpoint, decided before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast

from engine.checkpoints.key_maps.flux import LinearNames, NormNames
from engine.families.flux import linears_of, norms_of
from engine.layers.linear import Linear
from engine.models.flux import Flux
from engine.problems import bad_request
from engine.quantizer.pack import Kept
from engine.quantizer.weight_only import MODULATION_GROUP
from engine.reference.svdq_linear import GROUP_SIZE, Precision

READ_ONE_INPUT = ("qkv", "fc1")  # of a single block: attention and MLP side by side


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that are made together. block: index of their block, None for what is around the blocks."""

    name: str
    kind: Literal["svdquant", "modulation", "wide", "norms"]
    block: int | None
    linears: tuple[LinearNames, ...] = ()
    norms: tuple[NormNames, ...] = ()
    kept: Kept = "bf16"


def plan_units(network: Flux, precision: Precision, keep: Sequence[tuple[str, str]]) -> list[Unit]:
    """All units in the order data flows. network: of the right sizes, on the meta device will do.

    Raises ProblemError for a pattern that matches nothing and for layers whose width 4 bits cannot take.
    """
    linears = linears_of(network.config)
    kept = kept_linears(linears, keep)
    units: list[Unit] = []
    for names in linears:
        block = _block_of(names, network.config.num_layers)
        if names.kind == "plain" or names.name in kept:
            units.append(Unit(names.name, "wide", block, (names,), kept=kept.get(names.name, "bf16")))
            continue
        modulation = names.kind == "modulation"
        _check_width(network, names, MODULATION_GROUP if modulation else GROUP_SIZE[precision])
        if modulation:
            units.append(Unit(names.name, "modulation", block, (names,)))
            continue
        parent, _, part = names.name.rpartition(".")
        first = next((unit for unit in units if unit.name == f"{parent}.{READ_ONE_INPUT[0]}"), None)
        if part == READ_ONE_INPUT[1] and parent.startswith("single_blocks.") and first and first.kind == "svdquant":
            units[units.index(first)] = Unit(first.name, "svdquant", block, (*first.linears, names))
        else:
            units.append(Unit(names.name, "svdquant", block, (names,)))
    units.append(Unit("norms", "norms", None, norms=tuple(norms_of(network.config))))
    return units


def kept_linears(linears: Sequence[LinearNames], keep: Sequence[tuple[str, str]]) -> dict[str, Kept]:
    """Our name of every linear that stays wide -> how.

    A pattern (with * and ?) is compared with our name, the public file's and diffusers'; the last that matches
    counts. Linears that are parts of one diffusers module are kept together, since files hold it whole.
    """
    kept: dict[str, Kept] = {}
    for pattern, kind in keep:
        found = [names for names in linears if any(fnmatchcase(name, pattern) for name in _all_names(names))]
        if not found:
            raise bad_request(
                f"No layer is called {pattern[:100]!r}.",
                f"Use names like {linears[len(linears) // 2].name}, with * for any characters.",
            )
        modules = {module for names in found for module in names.modules}
        for names in linears:
            if modules & set(names.modules):
                kept[names.name] = cast(Kept, kind)
    return kept


def _all_names(names: LinearNames) -> list[str]:
    return [name for name in (names.name, names.public, names.public_v2, *names.modules) if name]


def _block_of(names: LinearNames, num_double_blocks: int) -> int | None:
    kind, _, rest = names.name.partition(".")
    if kind not in ("double_blocks", "single_blocks"):
        return None
    return int(rest.partition(".")[0]) + (num_double_blocks if kind == "single_blocks" else 0)


def _check_width(network: Flux, names: LinearNames, group_size: int) -> None:
    layer = network.get_submodule(names.name)
    assert isinstance(layer, Linear)
    if layer.in_features % group_size:
        raise bad_request(
            f"{names.name} is {layer.in_features} channels wide; 4 bits need a multiple of {group_size}.",
            f"Keep it in 16 bits: --keep {names.name}=bf16.",
        )
