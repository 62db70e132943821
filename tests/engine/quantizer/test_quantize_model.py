"""From a 16-bit checkpoint to a 4-bit one that loads, with a tiny model: events, errors, resume, bad files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.events import Cancelled, Event, Finished, Notice, QuantizeProgress
from engine.families.flux import load_flux, plan_counts, recognise
from engine.layers.svdquant_linear import SVDQuantLinear
from engine.models.flux import Flux
from engine.problems import ProblemError
from engine.quantizer.calibrate import Amounts
from engine.quantizer.quantize_model import quantize_model
from engine.requests import QuantizeRequest
from tests.end_to_end.tiny_bundle import make_tiny_bundle
from tests.engine.families.small_flux import SMALL, small_flux, write_16_bit
from tests.tolerances import relative_error

FEW = Amounts(prompts=4, held_out_prompts=2, timesteps=2, rows=256, held_out_rows=64)
QUICK = {"rank": 0, "rounding": "nearest"}  # where a test is not about what the weights become
STEPS = ("error_rtn", "error_smooth", "error_svdquant", "error_final")


def run(source: Path, out: Path, **fields: Any) -> list[Event]:
    return list(quantize_model(QuantizeRequest(str(source), str(out), **fields), amounts=FEW))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("quantizer") / "tiny")


@pytest.fixture(scope="module")
def made(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], Path]:
    """One conversion with everything on, and where its result is."""
    out = tmp_path_factory.mktemp("made") / "q.safetensors"
    return run(bundle, out), out


@pytest.fixture
def plain_file(tmp_path: Path) -> Path:
    """A 16-bit file with no bundle beside it: nothing to calibrate with."""
    folder = tmp_path / "source"
    folder.mkdir()
    return write_16_bit(folder / "network.safetensors", small_flux())


def velocity(network: Flux) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(1, 16, SMALL.in_channels, generator=generator)
    text = torch.randn(1, 8, SMALL.joint_attention_dim, generator=generator)
    pooled = torch.randn(1, SMALL.pooled_projection_dim, generator=generator)
    ids = torch.zeros(16, 3)
    ids[:, 2] = torch.arange(16)
    one = torch.ones(1)
    return network(image, text, pooled, 0.7 * one, one, ids, torch.zeros(8, 3))


def load(path: Path) -> Flux:
    return load_flux(open_safetensors(path))


def test_the_file_loads_and_predicts_nearly_the_same(made):
    events, out = made
    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, QuantizeProgress) for event in events[:-1])
    network = load(out)
    assert plan_counts(network) == {"w4a16": 20, "bf16": 10}
    assert relative_error(velocity(network), velocity(small_flux())) < 0.05
    assert [path.name for path in out.parent.iterdir()] == ["q.safetensors"]


def test_so_does_an_nvfp4_file(bundle, tmp_path):
    run(bundle, tmp_path / "q.safetensors", precision="nvfp4", rounding="nearest")
    assert relative_error(velocity(load(tmp_path / "q.safetensors")), velocity(small_flux())) < 0.1
    file = open_safetensors(tmp_path / "q.safetensors")
    assert "single_transformer_blocks.0.qkv_proj.wcscales" in file.tensors
    assert "single_transformer_blocks.0.mlp_fc2.wtscale" in file.tensors
    assert json.loads(file.metadata["quantization_config"])["weight"] == {
        "dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16,
    }  # fmt: skip


def test_the_result_has_every_layers_errors(made):
    final = made[0][-1]
    assert isinstance(final, Finished)
    result = json.loads(json.dumps(dict(final.result)))
    assert (result["precision"], result["rank"]) == ("int4", 32)
    assert result["seconds"] > 0
    assert len(result["per_layer"]) == 16
    totals = [sum(layer[step] for layer in result["per_layer"]) for step in STEPS]
    assert totals == sorted(totals, reverse=True)
    assert totals[3] < 0.9 * totals[0]


def test_progress_goes_up_to_the_number_of_4bit_layers(made):
    events = [event for event in made[0] if isinstance(event, QuantizeProgress)]
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert {event.total for event in events} == {20}
    assert events[-1].done == 20
    assert all(event.left_s >= 0 for event in events)


def test_the_file_says_what_public_tools_ask(made):
    file = open_safetensors(made[1])
    assert file.metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    quantization = json.loads(file.metadata["quantization_config"])
    assert quantization["weight"] == {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    assert (quantization["method"], quantization["rank"]) == ("svdquant", 32)
    comfy = json.loads(file.metadata["comfy_config"])
    assert comfy["model_class"] == "Flux"
    assert comfy["model_config"]["hidden_size"] == SMALL.hidden_size
    assert json.loads(file.metadata["config"])["num_single_layers"] == SMALL.num_single_layers
    for key in ("qkv_proj", "out_proj", "mlp_fc1", "mlp_fc2"):
        for part in ("qweight", "wscales", "bias", "smooth", "smooth_orig", "lora_down", "lora_up"):
            assert f"single_transformer_blocks.0.{key}.{part}" in file.tensors


def test_single_blocks_have_one_smooth_factor_for_qkv_and_fc1(made):
    file = open_safetensors(made[1])
    for i in range(SMALL.num_single_layers):
        prefix = f"single_transformer_blocks.{i}"
        assert torch.equal(file.read(f"{prefix}.qkv_proj.smooth"), file.read(f"{prefix}.mlp_fc1.smooth"))


def test_only_fc2_of_int4_has_the_shift(made):
    shifts = {
        name.rpartition(".")[2]: module.weights.input_shift
        for name, module in load_flux(open_safetensors(made[1]), "w4a4").named_modules()
        if isinstance(module, SVDQuantLinear) and module.weights is not None
    }
    assert shifts == {"qkv": 0.0, "out": 0.0, "fc1": 0.0, "fc2": 11 / 64}


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(bundle, tmp_path):
    outs = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for out, seed in zip(outs, (7, 7, 8), strict=True):
        run(bundle, out, seed=seed, **QUICK)
    first, second, third = (out.read_bytes() for out in outs)
    assert first == second
    assert first != third


def test_without_prompts_it_says_so_and_looks_at_the_weights_alone(plain_file, tmp_path):
    events = run(plain_file, tmp_path / "q.safetensors")
    assert isinstance(events[0], Notice)
    assert relative_error(velocity(load(tmp_path / "q.safetensors")), velocity(small_flux())) < 0.1


def test_rank_zero_without_smoothing_or_gptq_works_too(plain_file, tmp_path):
    final = run(plain_file, tmp_path / "q.safetensors", smooth=False, **QUICK)[-1]
    assert isinstance(final, Finished)
    assert all(len({layer[step] for step in STEPS}) == 1 for layer in final.result["per_layer"])
    file = open_safetensors(tmp_path / "q.safetensors")
    assert not any("lora_down" in name for name in file.tensors)
    assert relative_error(velocity(load(tmp_path / "q.safetensors")), velocity(small_flux())) < 0.15


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_kept_layers_stay_wide(plain_file, tmp_path, kind):
    out = tmp_path / "q.safetensors"
    run(plain_file, out, **QUICK, keep=(("single_blocks.0.fc2", kind), ("image_in", kind)))
    file = open_safetensors(out)
    weight = file.info("single_transformer_blocks.0.proj_out.weight")
    assert weight.shape == (256, 1280)  # whole, with the columns that read attention
    assert weight.dtype == {"bf16": torch.bfloat16, "int8": torch.int8}[kind]
    assert "single_transformer_blocks.0.mlp_fc2.qweight" not in file.tensors
    assert "single_transformer_blocks.0.out_proj.qweight" not in file.tensors
    assert ("x_embedder.weight_scale" in file.tensors) == (kind == "int8")
    before, after = small_flux(), load(out)
    for name in ("single_blocks.0.fc2", "single_blocks.0.out", "image_in"):
        error = relative_error(after.get_submodule(name).weight, before.get_submodule(name).weight)
        assert error < (1e-6 if kind == "bf16" else 0.01)


def test_everything_may_be_kept(plain_file, tmp_path):
    run(plain_file, tmp_path / "q.safetensors", keep=(("*", "bf16"),))
    file = open_safetensors(tmp_path / "q.safetensors")
    assert recognise(file) == "transformer"
    assert relative_error(velocity(load(file.path)), velocity(small_flux())) < 1e-6


# ----------------------------------------------------------------------------------------------- cancel and resume


def cancelled_after(source: Path, out: Path, checks: int, **fields: Any) -> list[Event]:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > checks

    return list(quantize_model(QuantizeRequest(str(source), str(out), **fields), cancelled, FEW))


def test_cancelled_before_anything_is_finished_it_leaves_nothing(bundle, tmp_path):
    events = cancelled_after(bundle, tmp_path / "q.safetensors", 0)
    assert events[-1] == Cancelled()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_conversion_goes_on_and_gives_the_same_bytes(bundle, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "q.safetensors"
    run(bundle, whole, **QUICK)
    events = cancelled_after(bundle, out, 300, **QUICK)
    assert events[-1] == Cancelled()
    assert not out.exists()
    finished = len(list((tmp_path / "q.safetensors.part").glob("double_blocks.*")))
    assert finished > 0
    events = run(bundle, out, **QUICK)
    first = next(event for event in events if isinstance(event, QuantizeProgress))
    assert first.done >= finished
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.safetensors", "whole.safetensors"]


def test_a_generator_that_is_dropped_can_be_resumed(plain_file, tmp_path):
    out = tmp_path / "q.safetensors"
    events = quantize_model(QuantizeRequest(str(plain_file), str(out), **QUICK), amounts=FEW)
    for event in events:
        if isinstance(event, QuantizeProgress) and event.done > 3:
            break
    events.close()
    assert not out.exists()
    assert isinstance(run(plain_file, out, **QUICK)[-1], Finished)


def test_other_settings_start_again(plain_file, tmp_path):
    out = tmp_path / "q.safetensors"
    cancelled_after(plain_file, out, 60, **QUICK)
    assert list((tmp_path / "q.safetensors.part").glob("double_blocks.*"))
    run(plain_file, out, rounding="nearest", rank=16)
    file = open_safetensors(out)
    ranks = [info.shape[1] for name, info in file.tensors.items() if name.endswith("lora_up")]
    assert ranks == [16] * 16


def test_a_damaged_part_is_made_again(plain_file, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "q.safetensors"
    run(plain_file, whole, **QUICK)
    cancelled_after(plain_file, out, 60, **QUICK)
    part = sorted((tmp_path / "q.safetensors.part").glob("double_blocks.*"))[0]
    part.write_bytes(part.read_bytes()[:-100])
    run(plain_file, out, **QUICK)
    assert out.read_bytes() == whole.read_bytes()


def test_a_folder_that_is_not_ours_is_left_alone(plain_file, tmp_path):
    foreign = tmp_path / "q.safetensors.part"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    with pytest.raises(ProblemError, match="holds something else"):
        run(plain_file, tmp_path / "q.safetensors")
    assert (foreign / "letter.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------ bad wishes


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("q.ckpt", "ends in .safetensors"),
        ("missing/q.safetensors", "no folder"),
        ("source/network.safetensors", "replace its source"),
        ("source", "ends in .safetensors"),
        ("a\0b.safetensors", "not text"),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_first(plain_file, tmp_path, out, said):
    with pytest.raises(ProblemError, match=said):
        run(plain_file, tmp_path / out)


def test_a_bundles_own_network_is_not_replaced(bundle):
    with pytest.raises(ProblemError, match="replace its source"):
        run(bundle, bundle / "transformer.safetensors")


def test_what_is_4bit_already_is_refused(made, tmp_path):
    with pytest.raises(ProblemError, match="4-bit already"):
        run(made[1], tmp_path / "again.safetensors")


def test_prompts_without_text_encoders_are_a_problem(plain_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox")
    with pytest.raises(ProblemError, match="text encoders"):
        run(plain_file, tmp_path / "q.safetensors", prompts=str(tmp_path / "prompts.txt"))


def _damage(path: Path, how: str) -> None:
    file = open_safetensors(path)
    tensors = {name: file.read(name) for name in file.tensors}
    key = "single_transformer_blocks.1.proj_mlp.weight"
    match how:
        case "NaN":
            tensors[key][3, 3] = torch.nan
        case "infinity":
            tensors["transformer_blocks.0.norm1.linear.weight"][0, 0] = torch.inf
        case "embedder":
            tensors["x_embedder.weight"][0, 0] = torch.nan
        case "missing":
            del tensors[key]
        case "shape":
            tensors[key] = tensors[key][:-1].contiguous()
        case "dtype":
            tensors[key] = tensors[key].to(torch.int32)
        case "foreign":
            tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    write_safetensors(path, tensors, file.metadata)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if how == "text":
        path.write_text("hello")


@pytest.mark.parametrize(
    "how", ["NaN", "infinity", "embedder", "missing", "shape", "dtype", "foreign", "truncated", "text"]
)
def test_a_damaged_source_is_a_problem_that_names_the_file(plain_file, tmp_path, how):
    _damage(plain_file, how)
    out = tmp_path / "q.safetensors"
    with pytest.raises(ProblemError, match="network"):
        run(plain_file, out, **QUICK)
    assert not out.exists()


@pytest.mark.parametrize("file", ["t5.safetensors", "clip.safetensors", "tokenizer.json"])
def test_a_damaged_text_encoder_is_a_problem_that_names_it(bundle, tmp_path, file):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:-200])
    with pytest.raises(ProblemError, match=file.partition(".")[0]):
        run(folder, tmp_path / "q.safetensors")
