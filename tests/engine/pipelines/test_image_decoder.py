"""Latents to pixels, held to diffusers' own way of loading and decoding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.pipelines.image_decoder import ImageDecoder
from engine.problems import ProblemError
from tests.end_to_end.tiny_bundle import VAE, write_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")


def tensors_of(path):
    file = open_safetensors(path)
    return {name: file.read(name) for name in file.tensors}


def rewritten(path, tmp_path, **changes):
    target = tmp_path / "vae.safetensors"
    config = {key: value for key, value in {**VAE, **changes}.items() if value is not None}
    write_safetensors(target, tensors_of(path), {"config": json.dumps(config)})
    return target


def oracle(path, z):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(**{key: value for key, value in VAE.items() if not key.startswith("latents_")}).eval()
    vae.load_state_dict({name: tensor.float() for name, tensor in tensors_of(path).items()})
    image = vae.decode(z, return_dict=False)[0][0].detach()
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def decoder(path):
    return ImageDecoder(open_safetensors(path), CPU, torch.float32)


def close(a, b):
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_latents_with_a_mean_are_put_back_before_decoding(path):
    latents = torch.randn(1, 16, 6, 8)
    mean = torch.tensor(VAE["latents_mean"]).view(1, 16, 1, 1)
    pixels, kind = decoder(path).decode(latents)
    assert kind == "whole"
    assert pixels.shape == (48, 64, 3)
    assert pixels.dtype == np.uint8
    assert close(pixels, oracle(path, latents / VAE["scaling_factor"] + mean))


def test_latents_without_a_mean_are_scaled_and_shifted(path, tmp_path):
    plain = rewritten(path, tmp_path, latents_mean=None, latents_std=None, scaling_factor=0.5, shift_factor=0.25)
    latents = torch.randn(1, 16, 6, 8)
    assert close(decoder(plain).decode(latents).pixels, oracle(path, latents / 0.5 + 0.25))


def test_a_file_without_configuration_is_taken_for_fluxs_vae(path, tmp_path):
    target = tmp_path / "vae.safetensors"
    write_safetensors(target, tensors_of(path), {})
    with pytest.raises(ProblemError, match=r"decoder.*expected"):  # ours is smaller than FLUX's
        decoder(target)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["of a card", "of Python", "of the processor"],
)
def test_when_the_memory_runs_out_it_decodes_in_tiles(path, monkeypatch, error):
    latents = torch.randn(1, 16, 80, 80) * 0.5
    made = decoder(path)
    whole = made.decode(latents).pixels
    decode, calls = made._vae.decoder.forward, []

    def short_of_memory(z, *arguments, **more):
        calls.append(tuple(z.shape))
        if z.shape[-1] > 64:
            raise error
        return decode(z, *arguments, **more)

    monkeypatch.setattr(made._vae.decoder, "forward", short_of_memory)
    tiled, kind = made.decode(latents)
    assert kind == "tiled"
    assert {shape[-1] for shape in calls[1:]} == {64, 32}  # tiles of 512 pixels, a quarter of each overlaps
    assert tiled.shape == whole.shape
    assert np.abs(tiled.astype(int) - whole.astype(int)).mean() < 3  # seams are blended, not exact
    assert not made._vae.use_tiling


def test_another_fault_while_decoding_is_no_reason_for_tiles(path, monkeypatch):
    made = decoder(path)

    def broken(z, *arguments, **more):
        raise RuntimeError("a bug")

    monkeypatch.setattr(made._vae.decoder, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        made.decode(torch.randn(1, 16, 4, 4))


def test_cancelling_stops_between_levels(path):
    class StopError(Exception):
        pass

    def stop():
        raise StopError

    made = decoder(path)
    with pytest.raises(StopError):
        made.decode(torch.randn(1, 16, 4, 4), stop)
    made.decode(torch.randn(1, 16, 4, 4))


def test_a_picture_that_is_not_numbers_is_never_shown(path):
    with pytest.raises(ProblemError, match="not numbers"):
        decoder(path).decode(torch.full((1, 16, 4, 4), float("nan")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_out_channels": [8, 8, 16]}, "expected"),
        ({"block_out_channels": "wide"}, "block_out_channels"),
        ({"block_out_channels": [10**9] * 4}, "block_out_channels"),
        ({"layers_per_block": 10**6}, "layers_per_block"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"norm_num_groups": 3}, "groups"),
        ({"up_block_types": ["Evil"] * 4}, "up_block_types"),
        ({"mid_block_add_attention": "maybe"}, "mid_block_add_attention"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": "1"}, "scaling_factor"),
        ({"latents_mean": [0.0] * 3}, "latents_mean"),
    ],
)
def test_a_file_that_contradicts_its_config_is_a_problem(path, tmp_path, changes, words):
    with pytest.raises(ProblemError, match=words):
        decoder(rewritten(path, tmp_path, **changes))
