"""FLUX.1: how its files become a network, and which linears a LoRA may touch.

Reads public SVDQuant files (both spellings, int4 and nvfp4) and 16-bit files with diffusers' names. Names, shapes
and types are compared with what the network needs before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.checkpoints.key_maps.flux import LinearNames, NormNames, flux_linears, flux_norms
from engine.checkpoints.safetensors_file import SafetensorsFile
from engine.checkpoints.svdquant_file import (
    check_svdquant_linear,
    check_w4a16,
    read_svdquant_linear,
    read_w4a16,
)
from engine.jit import arch_of
from engine.layers.fused_linear import FusedLinear, fits_kernels
from engine.layers.linear import BranchedLinear, Linear
from engine.layers.norms import RMSNorm
from engine.layers.svdquant_linear import LayerPlan, PackedLinear, SVDQuantLinear, W4A16Linear
from engine.models.flux import Flux, FluxConfig, scale_splits
from engine.problems import bad_file

FAMILY = "flux"
FileKind = Literal["svdquant", "transformer"]
HALF_OR_FLOAT = (torch.bfloat16, torch.float16, torch.float32)
GET_IT_AGAIN = "Get the file again from where it came."


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """Where a LoRA of one diffusers module goes: rows of one of our linears, columns of the module's input."""

    name: str  # our linear
    rows: tuple[int, int]
    columns: tuple[int, int]
    carries_bias: bool  # a bias delta goes to one target only


def recognise(file: SafetensorsFile) -> FileKind | None:
    """ "svdquant", "transformer" (16 bit) or None when the file is not FLUX's network."""
    keys = file.tensors.keys()
    if "x_embedder.weight" not in keys or "context_embedder.weight" not in keys:
        return None
    blocks = [key for key in keys if key.startswith(("transformer_blocks.", "single_transformer_blocks."))]
    if not blocks:
        return None
    return "svdquant" if any(key.endswith(".qweight") for key in blocks) else "transformer"


def read_config(file: SafetensorsFile) -> FluxConfig:
    """The network's sizes: from the config in the file's metadata, completed and checked by its tensors.

    Raises ProblemError for a config that is no JSON, absurd, or contradicted by the tensors.
    """
    name = file.path.name
    config = file.read_config()
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise bad_file(f"The configuration inside {name} is not a list of settings.", GET_IT_AGAIN)
    seen = _sizes_from_tensors(file)
    for field, value in seen.items():
        told = config.get(field)
        if told is not None and told != value:
            raise bad_file(
                f"{name} contradicts itself: its configuration says {field} = {str(told)[:40]}, "
                f"its tensors say {value}.",
                GET_IT_AGAIN,
            )
    return FluxConfig.from_json({**config, **seen}, name)


def _sizes_from_tensors(file: SafetensorsFile) -> dict[str, Any]:
    tensors = file.tensors

    def axis(key: str, index: int) -> int:
        info = tensors.get(key)
        if info is None or len(info.shape) <= index:
            raise bad_file(f"{file.path.name} has no tensor {key} of FLUX's network.", GET_IT_AGAIN)
        return info.shape[index]

    def count(prefix: str) -> int:
        numbers = {key.split(".")[1] for key in tensors if key.startswith(prefix)}
        if not all(number.isascii() and number.isdigit() and len(number) <= 4 for number in numbers):
            raise bad_file(f"{file.path.name} has blocks without a number: {prefix}...", GET_IT_AGAIN)
        return max((int(number) for number in numbers), default=-1) + 1

    hidden = axis("x_embedder.weight", 0)
    norms = [key for key in tensors if key.endswith(("norm_q.weight", "norm_k.weight"))]
    if not norms:
        raise bad_file(f"{file.path.name} has no norm_q.weight of FLUX's network.", GET_IT_AGAIN)
    head_dim = axis(norms[0], 0)
    if head_dim == 0 or hidden % head_dim:
        raise bad_file(
            f"{file.path.name}: x_embedder.weight has {hidden} rows; expected a multiple of {head_dim}.",
            GET_IT_AGAIN,
        )
    return {
        "in_channels": axis("x_embedder.weight", 1),
        "out_channels": axis("proj_out.weight", 0),
        "num_layers": count("transformer_blocks."),
        "num_single_layers": count("single_transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": axis("context_embedder.weight", 1),
        "pooled_projection_dim": axis("time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in tensors,
    }


def linears_of(config: FluxConfig) -> list[LinearNames]:
    return flux_linears(config.num_layers, config.num_single_layers, config.hidden_size, config.guidance_embeds)


def norms_of(config: FluxConfig) -> list[NormNames]:
    return flux_norms(config.num_layers, config.num_single_layers)


def load_flux(
    file: SafetensorsFile,
    plan: LayerPlan = "w4a16",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[float], None] | None = None,
    fused: bool | None = None,
) -> Flux:
    """Read FLUX's network from an SVDQuant or a 16-bit file, each quantized linear by `plan`.

    on_progress is called with a fraction 0 .. 1 before each layer and may raise to stop. fused: whether 4-bit
    layers run through kernels; None: on a card they do. The network is in eval mode and needs no gradients.
    Raises ProblemError naming the file, the tensor and what was expected.
    """
    reader = _checked_reader(file, plan, torch.device(device), dtype, fused)
    network, config = reader.network, reader.network.config
    layers: list[LinearNames | NormNames] = [*linears_of(config), *norms_of(config)]
    for index, names in enumerate(layers):
        if on_progress is not None:
            on_progress(index / len(layers))
        reader.fill(names)
    network.join_linears()
    if on_progress is not None:
        on_progress(1.0)
    return network.requires_grad_(False).eval()


def check_flux(file: SafetensorsFile) -> FluxConfig:
    """Everything that load_flux checks before it reads a tensor. Raises ProblemError as that does."""
    return _checked_reader(file, "w4a16", torch.device("cpu"), torch.float32).network.config


def _checked_reader(
    file: SafetensorsFile, plan: LayerPlan, device: torch.device, dtype: torch.dtype, fused: bool | None = None
) -> FluxReader:
    if recognise(file) is None:
        raise bad_file(f"{file.path.name} does not hold FLUX's network.", "Choose a FLUX checkpoint.")
    with torch.device("meta"):
        network = Flux(read_config(file))
    reader = FluxReader(file, network, plan, device, dtype, fused)
    reader.check_all()
    return reader


class FluxReader:
    """Reads one layer after the other from a file, whichever way the file stores it, into a network on meta."""

    def __init__(
        self,
        file: SafetensorsFile,
        network: Flux,
        plan: LayerPlan,
        device: torch.device,
        dtype: torch.dtype,
        fused: bool | None = None,
    ) -> None:
        self.file, self.network, self.plan, self.device, self.dtype = file, network, plan, device, dtype
        on_card = device.type == "cuda"
        self._arch = arch_of(*torch.cuda.get_device_capability(device)) if on_card else None
        self._fused = on_card if fused is None else fused

    def check_all(self) -> None:
        """Compare the header with what the network needs; no tensor is read. Raises ProblemError."""
        for linear in linears_of(self.network.config):
            self.check(linear)
        for norm in norms_of(self.network.config):
            self.check_norm(norm)

    def fill(self, names: LinearNames | NormNames) -> None:
        """Give one layer of the network its weights, on the device."""
        if isinstance(names, LinearNames):
            _exchange(self.network, names.name, self.linear(names))
            return
        module = self.network.get_submodule(names.name)
        assert isinstance(module, RMSNorm)
        module.weight = nn.Parameter(self.norm(names), requires_grad=False)

    def _meta(self, names: LinearNames) -> Linear:
        module = self.network.get_submodule(names.name)
        assert isinstance(module, Linear)
        return module

    def _prefix(self, names: LinearNames) -> str | None:
        """The prefix of a 4-bit layer in this file, or None where the layer is stored in 16 bit."""
        for prefix in (names.public, names.public_v2):
            if prefix and f"{prefix}.qweight" in self.file.tensors:
                return prefix
        return None

    def check(self, names: LinearNames) -> None:
        """Compare the header with what the network needs; no tensor is read."""
        meta, prefix = self._meta(names), self._prefix(names)
        if prefix is not None and names.kind == "modulation":
            header = check_w4a16(self.file, prefix, splits=names.splits)
            found, expected = (header.out_features, header.in_features), (meta.out_features, meta.in_features)
            if found != expected:
                raise self.file.fault(f"{prefix}.qweight", f"expected a layer of {expected}, found {found}")
            if "bias" not in header.names:
                raise self.file.fault(f"{prefix}.bias", "expected this tensor, it is missing")
        elif prefix is not None:
            check_svdquant_linear(self.file, prefix, out_features=meta.out_features, in_features=meta.in_features)
        else:
            self._check_dense(names, meta)

    def _check_dense(self, names: LinearNames, meta: Linear) -> None:
        rows = meta.out_features // len(names.modules)
        for module in names.modules:
            width = names.of_columns or meta.in_features
            self._expect(f"{module}.weight", (rows, width))
            if names.has_bias:
                self._expect(f"{module}.bias", (rows,))

    def _expect(self, key: str, shape: tuple[int, ...]) -> None:
        info = self.file.info(key)
        if info.shape != shape:
            raise self.file.fault(key, f"expected the shape {list(shape)}, it is {list(info.shape)}")
        if info.dtype not in HALF_OR_FLOAT and not (
            info.dtype == torch.int8 and f"{key}_scale" in self.file.tensors
        ):
            raise self.file.fault(key, f"expected numbers of 16 or 32 bits, it holds {info.dtype}")

    def linear(self, names: LinearNames) -> BranchedLinear:
        """One linear of the network, 4-bit or 16-bit, on the device."""
        meta = self._meta(names)
        prefix = self._prefix(names)
        if prefix is None:
            return self._dense(names, meta)
        if names.kind == "modulation":
            w4a16 = read_w4a16(self.file, prefix, splits=names.splits, device=self.device)
            return PackedLinear(w4a16, self.dtype, self._arch) if self._fused else W4A16Linear(w4a16, self.dtype)
        weights = read_svdquant_linear(
            self.file,
            prefix,
            out_features=meta.out_features,
            in_features=meta.in_features,
            input_shift=names.input_shift if self._is_int4(prefix) else 0.0,
            device=self.device,
        )
        if self._fused and fits_kernels(weights):
            return FusedLinear(weights, self.plan, self.dtype, self._arch)
        return SVDQuantLinear(weights, "w4a16" if self._fused else self.plan, self.dtype)

    def _is_int4(self, prefix: str) -> bool:
        info = self.file.tensors.get(f"{prefix}.wscales")
        return info is not None and info.dtype in HALF_OR_FLOAT

    def _dense(self, names: LinearNames, meta: Linear) -> Linear:
        layer = Linear(1, 1, bias=False)
        layer.in_features, layer.out_features = meta.in_features, meta.out_features
        weight = torch.cat([self._weight(f"{module}.weight") for module in names.modules])
        if names.columns is not None:
            weight = weight[:, names.columns[0] : names.columns[1]].contiguous()
        layer.weight = nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)
        if meta.bias is not None:
            bias = torch.cat([self._finite(f"{module}.bias").float() for module in names.modules])
            bias = with_ones(names, bias, +1.0)
            layer.bias = nn.Parameter(bias.to(self.device, self.dtype), requires_grad=False)
        return layer

    def _weight(self, key: str) -> Tensor:
        weight = self._finite(key)
        if weight.dtype == torch.int8:
            scale = self._finite(f"{key}_scale").float()
            if tuple(scale.shape) != (weight.shape[0],):
                raise self.file.fault(f"{key}_scale", f"expected one number for each of {weight.shape[0]} rows")
            weight = weight.float() * scale[:, None]
        return weight

    def _norm_key(self, names: NormNames) -> str:
        public = f"{names.public}.weight"
        return public if public in self.file.tensors else f"{names.module}.weight"

    def check_norm(self, names: NormNames) -> None:
        self._expect(self._norm_key(names), (self.network.config.attention_head_dim,))

    def norm(self, names: NormNames) -> Tensor:
        """An RMSNorm's weight (head_dim,), always fp32."""
        return self._finite(self._norm_key(names)).to(self.device, torch.float32)

    def _finite(self, key: str) -> Tensor:
        tensor = self.file.read(key)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise self.file.fault(key, "expected finite numbers, it holds others")
        return tensor


def with_ones(names: LinearNames, bias: Tensor, one: float) -> Tensor:
    """Add `one` to the scale parts of a modulation's bias (N,): +1 on the way in, -1 on the way out."""
    if names.splits == 1:
        return bias
    parts = list(bias.float().chunk(names.splits))
    for split in scale_splits(names.splits):
        parts[split] = parts[split] + one
    return torch.cat(parts)


def _exchange(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)


def diffusers_state(network: Flux) -> dict[str, Tensor]:
    """The weights of a network whose linears are all 16- or 32-bit, by diffusers' names: what 16-bit files hold."""
    state: dict[str, Tensor] = {}
    wide: dict[str, list[Tensor]] = {}  # modules of which each of our linears holds some columns
    for names in linears_of(network.config):
        layer = network.get_submodule(names.name)
        if not isinstance(layer, Linear):
            raise ValueError(f"diffusers_state: {names.name} is quantized")
        if names.columns is not None:
            wide.setdefault(names.modules[0], []).append(layer.weight.detach())
        else:
            for module, weight in zip(names.modules, layer.weight.detach().chunk(len(names.modules)), strict=True):
                state[f"{module}.weight"] = weight.contiguous()
        if layer.bias is not None:
            bias = with_ones(names, layer.bias.detach(), -1.0)
            for module, part in zip(names.modules, bias.chunk(len(names.modules)), strict=True):
                state[f"{module}.bias"] = part.contiguous()
    for module, columns in wide.items():
        state[f"{module}.weight"] = torch.cat(columns, dim=1)
    for norm in norms_of(network.config):
        layer = network.get_submodule(norm.name)
        assert isinstance(layer, RMSNorm)
        state[f"{norm.module}.weight"] = layer.weight.detach()
    return state


def lora_targets(network: Flux) -> dict[str, list[LoraTarget]]:
    """Diffusers module name -> the parts of our linears it stands for."""
    targets: dict[str, list[LoraTarget]] = {}
    for names in linears_of(network.config):
        layer = network.get_submodule(names.name)
        assert isinstance(layer, BranchedLinear)
        rows = layer.out_features // len(names.modules)
        columns = names.columns or (0, layer.in_features)
        for index, module in enumerate(names.modules):
            target = LoraTarget(names.name, (index * rows, (index + 1) * rows), columns, names.has_bias)
            targets.setdefault(module, []).append(target)
    return targets


def stored_plans(
    file: SafetensorsFile, config: FluxConfig, plan: LayerPlan, weight_only: Collection[str] = ()
) -> dict[str, str]:
    """By which plan each linear would run, by its name in the file, 16-bit ones by the network's; from the header.

    weight_only: prefixes of layers that run w4a16 whatever the plan.
    """
    plans: dict[str, str] = {}
    for names in linears_of(config):
        prefix = next((one for one in (names.public, names.public_v2) if f"{one}.qweight" in file.tensors), None)
        if prefix is None:
            plans[names.name] = "bf16"
        else:
            plans[prefix] = "w4a16" if names.kind == "modulation" or prefix in weight_only else plan
    return plans


def plan_counts(network: Flux) -> dict[str, int]:
    """How many linears run by which plan: {"w4a16": 304, "bf16": 12}."""
    counts: dict[str, int] = {}
    for module in network.modules():
        if isinstance(module, BranchedLinear):
            match module:
                case SVDQuantLinear() | FusedLinear():
                    plan: str = module.plan
                case W4A16Linear() | PackedLinear():
                    plan = "w4a16"
                case _:
                    plan = "bf16"
            counts[plan] = counts.get(plan, 0) + 1
    return counts
