"""The "3D look": a LoRA (Hu et al. 2021) trained on the distilled network, which itself stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.families.flux import linears_of
from engine.layers.linear import BranchedLinear, Linear
from engine.models.flux import Flux
from recipe.dataset import Catalogue
from recipe.evaluate import Evaluation
from recipe.flow import Stage, flow_loss
from recipe.latents import LatentStore
from recipe.optimisers import Countdown, warm_stable_decay
from recipe.palette import FLAT, THREE_D
from recipe.prompted_flux import PromptedFlux, load_model
from recipe.rasteriser import SceneBatch
from recipe.waiting import wait_for

LEARNING_RATE = 1.5e-3
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class TrainableLora(BranchedLinear):
    """base(x) + strength * up(down(x)). down (R, K), up (N, R); starts as no change."""

    def __init__(self, linear: Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.linear = linear
        device = linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, device=device) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        self.register_buffer("strength", torch.ones((), device=device))

    def base(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + self.get_buffer("strength") * F.linear(F.linear(x, self.down), self.up)


def attach(network: Flux, rank: int) -> dict[str, TrainableLora]:
    """Put a LoRA on every projection of every block. Two linears that are one in files get half the rank each."""
    branches: dict[str, TrainableLora] = {}
    for names in linears_of(network.config):
        if names.kind != "quantized":
            continue
        linear = network.get_submodule(names.name)
        assert isinstance(linear, Linear)
        branch = TrainableLora(linear, rank if names.columns is None else rank // 2)
        parent, _, child = names.name.rpartition(".")
        setattr(network.get_submodule(parent), child, branch)
        branches[names.name] = branch
    return branches


@torch.no_grad()
def lora_state(network: Flux, branches: dict[str, TrainableLora]) -> dict[str, Tensor]:
    """The factors by diffusers' names, bf16: `transformer.<module>.lora_A.weight` (R, K), `lora_B` (N, R).

    q, k and v share their `down`. The two halves of a single block's projection become one pair of twice the rank,
    whose `down` is zero where the other half's columns are.
    """
    state: dict[str, Tensor] = {}
    halves: dict[str, list[tuple[tuple[int, int], TrainableLora]]] = {}
    for names in linears_of(network.config):
        if names.name not in branches:
            continue
        branch = branches[names.name]
        if names.columns is not None:
            halves.setdefault(names.modules[0], []).append((names.columns, branch))
            continue
        for module, up in zip(names.modules, branch.up.chunk(len(names.modules)), strict=True):
            state[f"transformer.{module}.lora_A.weight"] = branch.down.bfloat16().clone()
            state[f"transformer.{module}.lora_B.weight"] = up.bfloat16().contiguous()
    for module, parts in halves.items():
        width = max(stop for (_, stop), _ in parts)
        downs = [F.pad(b.down, (start, width - stop)) for (start, stop), b in parts]
        state[f"transformer.{module}.lora_A.weight"] = torch.cat(downs).bfloat16()
        state[f"transformer.{module}.lora_B.weight"] = torch.cat([b.up for _, b in parts], 1).bfloat16()
    return state


def save_lora(state: dict[str, Tensor], path: Path) -> None:
    save_file({key: tensor.cpu() for key, tensor in state.items()}, str(path), metadata={"format": "pt"})


def paired_rows(catalogue: Catalogue, scenes: SceneBatch) -> tuple[Tensor, SceneBatch]:
    """For every row of the bank its row in 3D; and the scenes in which everything has one."""
    device = scenes.rows.device
    rows = torch.full((len(catalogue.rows),), -1, dtype=scenes.rows.dtype, device=device)
    for (style, key, detail), row in catalogue.rows.items():
        if style == "dots":
            rows[row] = row
        elif style == FLAT and detail is None and (THREE_D, key, None) in catalogue.rows:
            rows[row] = catalogue.rows[THREE_D, key, None]
    fits = ((scenes.rows < 0) | (rows[scenes.rows.clamp(min=0).long()] >= 0)).all(1)
    return rows, scenes.at(fits.nonzero()[:, 0])


def train_lora(
    stage: Stage, model: PromptedFlux, catalogue: Catalogue, evaluation: Evaluation, base: str, give_up: float
) -> None:
    """Train until `stage.until` on BASE.pt; writes lora_BASE.safetensors, .json and a sheet by strength."""
    settings, device = stage.settings, stage.device
    torch.manual_seed(4)
    rows, scenes = paired_rows(catalogue, stage.scenes)
    model.requires_grad_(False)
    branches = attach(model.flux, settings.lora_rank)
    trained = [p for branch in branches.values() for p in (branch.down, branch.up)]
    if device.type == "cuda":
        model.compile_blocks(with_text=False)
    length = (settings.picture_px // 16) ** 2
    tokens = torch.randint(3, 99, (settings.batch, 32), device=device)
    flow_loss(model, torch.randn(settings.batch, length, 64, device=device), tokens).backward()
    for p in trained:
        p.grad = None
    store = LatentStore(stage.autoencoder, stage.bank, scenes, settings.picture_px, settings.ring // 4, rows)
    store.fill(len(store.latents) // 4, settings.batch)
    print(f"lora: ready, {sum(p.numel() for p in trained) / 1e6:.2f} M parameters", flush=True)
    wait_for(stage.work / f"{base}.pt", give_up)
    load_below(model, stage.work / f"{base}.pt", branches)
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    countdown = Countdown(stage.until)
    for done in countdown:
        if countdown.steps % settings.reuse == 0:
            store.renew(settings.batch)
        loss = flow_loss(model, *store.sample(settings.batch), dropped=0.0)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * warm_stable_decay(done, 0.03, 0.5)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if countdown.steps % 100 == 0:
            print(f"lora: step {countdown.steps} loss {loss.item():.4f} {countdown.elapsed_s:.0f} s", flush=True)
    save_lora(lora_state(model.flux, branches), stage.work / f"lora_{base}.safetensors")

    def set_strength(strength: float) -> None:
        for branch in branches.values():
            branch.get_buffer("strength").fill_(strength)

    report = evaluation.by_strength(
        model, stage.autoencoder, set_strength, STRENGTHS, stage.work / f"lora_{base}.png"
    )
    (stage.work / f"lora_{base}.json").write_text(json.dumps({"steps": countdown.steps, "by_strength": report}))
    print("lora:", json.dumps(report), flush=True)


def load_below(model: PromptedFlux, path: Path, branches: dict[str, TrainableLora]) -> None:
    """Load weights into a network whose linears already sit inside LoRA branches."""
    plain = PromptedFlux(model.settings, model.text)
    load_model(plain, path)
    below = {f"{name}.": f"{name}.linear." for name in branches}
    state = {}
    for key, tensor in plain.flux.state_dict().items():
        owner = key.rpartition(".")[0] + "."
        state[key.replace(owner, below.get(owner, owner), 1)] = tensor
    missing = model.flux.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
