"""A bundle in memory: network, LoRAs, text encoders, VAE. Each is loaded when needed and freed by its stage."""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from engine.checkpoints.bundle import Bundle
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.safetensors_file import open_safetensors
from engine.device import Device, PlanChoice
from engine.families.flux import load_flux
from engine.layers.attention_backend import Backend
from engine.lora import LoraReport, LoraStack
from engine.memory import give_back_freed
from engine.models.flux import Flux
from engine.models.step_graph import StepGraphs
from engine.pipelines.image_decoder import Decoded, ImageDecoder
from engine.pipelines.prepare_card import Report, choose_attention, prepare_kernels
from engine.pipelines.text_to_image import Picture, step_inputs
from engine.problems import bad_file
from engine.text.clip import ClipEncoder
from engine.text.files import Check
from engine.text.prompts import PromptEmbeds, PromptMemory, TextEncoders
from engine.text.t5 import T5Encoder
from engine.text.tokenizer import PromptTokenizer

HEAVY = (
    "transformers.models.t5.modeling_t5",
    "transformers.models.clip.modeling_clip",
    "diffusers.models.autoencoders.autoencoder_kl",
)


def _nothing(what: str, fraction: float) -> None:
    pass


class LoadedModel:
    """One bundle on one device.

    keep_all: every part stays loaded (memory.plan decides). Else a stage frees what it does not need: encoders
    before the network is loaded, the network before the encoders come back.
    """

    def __init__(self, bundle: Bundle, device: Device, plan: PlanChoice, keep_all: bool) -> None:
        self.bundle = bundle
        self.device = device
        self.plan = plan
        self.keep_all = keep_all
        self.torch_device = torch.device(device.torch_name)
        self.dtype: torch.dtype = getattr(torch, device.dtype)
        self.load_seconds = 0.0
        self._network: Flux | None = None
        self._loras: LoraStack | None = None
        self._graphs: StepGraphs | None = None  # on a card
        self._prepared: set[tuple[int, int]] = set()  # layouts of LoRAs and numbers of tokens
        self._attention: dict[int, Backend] = {}  # by number of tokens
        self._choices: tuple[tuple[str, float], ...] = ()
        self._encoders: TextEncoders | None = None
        self._decoder: ImageDecoder | None = None
        self._prompts = PromptMemory()

    @property
    def has_loras(self) -> bool:
        return bool(self._choices)

    def load(self, report: Report = _nothing) -> None:
        """Read every part, or where parts take turns the network alone. Raises ProblemError."""
        started = perf_counter()
        name = self.bundle.card.name
        imports = threading.Thread(target=_import_heavy, name="imports", daemon=True)
        imports.start()  # seconds of Python imports, beside the reading of gigabytes
        network_share = 0.6 if self.keep_all else 1.0
        self._load_network(lambda fraction: report(f"Loading {name}", network_share * fraction))
        if self.keep_all:
            self._load_encoders(lambda: report(f"Loading {name}", 0.6))
            self._load_decoder(lambda: report(f"Loading {name}", 0.9))
        report(f"Loading {name}", 1.0)
        self.load_seconds = perf_counter() - started

    @property
    def network(self) -> Flux:
        if self._network is None:
            self._load_network(lambda fraction: None)
        assert self._network is not None
        return self._network

    @property
    def latent_channels(self) -> int:
        """C of the latents; a token holds 2 x 2 of them."""
        return self.network.config.out_channels // 4

    def set_loras(self, choices: Sequence[tuple[str, float]]) -> list[LoraReport]:
        """Make the network carry exactly these (file, strength) pairs; the same files only get new strengths."""
        self._choices = tuple(choices)
        if self._network is None:
            self._load_network(lambda fraction: None)
        assert self._loras is not None
        try:
            return self._loras.set(choices)
        except BaseException:
            self._choices = ()
            self._loras.clear()
            raise

    def prepare(self, picture: Picture, report: Report = _nothing) -> None:
        """Make the card ready for such a picture, so that its first step starts at once. Raises ProblemError."""
        network = self.network
        if not self.device.is_cuda:
            return
        assert self._loras is not None
        num_text, config = self._num_text, network.config
        tokens = num_text + picture.num_tokens
        if (self._loras.layout, tokens) in self._prepared:
            return
        image, text, pooled = (
            torch.zeros(1, *shape, dtype=self.dtype, device=self.torch_device)
            for shape in (
                (picture.num_tokens, config.in_channels),
                (num_text, config.joint_attention_dim),
                (config.pooled_projection_dim,),
            )
        )
        prepare_kernels(network, step_inputs(picture, image, text, pooled, sigma=1.0), report)
        self._attention[tokens] = choose_attention(network, tokens, self.dtype, self.torch_device)
        self._prepared.add((self._loras.layout, tokens))

    def step(self, check: Check, *inputs: Tensor | None) -> Tensor:
        """One call of the network: (B, I, C). On a card by a graph, once a size has been seen often enough.

        `check` is called before each block on the processor; on a card a step is short, and asking would stall it.
        """
        network = self.network
        if self._graphs is None:
            velocity: Tensor = network(*inputs, check)
            return velocity
        assert self._loras is not None
        return self._graphs(self._loras.layout, *inputs)

    def attention_of(self, picture: Picture) -> Backend:
        """What computes the attention of such a picture; on a card it was chosen when that was prepared."""
        return self._attention.get(self._num_text + picture.num_tokens, "torch")

    @property
    def _num_text(self) -> int:
        return self.bundle.tokenizers["t5_tokenizer"].length

    def has_embeddings(self, prompt: str) -> bool:
        return prompt in self._prompts

    def embeddings(self, prompts: Sequence[str], check: Check) -> list[PromptEmbeds]:
        """One per prompt, from memory where it was asked for lately."""
        known = {prompt: self._prompts.get(prompt) for prompt in prompts}
        missing = [prompt for prompt, embeds in known.items() if embeds is None]
        if missing:
            if not self.keep_all:
                self._free(network=True, decoder=True)
            if self._encoders is None:
                self._load_encoders(check)
            assert self._encoders is not None
            for prompt in missing:
                known[prompt] = self._encoders.encode(prompt, check)
                self._prompts.put(prompt, known[prompt])  # type: ignore[arg-type]
            if not self.keep_all:
                self._free(encoders=True)
        return [embeds for prompt in prompts if (embeds := known[prompt]) is not None]

    def decode(self, latents: Tensor, check: Check) -> Decoded:
        """(1, C, h, w) latents fp32 -> (8h, 8w, 3) pixels, and how they were decoded."""
        if self._decoder is None:
            if not self.keep_all:
                self._free(network=True, encoders=True)
            self._load_decoder(check)
        assert self._decoder is not None
        return self._decoder.decode(latents, check)

    def unload(self) -> None:
        """Give all memory back. The next use loads again."""
        self._free(network=True, encoders=True, decoder=True)
        self._prompts = PromptMemory()

    def _free(self, network: bool = False, encoders: bool = False, decoder: bool = False) -> None:
        if network:
            self._network = self._loras = self._graphs = None
            self._prepared = set()
        if encoders:
            self._encoders = None
        if decoder:
            self._decoder = None
        gc.collect()
        give_back_freed()
        if self.device.is_cuda:
            torch.cuda.empty_cache()

    def _load_network(self, on_progress: Callable[[float], None]) -> None:
        file = open_checkpoint(self.bundle.weights["transformer"].path)
        network = load_flux(file, self.plan.plan, self.torch_device, self.dtype, on_progress)
        if network.config.guidance_embeds and self.bundle.card.guidance is None:
            raise bad_file(
                f"The model {self.bundle.card.name} takes a guidance number, but its bundle gives no default.",
                'Add "guidance" to the defaults in its bundle.json.',
            )
        loras = LoraStack(network)
        if self._choices:
            loras.set(self._choices)
        self._network, self._loras = network, loras
        self._graphs = StepGraphs(network) if self.device.is_cuda else None

    def _load_encoders(self, check: Check) -> None:
        # fp16 overflows in T5's MLP; bf16 and fp32 do not
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        files = {role: open_safetensors(self.bundle.weights[role].path) for role in ("t5", "clip")}
        tokenizers = []
        for role in ("t5_tokenizer", "clip_tokenizer"):
            part = self.bundle.tokenizers[role]
            tokenizers.append(PromptTokenizer(part.part.path, part.length, part.pad_id))
        t5 = T5Encoder(files["t5"], self.torch_device, dtype, check)
        clip = ClipEncoder(files["clip"], self.torch_device, dtype, check)
        self._encoders = TextEncoders(t5, clip, *tokenizers)

    def _load_decoder(self, check: Check) -> None:
        file = open_safetensors(self.bundle.weights["vae"].path)
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        decoder = ImageDecoder(file, self.torch_device, dtype, check)
        if self._network is not None and decoder.channels != self.latent_channels:
            raise bad_file(
                f"{file.path.name} takes latents of {decoder.channels} channels, the network makes "
                f"{self.latent_channels}: they do not belong together.",
                "Download the model again.",
            )
        self._decoder = decoder


def _import_heavy() -> None:
    """What encoders and VAE will import anyway; a failure shows where it is needed."""
    try:
        for name in HEAVY:
            importlib.import_module(name)
    except Exception:
        return
