"""A T5 encoder in 4 bits: the public AWQ file format (W4A16, groups of 128, asymmetric), rounded by GPTQ.

The encoder is looked at block by block on sample prompts; without prompts weights are rounded to nearest.
Everything that is no linear of a block (embeddings, norms, position biases) stays in 16 bits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints.bundle import Bundle
from engine.checkpoints.safetensors_file import SafetensorsFile, write_safetensors
from engine.checkpoints.svdquant_tensors import w4a16_tensors
from engine.events import Event, QuantizeProgress
from engine.problems import bad_request
from engine.quantizer.pack import finite
from engine.quantizer.round_weights import HALF
from engine.quantizer.weight_only import T5_GROUP, quantize_weight_only
from engine.text.t5 import T5Encoder
from engine.text.tokenizer import PromptTokenizer

Check = Callable[[], None]
CALIBRATION_TOKENS, HELD_OUT_TOKENS = 16384, 2048
HELD_OUT_SHARE = 5  # one prompt in five
LINEAR = re.compile(r"encoder\.block\.(\d+)\.layer\..+\.(q|k|v|o|wi|wi_0|wi_1|wo)\.weight")


def is_t5(file: SafetensorsFile) -> bool:
    """Whether the file holds a T5 encoder in 16 bits."""
    embeddings = {"shared.weight", "encoder.embed_tokens.weight"} & file.tensors.keys()
    return bool(embeddings) and "encoder.final_layer_norm.weight" in file.tensors


def quantize_t5(
    file: SafetensorsFile,
    out: Path,
    bundle: Bundle | None,
    prompts: tuple[str, ...] | None,
    device: torch.device,
    seed: int,
    gptq: bool,
    check: Check,
) -> Generator[Event, None, list[dict[str, Any]]]:
    """Yields progress; returns (by `yield from`) the errors per layer. The file appears when it is complete.

    prompts: None rounds to nearest. Raises ProblemError for a file that is 4-bit already or whose linears are no
    multiple of 128 wide.
    """
    names = _linear_names(file)
    calibrator = None
    if prompts is not None and bundle is not None:
        yield QuantizeProgress("Reading the text encoder", 0, len(names), 0.0)
        calibrator = _Calibrator(file, bundle, prompts, device, seed, check)
    tensors: dict[str, Tensor] = {}
    per_layer: list[dict[str, Any]] = []
    for block in sorted({block for block, _ in names}):
        here = [name for number, name in names if number == block]
        hessians, rows = calibrator.look_at(here, check) if calibrator else ({}, {})
        for name in here:
            check()
            yield QuantizeProgress(f"Quantizing {name}", len(per_layer), len(names), 0.0)
            weight = finite(file, f"{name}.weight").float().to(device)
            x = rows.get(name)
            if x is None:
                x = torch.eye(weight.shape[1], device=device)  # the error of the weight itself
            plain = quantize_weight_only(weight, None, T5_GROUP, symmetric=False, search=False)
            made = quantize_weight_only(
                weight, None, T5_GROUP, symmetric=False, hessian=hessians.get(name) if gptq else None
            )
            tensors |= {key: tensor.cpu() for key, tensor in w4a16_tensors(name, made).items()}
            rtn, final = (float((x @ (w.dense() - weight).T).norm() / (x @ weight.T).norm()) for w in (plain, made))
            # neither smoothing nor a low-rank branch has a place in this format
            per_layer.append(
                {"name": name, "error_rtn": rtn, "error_smooth": rtn, "error_svdquant": rtn, "error_final": final}
            )
    quantized = {f"{name}.weight" for _, name in names}
    for name in file.tensors.keys() - quantized:
        check()
        tensor = finite(file, name)
        tensors[name] = tensor.to(HALF) if tensor.dtype == torch.float32 else tensor
    config = {"config": file.metadata["config"]} if "config" in file.metadata else {}
    write_safetensors(out, tensors, config)
    return per_layer


def _linear_names(file: SafetensorsFile) -> list[tuple[int, str]]:
    """(block, name without ".weight") of every linear, in the order of the blocks."""
    found = []
    for key, info in file.tensors.items():
        if key.endswith(".qweight"):
            raise bad_request(f"{file.path.name} is 4-bit already.", "Choose the 16-bit text encoder.")
        match = LINEAR.fullmatch(key)
        if match is None:
            continue
        if len(info.shape) != 2 or info.shape[1] % T5_GROUP or info.shape[0] % 4:
            raise file.fault(key, f"4 bits need rows of a multiple of {T5_GROUP} numbers")
        found.append((int(match[1]), key.removesuffix(".weight")))
    if not found:
        raise bad_request(f"{file.path.name} has no layers of a T5 encoder.", "Choose another file.")
    return sorted(found)


class _Calibrator:
    """Runs the 16-bit encoder on prompts once per block and looks at the inputs of that block's linears."""

    def __init__(
        self,
        file: SafetensorsFile,
        bundle: Bundle,
        prompts: tuple[str, ...],
        device: torch.device,
        seed: int,
        check: Check,
    ) -> None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # fp16 overflows in T5's MLP
        self._encoder = T5Encoder(file, device, dtype, check)
        part = bundle.tokenizers["t5_tokenizer"]
        tokenizer = PromptTokenizer(part.part.path, part.length, part.pad_id)
        prompts = tuple(dict.fromkeys((*prompts, *bundle.card.words)))  # every word it knows that there is time for
        shuffled = random.Random(seed).sample(prompts, len(prompts))
        split = len(shuffled) // HELD_OUT_SHARE
        held_out, seen = shuffled[:split] or shuffled, [*shuffled[split:], ""]
        self._seen = [tokenizer.encode(one) for one in seen[-max(1, CALIBRATION_TOKENS // part.length) :]]
        self._held_out = [tokenizer.encode(one) for one in held_out[: max(1, HELD_OUT_TOKENS // part.length)]]

    def look_at(self, names: list[str], check: Check) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the linears called `names`: the Hessians (K, K) of their inputs, and held-out inputs (M, K), fp32."""
        linears = self._encoder.linears()
        hessians: dict[str, Tensor] = {}
        rows: dict[str, list[Tensor]] = {name: [] for name in names}

        def add(name: str, x: Tensor) -> None:
            product = x.T @ x
            hessians[name] = hessians[name].add_(product) if name in hessians else product.clone()

        self._run(self._seen, {name: linears[name] for name in names}, add, check)
        self._run(self._held_out, {name: linears[name] for name in names}, lambda n, x: rows[n].append(x), check)
        return hessians, {name: torch.cat(parts).clone() for name, parts in rows.items()}

    def _run(
        self,
        prompts: list[list[int]],
        linears: dict[str, nn.Linear],
        see: Callable[[str, Tensor], None],
        check: Check,
    ) -> None:
        def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: see(name, inputs[0].flatten(0, -2).float())

        handles = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
        try:
            for ids in prompts:
                self._encoder.encode(ids, check)
        finally:
            for handle in handles:
                handle.remove()
