"""FLUX's files become the network they stand for, or a problem that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints.safetensors_file import open_safetensors
from engine.families.flux import load_flux, plan_counts, read_config, recognise
from engine.layers.linear import Linear
from engine.layers.svdquant_linear import SVDQuantLinear, W4A16Linear
from engine.models.flux import Flux
from engine.problems import ProblemError
from engine.reference.svdq_linear import SVDQuantWeights
from tests.engine.families.small_flux import SMALL, small_flux, write_16_bit, write_svdquant


def velocity(network: Flux) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(1, 6, 64, generator=generator), torch.randn(1, 3, 64, generator=generator)
    ids = torch.tensor([[0.0, y, x] for y in range(2) for x in range(3)])
    pooled = torch.randn(1, 32, generator=generator)
    with torch.inference_mode():
        result: torch.Tensor = network(
            image, text, pooled, torch.tensor([0.7]), torch.tensor([3.0]), ids, torch.zeros(3, 3)
        )
    return result


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_16_bit_file_gives_back_the_same_network(tmp_path):
    network = small_flux()
    loaded = load_flux(open_safetensors(write_16_bit(tmp_path / "a.safetensors", network, torch.float32)))
    assert loaded.config == SMALL
    assert set(plan_counts(loaded)) == {"bf16"}
    # the modulation's bias went through -1 and +1 in fp32
    assert relative(velocity(loaded), velocity(network)) < 1e-5


@pytest.mark.parametrize("names", ["v1", "v2"])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_4_bit_file_computes_what_its_weights_stand_for(tmp_path, precision, names):
    network = small_flux()
    path, made = write_svdquant(tmp_path / "q.safetensors", network, precision, names=names)
    loaded = load_flux(open_safetensors(path))
    for name, weights in made.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, Linear)
        if isinstance(weights, SVDQuantWeights):
            dense, bias = weights.dense()
            assert isinstance(loaded.get_submodule(name), SVDQuantLinear)
        else:
            dense, bias = weights.dense(), weights.bias
            assert isinstance(loaded.get_submodule(name), W4A16Linear)
        layer.weight.copy_(dense)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    assert plan_counts(loaded)["w4a16"] == len(made)
    assert relative(velocity(loaded), velocity(network)) < 1e-5


def test_low_bit_plans_stay_near_the_weight_only_one(tmp_path):
    path, _ = write_svdquant(tmp_path / "q.safetensors", small_flux())
    exact = velocity(load_flux(open_safetensors(path)))
    errors = {plan: relative(velocity(load_flux(open_safetensors(path), plan)), exact) for plan in ("w4a8", "w4a4")}
    assert 0 < errors["w4a8"] < 0.06  # e4m3 rounds by 2.6 % rms
    assert errors["w4a8"] < errors["w4a4"] < 0.3  # int4 by about 10 %


def test_a_code_of_minus_eight_runs_weight_only_under_w4a8(tmp_path):
    _, made = write_svdquant(tmp_path / "q.safetensors", small_flux())
    weights = made["single_blocks.0.qkv"]
    weights.codes[3, 5] = -8
    layer = SVDQuantLinear(weights, "w4a8")
    assert layer.plan == "w4a16"
    assert SVDQuantLinear(made["single_blocks.1.qkv"], "w4a8").plan == "w4a8"


def test_a_layer_kept_in_16_or_8_bits_is_read(tmp_path):
    network = small_flux()
    path, _ = write_svdquant(tmp_path / "q.safetensors", network)
    tensors = load_file(path)
    wide = load_file(write_16_bit(tmp_path / "w.safetensors", network))
    for key in [key for key in tensors if key.startswith("transformer_blocks.0.mlp_fc1.")]:
        del tensors[key]
    module = "transformer_blocks.0.ff.net.0.proj"
    weight = wide[f"{module}.weight"].float()
    scale = weight.abs().amax(1) / 127
    tensors[f"{module}.weight"] = (weight / scale[:, None]).round().to(torch.int8)
    tensors[f"{module}.weight_scale"] = scale
    tensors[f"{module}.bias"] = wide[f"{module}.bias"]
    save_file(tensors, path, {"config": json.dumps(SMALL.to_json())})
    layer = load_flux(open_safetensors(path)).get_submodule("double_blocks.0.image.fc1")
    assert isinstance(layer, Linear)
    assert relative(layer.weight, weight) < 0.01


def test_the_config_is_completed_from_the_tensors(tmp_path):
    path = write_16_bit(tmp_path / "a.safetensors", small_flux())
    save_file(load_file(path), path)  # no metadata at all
    assert read_config(open_safetensors(path)) == SMALL


def test_other_files_are_not_flux(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"some.weight": torch.zeros(2, 2)}, path)
    assert recognise(open_safetensors(path)) is None
    with pytest.raises(ProblemError, match="does not hold FLUX"):
        load_flux(open_safetensors(path))


def _damage(case: str, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> str:
    """Break one thing; returns the word that the problem must name."""
    qkv, bias = "transformer_blocks.0.qkv_proj", "transformer_blocks.0.norm1.linear.bias"
    match case:
        case "missing scales":
            del tensors[f"{qkv}.wscales"]
            return "qkv_proj.wscales"
        case "missing norm":
            del tensors["single_transformer_blocks.1.norm_k.weight"]
            return "norm_k"
        case "wrong shape":
            tensors["proj_out.bias"] = torch.zeros(63)
            return "proj_out.bias"
        case "wrong type":
            tensors["proj_out.weight"] = torch.zeros(64, 256, dtype=torch.int32)
            return "proj_out.weight"
        case "NaN":
            tensors["x_embedder.bias"] = torch.full((256,), float("nan"))
            return "x_embedder.bias"
        case "no modulation bias":
            del tensors[bias]
            return bias
        case "another layer's size":
            for key in [key for key in tensors if key.startswith(qkv + ".")]:
                tensors[key] = tensors[key.replace("qkv_proj", "out_proj")].clone()
            return "qkv_proj.qweight"
        case "a missing block":
            for key in [key for key in tensors if key.startswith("single_transformer_blocks.0.")]:
                del tensors[key]
            return "single_transformer_blocks.0"
        case "a config that contradicts":
            config["num_layers"] = 19
            return "num_layers"
        case "an absurd config":
            config["axes_dims_rope"] = [10**9]
            return "axes_dims_rope"
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    ["missing scales", "missing norm", "wrong shape", "wrong type", "NaN", "no modulation bias",
     "another layer's size", "a missing block", "a config that contradicts", "an absurd config"],
)  # fmt: skip
def test_a_damaged_network_is_named(tmp_path: Path, case: str):
    path, _ = write_svdquant(tmp_path / "q.safetensors", small_flux())
    tensors, config = load_file(path), SMALL.to_json()
    named = _damage(case, tensors, config)
    save_file(tensors, path, {"config": json.dumps(config)})
    with pytest.raises(ProblemError) as refused:
        load_flux(open_safetensors(path))
    assert named in refused.value.problem.what
    assert refused.value.problem.todo
