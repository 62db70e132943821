"""Run the 16-bit network on sample prompts, one block in memory at a time, and keep some inputs of every linear.

Letters: S samples (a prompt at a noise level), T text tokens, I image tokens, C hidden size, K width of a linear.
The hidden states of all samples stay on the host between blocks; each block is loaded once for the walk to every
noise level and once to look at its linears, and moves the states on with its own 16-bit weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.checkpoints.key_maps.flux import LinearNames, NormNames
from engine.checkpoints.safetensors_file import SafetensorsFile
from engine.families.flux import FluxReader, linears_of, norms_of
from engine.layers.linear import Linear
from engine.models.flux import DoubleBlock, Flux, FluxConfig, FluxState, SingleBlock
from engine.quantizer.prompts import EmbeddedPrompts
from engine.quantizer.quantize_layer import Rows
from engine.sampling.sigmas import Shift, shifted_sigmas

Block = DoubleBlock | SingleBlock
Check = Callable[[], None]  # called between small pieces of work; raises to stop
BATCH_TOKENS = 4096
MODULATION_LEVELS = 24  # noise levels a prompt at which modulations are looked at; they cost no pass


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much is looked at. Rows are per linear."""

    prompts: int = 32
    held_out_prompts: int = 8
    timesteps: int = 4
    rows: int = 4096
    held_out_rows: int = 1024


class BlockStream:
    """A 16-bit checkpoint as a network of which only one block, and what is around the blocks, is in memory."""

    def __init__(self, file: SafetensorsFile, config: FluxConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Checks every name, shape and type before a tensor is read. Raises ProblemError."""
        with torch.device("meta"):
            self.network = Flux(config).eval().requires_grad_(False)
        self.config, self.device, self.dtype = config, device, dtype
        self._reader = FluxReader(file, self.network, "w4a16", device, dtype)
        self._reader.check_all()
        for names in linears_of(config):
            if names.kind == "plain":
                self._reader.fill(names)

    @property
    def num_blocks(self) -> int:
        return self.config.num_layers + self.config.num_single_layers

    @property
    def block_sizes(self) -> list[float]:
        """Parameters of each block, relative to the largest."""
        blocks = [self.network.get_submodule(self.name(index)) for index in range(self.num_blocks)]
        sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
        return [size / max(sizes) for size in sizes]

    def name(self, index: int) -> str:
        """Of block `index`, in the order data flows."""
        doubles = self.config.num_layers
        return f"double_blocks.{index}" if index < doubles else f"single_blocks.{index - doubles}"

    def linears(self, index: int) -> list[LinearNames]:
        return [names for names in linears_of(self.config) if names.name.startswith(f"{self.name(index)}.")]

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Block `index` with its weights, which are dropped at the end."""
        prefix = f"{self.name(index)}."
        layers: list[LinearNames | NormNames] = [*linears_of(self.config), *norms_of(self.config)]
        block = self.network.get_submodule(self.name(index))
        assert isinstance(block, DoubleBlock | SingleBlock)
        try:
            for names in layers:
                if names.name.startswith(prefix):
                    self._reader.fill(names)
            yield block
        finally:
            block.to("meta")


@dataclass(eq=False)
class Samples:
    """What runs through the blocks, of all samples, on the host: text (S, T, C), image (S, I, C)."""

    text: Tensor
    image: Tensor
    conditioning: Tensor  # (S, C)
    table: tuple[Tensor, Tensor]  # rotary cos and sin, (T + I, D / 2), on the device


class Calibration:
    """Sample prompts at several noise levels, and what the network makes of them.

    The first `amounts.prompts` of `prompts` are looked at, the others held out. Everything random comes from `seed`
    and a name, so that a run that was stopped and went on gives the same file.
    """

    def __init__(
        self,
        stream: BlockStream,
        prompts: EmbeddedPrompts,
        amounts: Amounts,
        image_tokens: tuple[int, int],
        shift: Shift,
        guidance: float | None,
        seed: int,
    ) -> None:
        """image_tokens: rows and columns of packed latents."""
        self._stream, self._prompts, self._amounts, self._seed = stream, prompts, amounts, seed
        self._height, self._width = image_tokens
        self._guidance = guidance if stream.config.guidance_embeds else None
        self._levels = self._noise_levels(shift)  # (timesteps, P)
        self._latents: list[Tensor] = []  # of each timestep, (P, I, in_channels)
        self._samples: Samples | None = None

    @property
    def num_samples(self) -> int:
        return self._levels.numel()

    @property
    def passes_of_step(self) -> float:
        """One timestep's samples through a block, in passes of as many rows as are kept of a linear."""
        tokens = self._prompts.text.shape[1] + self._height * self._width
        return self._levels.shape[1] * tokens / self._amounts.rows

    @property
    def num_walk_passes(self) -> int:
        """Passes of one timestep's samples through all blocks before the linears are looked at."""
        return len(self._levels) - 1

    def walk(self, check: Check) -> Iterator[str]:
        """Denoise with the 16-bit network to get the latents it meets at each noise level; yields after a block."""
        num_prompts = self._levels.shape[1]
        channels = self._stream.config.in_channels
        latents = torch.randn(
            num_prompts, self._height * self._width, channels, generator=self._generator("latents")
        )
        self._latents = [latents]
        for step in range(self.num_walk_passes):
            now, after = self._levels[step], self._levels[step + 1]
            samples = self._begin(latents, self._prompts.text, self._prompts.pooled, now, check)
            for index in range(self._stream.num_blocks):
                with self._stream.block(index) as block:
                    self._advance(block, samples, check)
                yield f"Drawing sample pictures, step {step + 1} of {self.num_walk_passes}"
            velocity = self._end(samples)
            latents = latents + (after - now)[:, None, None] * velocity[..., :channels]
            self._latents.append(latents)

    def look_at(self, index: int, block: Block, inputs: Sequence[str], check: Check) -> dict[str, Rows]:
        """Rows of the inputs of the linears `inputs` (their names), while all samples pass through the block.

        Blocks are looked at in their order, each once.
        """
        if index == 0:
            steps = len(self._levels)
            self._samples = self._begin(
                torch.cat(self._latents),
                self._prompts.text.repeat(steps, 1, 1),
                self._prompts.pooled.repeat(steps, 1),
                self._levels.flatten(),
                check,
            )
            self._latents = []
        assert self._samples is not None
        prompts = self._levels.shape[1]
        is_held_out = torch.arange(self.num_samples) % prompts >= self._amounts.prompts
        keepers = {name: _RowKeeper(is_held_out, self._amounts, self._generator(name)) for name in inputs}
        modules: dict[str, nn.Module] = {name: self._stream.network.get_submodule(name) for name in inputs}
        handles = [modules[name].register_forward_pre_hook(keeper.see) for name, keeper in keepers.items()]
        try:
            self._advance(block, self._samples, check)
        finally:
            for handle in handles:
                handle.remove()
        return {name: keeper.rows() for name, keeper in keepers.items()}

    def conditionings(self, check: Check) -> Rows:
        """What modulations read (rows, C): every prompt at many noise levels, held-out prompts between them."""
        count = self._amounts.prompts
        sets = []
        for prompts, levels in (
            (slice(0, count), (torch.arange(MODULATION_LEVELS) + 0.5) / MODULATION_LEVELS),
            (slice(count, None), torch.linspace(0.03, 1.0, 7)),
        ):
            pooled = self._prompts.pooled[prompts].repeat(len(levels), 1)
            sigma = levels.repeat_interleave(len(pooled) // len(levels))
            nothing = torch.zeros(len(pooled), 1, 1)
            latents = nothing.expand(-1, -1, self._stream.config.in_channels)
            text = nothing.expand(-1, -1, self._stream.config.joint_attention_dim)
            samples = self._begin(latents, text, pooled, sigma, check, ids=torch.zeros(1, 3))
            sets.append(samples.conditioning.float().to(self._stream.device))
        calibration, held_out = sets
        return Rows(calibration, held_out)

    def _noise_levels(self, shift: Shift) -> Tensor:
        """(timesteps, P): every prompt starts at 1; later levels differ from prompt to prompt, to cover all."""
        steps, prompts = self._amounts.timesteps, len(self._prompts.text)
        levels = torch.ones(steps, prompts)
        offsets = torch.rand(prompts, generator=self._generator("levels"))
        fine = 1000  # one shifted schedule, fine enough to read any level from
        schedule = torch.tensor(shifted_sigmas(fine, shift, self._height * self._width))
        for step in range(1, steps):
            place = (step - 0.5 + offsets) / steps * fine  # around step / steps of the way
            levels[step] = schedule[place.long().clamp(1, fine - 1)]
        return levels

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))

    @torch.inference_mode()
    def _begin(
        self, latents: Tensor, text: Tensor, pooled: Tensor, sigma: Tensor, check: Check, ids: Tensor | None = None
    ) -> Samples:
        stream, parts = self._stream, []
        if ids is None:
            ids = torch.zeros(self._height, self._width, 3)
            ids[..., 1] = torch.arange(self._height)[:, None]
            ids[..., 2] = torch.arange(self._width)
            ids = ids.view(-1, 3)
        for batch in self._batches(len(latents), text.shape[1] + latents.shape[1]):
            check()
            one = sigma[batch].to(stream.device)
            state = stream.network.begin(
                latents[batch].to(stream.device, stream.dtype),
                text[batch].to(stream.device, stream.dtype),
                pooled[batch].to(stream.device, stream.dtype),
                one,
                None if self._guidance is None else torch.full_like(one, self._guidance),
                ids.to(stream.device),
                torch.zeros(text.shape[1], 3, device=stream.device),
            )
            parts.append((state.text.cpu(), state.image.cpu(), state.conditioning.cpu()))
        hidden_text, image, conditioning = (torch.cat(part) for part in zip(*parts, strict=True))
        return Samples(hidden_text, image, conditioning, state.table)

    @torch.inference_mode()
    def _advance(self, block: Block, samples: Samples, check: Check) -> None:
        device = self._stream.device
        for batch in self._batches(len(samples.text), samples.text.shape[1] + samples.image.shape[1]):
            check()
            text, image = block(
                samples.text[batch].to(device),
                samples.image[batch].to(device),
                samples.conditioning[batch].to(device),
                samples.table,
            )
            samples.text[batch], samples.image[batch] = text.cpu(), image.cpu()

    @torch.inference_mode()
    def _end(self, samples: Samples) -> Tensor:
        """(S, I, out_channels) fp32 on the CPU."""
        device = self._stream.device
        parts = []
        for batch in self._batches(len(samples.text), samples.image.shape[1]):
            image, conditioning = samples.image[batch].to(device), samples.conditioning[batch].to(device)
            state = (samples.text[batch].to(device), image, conditioning, samples.table)
            parts.append(self._stream.network.end(FluxState(*state)).float().cpu())
        return torch.cat(parts)

    @staticmethod
    def _batches(count: int, tokens: int) -> list[slice]:
        size = max(1, BATCH_TOKENS // tokens)
        return [slice(start, start + size) for start in range(0, count, size)]


class _RowKeeper:
    """Keeps a seeded choice of tokens of every sample that passes a linear."""

    def __init__(self, is_held_out: Tensor, amounts: Amounts, generator: torch.Generator) -> None:
        self._is_held_out, self._generator = is_held_out, generator
        held_out = int(is_held_out.sum())
        self._most = {
            False: max(1, amounts.rows // (len(is_held_out) - held_out)),
            True: max(1, amounts.held_out_rows // held_out),
        }
        self._kept: dict[bool, list[Tensor]] = {False: [], True: []}
        self._sample = 0

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for tokens in inputs[0]:  # (L, K) of each sample
            held_out = bool(self._is_held_out[self._sample])
            chosen = torch.randperm(len(tokens), generator=self._generator)[: self._most[held_out]]
            self._kept[held_out].append(tokens[chosen.to(tokens.device)].float())
            self._sample += 1

    def rows(self) -> Rows:
        return Rows(torch.cat(self._kept[False]).clone(), torch.cat(self._kept[True]).clone())


def made_up_rows(width: int, after_gelu: bool, device: torch.device, count: int = 512) -> Rows:
    """Normal numbers in place of activations, for the errors of a data-free run; behind a GELU what it makes of
    them."""
    x = torch.randn(2 * count, width, generator=torch.Generator().manual_seed(width)).to(device)
    x = nn.functional.gelu(x, approximate="tanh") if after_gelu else x
    return Rows(x[:count], x[count:], is_real=False)


def weights_of(stream: BlockStream, names: LinearNames) -> tuple[Tensor, Tensor | None]:
    """Weight (N, K) and bias (N,) fp32 of a linear of the block that is loaded."""
    layer = stream.network.get_submodule(names.name)
    assert isinstance(layer, Linear)
    return layer.weight.detach().float(), None if layer.bias is None else layer.bias.detach().float()
