"""The LoRA stack of a network: several files at once, each with a live strength, never merged.

Reads diffusers' and PEFT's key format (`transformer.<module>.lora_A.weight`, Hu et al. 2021). Factors are stacked
along rank beside each linear; one buffer for the whole network holds one fp32 scale per 16 ranks. Changing a
strength writes that buffer and nothing else; adding or removing a file makes a new layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoints.safetensors_file import SafetensorsFile, open_safetensors
from engine.families.flux import LoraTarget, lora_targets
from engine.layers.linear import RANK_STEP, BranchedLinear, BranchSlice, LowRankBranches
from engine.models.flux import Flux
from engine.problems import bad_file

MAX_RANK = 1024  # of all LoRAs of one linear together
SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".alpha": "alpha",
}
PREFIX = "transformer."


@dataclass(frozen=True, slots=True)
class KeyUnused:
    """A key of a LoRA file that changes nothing, and why."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What a network takes from a LoRA file."""

    file: str
    strength: float
    keys_used: int
    keys_unused: tuple[KeyUnused, ...]
    layers_used: int  # linears that carry a branch of it
    layers: int  # linears that its keys name


@dataclass(frozen=True, slots=True)
class _Part:
    """One LoRA's part of one linear: down (R, K), up (N, R), R a multiple of 16; bias (N,) or None."""

    down: Tensor
    up: Tensor
    scale: float  # alpha / rank
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One LoRA file, fitted to the network: linear name -> part."""

    parts: dict[str, _Part]
    report: LoraReport


def lora_keys(file: SafetensorsFile) -> tuple[dict[str, dict[str, str]], list[KeyUnused]]:
    """Group keys: diffusers module -> {"down" | "up" | "bias" | "alpha": key}; and the keys of other forms."""
    modules: dict[str, dict[str, str]] = {}
    unknown: list[KeyUnused] = []
    for key in file.tensors:
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            unknown.append(KeyUnused(key, "not a LoRA key in diffusers' format"))
            continue
        module = key.removeprefix(PREFIX)[: -len(suffix)]
        role = SUFFIXES[suffix]
        if role in modules.setdefault(module, {}):
            unknown.append(KeyUnused(key, f"{modules[module][role]} says the same of this layer"))
            continue
        modules[module][role] = key
    return modules, unknown


def is_lora(file: SafetensorsFile) -> bool:
    """Whether a file holds LoRA factors in diffusers' format."""
    return any(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in file.tensors)


class LoraStack:
    """The LoRAs of one network. `set` says which and how strong; the network's linears then carry them."""

    def __init__(self, network: Flux) -> None:
        self._network = network
        self._targets = lora_targets(network)
        self._files: tuple[tuple[str, int, int], ...] = ()
        self._loaded: list[_Loaded] = []
        self._strengths: list[float] = []
        self._scales = torch.zeros(0)
        self._unit_scales = torch.zeros(0)  # alpha / rank of each 16 ranks
        self._owner = torch.zeros(0, dtype=torch.int64)  # which LoRA each 16 ranks belong to

    def set(self, loras: Sequence[tuple[str, float]]) -> list[LoraReport]:
        """Make the network carry exactly these (file, strength) pairs, in this order.

        The same files in the same order only get new strengths. Raises ProblemError for a file that is damaged or
        whose ranks do not fit; the network then carries what it carried before.
        """
        files = tuple(_identity(path) for path, _ in loras)
        strengths = [float(strength) for _, strength in loras]
        if files != self._files:
            loaded = [self._read(path) for path, _ in loras]
            _check_ranks(loaded)
            self._lay_out(loaded)
            self._files, self._loaded = files, loaded
        self._strengths[:] = strengths
        if self._owner.numel():
            per_lora = torch.tensor(strengths, dtype=torch.float32)
            self._scales.copy_(per_lora[self._owner].to(self._scales.device) * self._unit_scales)
        return [
            LoraReport(path, s, r.keys_used, r.keys_unused, r.layers_used, r.layers)
            for (path, s), r in zip(loras, (item.report for item in self._loaded), strict=True)
        ]

    def clear(self) -> None:
        """Take every LoRA off; nothing of them stays."""
        self.set(())

    def _read(self, path: str) -> _Loaded:
        file = open_safetensors(path)
        modules, unused = lora_keys(file)
        if not is_lora(file):
            raise bad_file(
                f"{file.path.name} holds no LoRA that Tonfa can read.",
                "Choose a LoRA in diffusers' or PEFT's format.",
            )
        found: dict[str, list[tuple[LoraTarget, _Part]]] = {}
        used = 0
        for module, keys in modules.items():
            why = self._fits(file, module, keys)
            if why:
                unused += [KeyUnused(key, why) for key in keys.values()]
                continue
            used += len(keys)
            for target, part in self._module_parts(file, module, keys):
                found.setdefault(target.name, []).append((target, part))
        parts = {
            name: _stack_rows(items, self._linear(name).out_features, self._linear(name).in_features)
            for name, items in found.items()
        }
        named = {target.name for module in modules for target in self._targets.get(module, ())}
        unused.sort(key=lambda item: item.key)
        report = LoraReport(path, 1.0, used, tuple(unused), len(parts), max(len(named), len(parts)))
        return _Loaded(parts, report)

    def _linear(self, name: str) -> BranchedLinear:
        layer = self._network.get_submodule(name)
        assert isinstance(layer, BranchedLinear)
        return layer

    def _fits(self, file: SafetensorsFile, module: str, keys: dict[str, str]) -> str:
        """Why this module's keys cannot be used, or "" when they can. Looks at the header only."""
        targets = self._targets.get(module)
        if targets is None:
            return "this model has no such layer"
        if "down" not in keys or "up" not in keys:
            missing = "lora_A.weight" if "down" not in keys else "lora_B.weight"
            return f"its {missing} is missing"
        down, up = file.tensors[keys["down"]].shape, file.tensors[keys["up"]].shape
        rows = targets[0].rows[1] - targets[0].rows[0]
        columns = max(target.columns[1] for target in targets)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] == 0:
            return f"its factors {list(down)} and {list(up)} do not fit together"
        if (up[0], down[1]) != (rows, columns):
            return f"it is made for a layer of {up[0]} x {down[1]}, this one is {rows} x {columns}"
        if down[0] > MAX_RANK:
            return f"its rank {down[0]} is above {MAX_RANK}"
        if "bias" in keys and tuple(file.tensors[keys["bias"]].shape) != (rows,):
            return f"its bias {list(file.tensors[keys['bias']].shape)} does not fit {rows} rows"
        if "alpha" in keys and _count(file.tensors[keys["alpha"]].shape) != 1:
            return "its alpha is not one number"
        return ""

    def _module_parts(
        self, file: SafetensorsFile, module: str, keys: dict[str, str]
    ) -> list[tuple[LoraTarget, _Part]]:
        down, up = _finite(file, keys["down"]), _finite(file, keys["up"])
        rank = down.shape[0]
        alpha = float(_finite(file, keys["alpha"]).reshape(())) if "alpha" in keys else float(rank)
        bias = _finite(file, keys["bias"]) if "bias" in keys else None
        parts = []
        for target in self._targets[module]:
            columns = down[:, target.columns[0] : target.columns[1]]
            delta = bias if target.carries_bias else None
            parts.append((target, _Part(columns, up, alpha / rank, delta)))
        return parts

    def _lay_out(self, loaded: list[_Loaded]) -> None:
        """Give every linear its stacked factors, and the buffer its places."""
        parts_of: dict[str, list[tuple[int, _Part]]] = {}
        for index, item in enumerate(loaded):
            for name, part in item.parts.items():
                parts_of.setdefault(name, []).append((index, part))
        owner: list[int] = []
        unit: list[float] = []
        for parts in parts_of.values():
            for lora, part in parts:
                steps = part.down.shape[0] // RANK_STEP
                owner += [lora] * steps
                unit += [part.scale] * steps
        device, dtype = _place(self._network)
        unit_scales = torch.tensor(unit, dtype=torch.float32, device=device)
        scales = torch.zeros(len(unit), dtype=torch.float32, device=device)
        strengths = [0.0] * len(loaded)
        branches: dict[str, LowRankBranches] = {}
        offset = 0
        for name, parts in parts_of.items():
            slices, start = [], 0
            for lora, part in parts:
                slices.append(BranchSlice(lora, start, start + part.down.shape[0]))
                start += part.down.shape[0]
            branches[name] = LowRankBranches(
                proj_down=torch.cat([part.down for _, part in parts]).T.contiguous().to(device, dtype),
                proj_up=torch.cat([part.up for _, part in parts], dim=1).contiguous().to(device, dtype),
                scales=scales[offset : offset + start // RANK_STEP],
                slices=tuple(slices),
                strengths=strengths,
                bias_delta=_bias_rows(parts, self._linear(name).out_features, device, dtype),
            )
            offset += start // RANK_STEP
        # everything that can fail has been done: the network carries the new stack whole, or the old one
        for name, module in self._network.named_modules():
            if isinstance(module, BranchedLinear):
                module.branches = branches.get(name)
        self._owner = torch.tensor(owner, dtype=torch.int64)
        self._scales, self._unit_scales, self._strengths = scales, unit_scales, strengths


def _stack_rows(items: list[tuple[LoraTarget, _Part]], out_features: int, in_features: int) -> _Part:
    """One LoRA's modules of one linear (q, k and v, say) -> one part over all its rows, rank padded to 16.

    Modules that share one factor down share its ranks; others get ranks of their own, zero elsewhere.
    """
    scale = max((part.scale for _, part in items), key=abs)
    shared = all(torch.equal(part.down, items[0][1].down) and part.scale == scale for _, part in items)
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    bias: Tensor | None = None
    for target, part in items:
        rows = slice(*target.rows)
        # 1 in every file seen so far: trainers write one alpha for all; else the scale per 16 ranks could not serve
        relative = part.scale / scale if scale else 0.0
        up = torch.zeros(out_features, part.up.shape[1])
        up[rows] = part.up * relative
        if shared and ups:
            ups[0] = ups[0] + up
        else:
            downs.append(part.down)
            ups.append(up)
        if part.bias is not None:
            bias = torch.zeros(out_features) if bias is None else bias
            bias[rows] = part.bias
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    padding = -down.shape[0] % RANK_STEP
    down = torch.cat([down, torch.zeros(padding, in_features)])
    up = torch.cat([up, torch.zeros(out_features, padding)], dim=1)
    return _Part(down, up, scale, bias)


def _bias_rows(
    parts: list[tuple[int, _Part]], out_features: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    if all(part.bias is None for _, part in parts):
        return None
    rows = [torch.zeros(out_features) if part.bias is None else part.bias for _, part in parts]
    return torch.stack(rows).to(device, dtype)


def _check_ranks(loaded: list[_Loaded]) -> None:
    ranks: dict[str, int] = {}
    for item in loaded:
        for name, part in item.parts.items():
            ranks[name] = ranks.get(name, 0) + part.down.shape[0]
    widest = max(ranks.values(), default=0)
    if widest > MAX_RANK:
        raise bad_file(
            f"These LoRAs together have rank {widest} in one layer; {MAX_RANK} is the most.",
            "Switch one of them off.",
        )


def _finite(file: SafetensorsFile, key: str) -> Tensor:
    tensor = file.read(key).float()
    if not bool(torch.isfinite(tensor).all()):
        raise file.fault(key, "expected finite numbers, it holds others")
    return tensor


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _place(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = network.get_submodule("image_in").weight
    assert isinstance(weight, Tensor)
    return weight.device, weight.dtype


def _identity(path: str) -> tuple[str, int, int]:
    """A file as it is now: replaced on disk, it is another one."""
    try:
        stat = Path(path).stat()
    except OSError:
        return path, -1, -1
    return path, stat.st_size, stat.st_mtime_ns
