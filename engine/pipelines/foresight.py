"""What a request would take in bytes and seconds, from file headers and earlier measurements. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from engine.checkpoints.bundle import Bundle
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.safetensors_file import SafetensorsFile, open_safetensors
from engine.checkpoints.svdquant_file import check_svdquant_linear, quantized_layers
from engine.device import Device, PlanChoice
from engine.families.flux import read_config, recognise
from engine.memory import ModelSizes
from engine.models.flux import FluxConfig
from engine.pipelines.settle import Settled
from engine.problems import bad_file
from engine.requests import Precision
from engine.text.files import config_of

# Of a 4-bit layer's tensors: factors that take a second place in a kernel's order, 16-bit vectors that become fp32.
TIMES_ON_CARD = {
    "lora_down": 2, "proj_down": 2, "smooth": 4, "smooth_factor": 4, "smooth_orig": 0, "smooth_factor_orig": 0,
    "bias": 2,
}  # fmt: skip
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Transformer:
    """What a transformer's header tells. precision: of its 4-bit layers, None where it is 16-bit."""

    file: SafetensorsFile
    config: FluxConfig
    precision: Precision | None


def read_transformer(bundle: Bundle) -> Transformer:
    """Raises ProblemError when the bundle's transformer is no FLUX network, or not the one it was written for."""
    file = open_checkpoint(bundle.weights["transformer"].path)
    if recognise(file) is None:
        raise bad_file(f"{file.path.name} does not hold FLUX's network.", "Choose a FLUX checkpoint.")
    config = read_config(file)
    channels = config.out_channels // 4  # of the latents: a token holds 2 x 2 of them
    if bundle.preview is not None and len(bundle.preview.rows) != channels:
        raise bad_file(
            f"The preview matrix of {bundle.card.name} has {len(bundle.preview.rows)} rows; its network makes "
            f"latents of {channels} channels.",
            "Download the model again, or correct its bundle.json.",
        )
    return Transformer(file, config, precision_of(file))


def precision_of(file: SafetensorsFile) -> Precision | None:
    """Of a file's SVDQuant layers, None where it has none."""
    for prefix, kind in quantized_layers(file).items():
        if kind == "svdquant":
            return check_svdquant_linear(file, prefix).precision
    return None


def loaded_bytes(file: SafetensorsFile, item_bytes: int, plan: PlanChoice, on_card: bool = False) -> int:
    """Bytes of a file's tensors once loaded.

    On the processor codes are expanded under w4a16 and take one byte each under w4a4 and w4a8; on a card they stay
    4-bit, and vectors and factors lie there as kernels want them.
    """
    layers = quantized_layers(file)
    total = 0
    for name, info in file.tensors.items():
        prefix, _, suffix = name.rpartition(".")
        if on_card and prefix in layers:
            total += info.num_bytes * TIMES_ON_CARD.get(suffix, 1)
        elif suffix == "qweight":
            expanded = layers[prefix] == "w4a16" or plan.plan == "w4a16"
            total += 2 * info.num_bytes * (item_bytes if expanded else 1)
        elif info.dtype.is_floating_point or f"{name}_scale" in file.tensors:
            total += info.num_bytes // info.dtype.itemsize * item_bytes
        else:
            total += info.num_bytes
    return total


def model_sizes(
    bundle: Bundle, transformer: Transformer, settled: Settled | None, device: Device, plan: PlanChoice
) -> ModelSizes:
    """Everything memory.plan needs to know of a model on a device."""
    item_bytes = ITEM_BYTES[device.dtype]
    encoder_bytes = 4 if device.dtype == "float16" else item_bytes  # fp16 overflows in T5
    vae = open_safetensors(bundle.weights["vae"].path)
    decoder = {name: info for name, info in vae.tensors.items() if not name.startswith(("encoder.", "quant_conv."))}
    blocks = config_of(vae).get("block_out_channels")
    sound = isinstance(blocks, list) and blocks and all(type(one) is int for one in blocks)
    lora_bytes = 0
    for lora in settled.loras if settled else ():
        lora_bytes += loaded_bytes(open_safetensors(lora.path), item_bytes, plan, device.is_cuda)
    return ModelSizes(
        encoders=sum(
            loaded_bytes(open_safetensors(bundle.weights[role].path), encoder_bytes, plan, device.is_cuda)
            for role in ("t5", "clip")
        ),
        network=loaded_bytes(transformer.file, item_bytes, plan, device.is_cuda),
        decoder=sum(info.num_bytes // info.dtype.itemsize * encoder_bytes for info in decoder.values()),
        loras=lora_bytes,
        hidden_size=transformer.config.hidden_size,
        text_tokens=bundle.tokenizers["t5_tokenizer"].length,
        decoder_channels=max(blocks[:2]) if sound and isinstance(blocks, list) else 256,
        item_bytes=item_bytes,
    )
