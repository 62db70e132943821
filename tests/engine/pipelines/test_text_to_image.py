"""The pieces of the way from a prompt to pixels."""

from __future__ import annotations

import numpy as np
import torch

from engine.checkpoints.bundle import PreviewMatrix
from engine.pipelines.text_to_image import Picture, pack, position_ids, preview, shift_of, unpack
from engine.sampling.sigmas import ResolutionShift


def test_latents_are_packed_as_diffusers_packs_them():
    from diffusers import FluxPipeline

    latents = torch.randn(1, 16, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 1, 16, 6, 10))
    assert torch.equal(unpack(pack(latents), 6, 10), latents)


def test_positions_are_those_of_diffusers():
    from diffusers import FluxPipeline

    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(position_ids(3, 5), expected)


def test_a_preview_is_the_linear_map_of_the_bundle():
    latents = torch.zeros(1, 2, 1, 3)
    latents[0, 0, 0] = torch.tensor([0.0, 1.0, 100.0])
    matrix = PreviewMatrix(((1.0, 0.5, 0.0), (0.0, 0.0, 0.0)), (0.0, 0.0, -1.0))
    expected = [[[128, 128, 0], [255, 191, 0], [255, 255, 0]]]
    assert preview(latents, matrix).tolist() == expected


def test_a_preview_of_broken_numbers_does_not_break():
    latents = torch.full((1, 1, 2, 2), float("nan"))
    assert preview(latents, PreviewMatrix(((1.0, 1.0, 1.0),), (0.0, 0.0, 0.0))).dtype == np.uint8


def test_a_bundles_shift_is_a_number_or_depends_on_the_size():
    assert shift_of(2) == 2.0
    told = {"base_tokens": 256, "base": 0.5, "max_tokens": 4096, "max": 1.15}
    assert shift_of(told) == ResolutionShift()


def test_a_token_is_sixteen_pixels_wide():
    picture = Picture("x", "", width=96, height=64, steps=1, seed=0, guidance=None, cfg=1.0)
    assert picture.num_tokens == 24
