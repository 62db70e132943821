"""Whole files: the small checkpoint in every spelling and container is the network it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.checkpoints.svdquant_file import Names, check_svdquant_linear, quantized_layers
from engine.families.flux import load_flux
from engine.reference.svdq_linear import Precision
from tests.engine.checkpoints.small_checkpoint import CONFIG, small_flux
from tests.tolerances import RELATIVE, relative_error


@pytest.mark.parametrize("folder", [False, True], ids=["one file", "folder of two"])
@pytest.mark.parametrize("names", ["v1", "v2"])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_file_is_the_network_it_stands_for(
    precision: Precision, names: Names, folder: bool, tmp_path: Path
) -> None:
    made = small_flux(precision, names)
    path = made.write_folder(tmp_path / "flux") if folder else made.write(tmp_path / "flux.safetensors")
    network = load_flux(open_checkpoint(path))
    oracle = FluxTransformer2DModel(**{key: value for key, value in CONFIG.items() if key != "_class_name"})
    oracle.load_state_dict(made.state)
    image, text, pooled = torch.randn(2, 12, 64), torch.randn(2, 5, 64), torch.randn(2, 32)
    timestep, guidance = torch.tensor([0.9, 0.2]), torch.tensor([3.5, 1.0])
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(3), torch.arange(4)).float()
    with torch.no_grad():
        found = network(image, text, pooled, timestep, guidance, ids, torch.zeros(5, 3))
        expected = oracle(
            hidden_states=image, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep,
            guidance=guidance, img_ids=ids, txt_ids=torch.zeros(5, 3), return_dict=False,
        )[0]  # fmt: skip
    assert relative_error(found, expected) < RELATIVE[torch.float32]


def test_ranks_and_precision_are_those_of_the_tensors_whatever_metadata_and_name_say(tmp_path: Path) -> None:
    made = small_flux("nvfp4", ranks=(16, 64, 32))
    lies = made.metadata | {"quantization_config": '{"method": "svdquant", "rank": 128}'}
    write_safetensors(tmp_path / "svdq-int4_r128-flux.safetensors", made.tensors, lies)
    file = open_safetensors(tmp_path / "svdq-int4_r128-flux.safetensors")
    layers = [name for name, kind in quantized_layers(file).items() if kind == "svdquant"]
    headers = [check_svdquant_linear(file, name) for name in layers]
    assert len(layers) == 16
    assert {header.rank for header in headers} == {16, 32, 64}
    assert {header.precision for header in headers} == {"nvfp4"}
