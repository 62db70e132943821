"""The LoRA stack of a network: several files at once, each with a live strength, never merged.

Reads diffusers' and PEFT's key format (`transformer.<module>.lora_A.weight`, Hu et al. 2021). Factors are stacked
along rank beside each linear; one buffer for the whole network holds one fp32 scale per 16 ranks. Changing a
strength writes that buffer and nothing else; adding or removing a file makes a new layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoints.safetensors_file import SafetensorsFile, open_safetensors
from engine.families.flux import LoraTarget, lora_targets
from engine.layers.fused_linear import FusedLinear, Layout, side_by_side
from engine.layers.linear import RANK_STEP, BranchedLinear, BranchSlice, LowRankBranches
from engine.models.flux import Flux
from engine.problems import bad_file

MAX_RANK = 1024  # of all LoRAs of one linear together; where a kernel adds them, with the layer's own ranks
NOBODY = -1
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
        self._slots = _Slots.of([], [], 0, _place(network)[0])
        self._biases: list[_LiveBias] = []
        self._layouts = 0

    @property
    def layout(self) -> int:
        """Another number for every set of files: what runs on which memory. Strengths do not change it."""
        return self._layouts

    def set(self, loras: Sequence[tuple[str, float]]) -> list[LoraReport]:
        """Make the network carry exactly these (file, strength) pairs, in this order.

        The same files in the same order only get new strengths. Raises ProblemError for a file that is damaged or
        whose ranks do not fit; the network then carries what it carried before.
        """
        files = tuple(_identity(path) for path, _ in loras)
        strengths = [float(strength) for _, strength in loras]
        if files != self._files:
            loaded = [self._read(path) for path, _ in loras]
            self._check_ranks(loaded)
            self._lay_out(loaded)
            self._files, self._loaded = files, loaded
        self._slots.write(strengths)
        for bias in self._biases:
            bias.write(strengths)
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

    def _check_ranks(self, loaded: list[_Loaded]) -> None:
        ranks: Counter[str] = Counter()
        for item in loaded:
            ranks.update({name: part.down.shape[0] for name, part in item.parts.items()})
        for name, rank in ranks.items():
            most = MAX_RANK - _own_rank(self._linear(name))
            if rank > most:
                raise bad_file(
                    f"These LoRAs together have rank {rank} in one layer; {most} is the most.",
                    "Switch one of them off.",
                )

    def _groups(self) -> Iterator[list[str]]:
        """The network's linears, those together whose input is quantized once for all of them."""
        groups: dict[object, list[str]] = {}
        for name, module in self._network.named_modules():
            if isinstance(module, BranchedLinear):
                key = module.own_layout.target if isinstance(module, FusedLinear) else module
                groups.setdefault(key, []).append(name)
        yield from groups.values()

    def _lay_out(self, loaded: list[_Loaded]) -> None:
        """Give every linear its stacked factors, and each 16 ranks a slot in the one buffer of scales."""
        parts_of: dict[str, list[tuple[int, _Part]]] = {}
        for index, item in enumerate(loaded):
            for name, part in item.parts.items():
                parts_of.setdefault(name, []).append((index, part))
        groups = [group for group in self._groups() if any(name in parts_of for name in group)]
        device, dtype = _place(self._network)
        owners: list[int] = []
        unit: list[float] = []
        starts: dict[str, int] = {}
        for name in (name for group in groups for name in group):
            starts[name] = len(owners)
            own = _own_rank(self._linear(name)) // RANK_STEP
            owners += [NOBODY] * own
            unit += [1.0] * own
            for lora, part in parts_of.get(name, []):
                steps = part.down.shape[0] // RANK_STEP
                owners += [lora] * steps
                unit += [part.scale] * steps
        slots = _Slots.of(owners, unit, len(loaded), device)
        branches = {
            name: self._branches(name, parts, slots, starts[name], device, dtype)
            for name, parts in parts_of.items()
        }
        layouts: dict[str, Layout] = {}
        biases: list[_LiveBias] = []
        for group in groups:
            fused = [linear for name in group if isinstance(linear := self._linear(name), FusedLinear)]
            if fused:
                steps = sum(
                    linear.rank + _rank_of(branches.get(name)) for linear, name in zip(fused, group, strict=True)
                )
                scales = slots.scales[starts[group[0]] :][: steps // RANK_STEP]
                made = side_by_side(fused, [branches.get(name) for name in group], scales)
                layouts.update(zip(group, made, strict=True))
        for name, layout in layouts.items():
            branch = branches.pop(name, None)
            if branch is not None and branch.bias_delta is not None:
                bias = _LiveBias.over(layout.linear.bias, branch)
                biases.append(bias)
                layouts[name] = replace(layout, linear=replace(layout.linear, bias=bias.live))
        # everything that can fail has been done: the network carries the new stack whole, or the old one
        for name, module in self._network.named_modules():
            if isinstance(module, FusedLinear):
                module.layout = layouts.get(name, module.own_layout)
            elif isinstance(module, BranchedLinear):
                module.branches = branches.get(name)
        self._slots, self._biases = slots, biases
        self._layouts += 1

    def _branches(
        self,
        name: str,
        parts: list[tuple[int, _Part]],
        slots: _Slots,
        start: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> LowRankBranches:
        """All LoRAs of one linear; `start` is the linear's first slot."""
        slices, rank, linear = [], 0, self._linear(name)
        for lora, part in parts:
            slices.append(BranchSlice(lora, rank, rank + part.down.shape[0]))
            rank += part.down.shape[0]
        start += _own_rank(linear) // RANK_STEP
        return LowRankBranches(
            proj_down=torch.cat([part.down for _, part in parts]).T.contiguous().to(device, dtype),
            proj_up=torch.cat([part.up for _, part in parts], dim=1).contiguous().to(device, dtype),
            scales=slots.scales[start : start + rank // RANK_STEP],
            slices=tuple(slices),
            strengths=slots.strengths,
            strengths_there=slots.strengths_there,
            bias_delta=_bias_rows(parts, linear.out_features, device, dtype),
        )


@dataclass(frozen=True, eq=False)
class _Slots:
    """A network's buffer of scales, one for each 16 ranks of a linear that carries LoRAs; its own ranks count 1."""

    scales: Tensor  # (S,) fp32, on the network's device: what kernels and branches read
    unit: Tensor  # (S,) alpha / rank
    owners: Tensor  # (S,) which LoRA, on the host; NOBODY for a layer's own ranks
    strengths: list[float]
    strengths_there: Tensor  # the same (L,) fp32 on the device

    @classmethod
    def of(cls, owners: list[int], unit: list[float], num_loras: int, device: torch.device) -> _Slots:
        return cls(
            torch.zeros(len(unit), device=device),
            torch.tensor(unit, dtype=torch.float32, device=device),
            torch.tensor(owners, dtype=torch.int64),
            [0.0] * num_loras,
            torch.zeros(num_loras, device=device),
        )

    def write(self, strengths: list[float]) -> None:
        """In place, so that whoever holds a view, a CUDA graph too, goes on with the new ones."""
        self.strengths[:] = strengths
        if self.owners.numel():
            each = torch.tensor([*strengths, 1.0])  # the last one is NOBODY's
            self.scales.copy_(each[self.owners].to(self.scales.device) * self.unit)
            self.strengths_there.copy_(each[:-1])


@dataclass(frozen=True, eq=False)
class _LiveBias:
    """The bias of a fused linear with those of its LoRAs added, at their strengths."""

    live: Tensor  # (N,) fp32, what the kernel reads
    base: Tensor  # (N,) fp32
    deltas: Tensor  # (L, N), one row for each of `loras`
    loras: tuple[int, ...]

    @classmethod
    def over(cls, base: Tensor | None, branches: LowRankBranches) -> _LiveBias:
        assert branches.bias_delta is not None
        deltas = branches.bias_delta.float()
        base = torch.zeros_like(deltas[0]) if base is None else base
        return cls(base.clone(), base, deltas, tuple(one.lora for one in branches.slices))

    def write(self, strengths: list[float]) -> None:
        self.live.copy_(self.base)
        for lora, delta in zip(self.loras, self.deltas, strict=True):
            if strengths[lora] != 0:
                self.live.add_(delta, alpha=strengths[lora])


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


def _own_rank(linear: BranchedLinear) -> int:
    """Ranks of the model's own that share the buffer with those of LoRAs."""
    return linear.rank if isinstance(linear, FusedLinear) else 0


def _rank_of(branches: LowRankBranches | None) -> int:
    return 0 if branches is None else branches.proj_down.shape[1]


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
