"""Layers of public files: the golden ones both ways, then any size, rank and spelling, then what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.safetensors_file import SafetensorsFile, open_safetensors, write_safetensors
from engine.checkpoints.svdquant_file import (
    Names,
    check_svdquant_linear,
    quantized_layers,
    read_svdquant_linear,
    read_w4a16,
)
from engine.checkpoints.svdquant_tensors import svdquant_tensors, w4a16_tensors
from engine.problems import ProblemError
from engine.reference.linear_w4a16 import W4A16Weights
from engine.reference.svdq_linear import GROUP_SIZE, Precision, SVDQuantWeights
from tests.engine.checkpoints.test_svdquant_layout import same_bytes
from tests.golden import GOLDEN, golden

PER_FILE = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GELU_SHIFT = 11 / 64


def file_of(folder: Path, tensors: dict[str, Tensor]) -> SafetensorsFile:
    write_safetensors(folder / "layer.safetensors", tensors, {})
    return open_safetensors(folder / "layer.safetensors")


def golden_case(name: str, case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(logical tensors, packed tensors named case.<name>)"""
    logical, packed = {}, {}
    for key, tensor in golden(name).items():
        if key.startswith(f"{case}.logical."):
            logical[key.rpartition(".")[2]] = tensor
        elif key.startswith(f"{case}.packed."):
            packed[key.replace(".packed.", ".")] = tensor
    return logical, packed


def random_linear(precision: Precision, n: int, k: int, rank: int, seed: int = 0) -> SVDQuantWeights:
    g = torch.Generator().manual_seed(seed)
    h = torch.bfloat16
    int4 = precision == "int4"
    wscales = torch.rand(n, k // GROUP_SIZE[precision], generator=g)
    return SVDQuantWeights(
        precision=precision,
        codes=torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
        if int4
        else torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8),
        wscales=wscales.to(h if int4 else torch.float8_e4m3fn),
        smooth_factor=(0.1 + torch.rand(k, generator=g)).to(h),
        bias=torch.randn(n, generator=g).to(h) if seed % 2 else None,
        proj_down=torch.randn(k, rank, generator=g).to(h),
        proj_up=torch.randn(n, rank, generator=g).to(h),
        wtscale=None if int4 or seed % 3 else torch.rand((), generator=g),
        wcscales=None if int4 or seed % 3 == 0 else torch.rand(n, generator=g).to(h),
    )


def same_weights(a: SVDQuantWeights | W4A16Weights, b: SVDQuantWeights | W4A16Weights) -> bool:
    def same(x: object, y: object) -> bool:
        return same_bytes(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y

    return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


@pytest.mark.parametrize(
    ("case", "n", "k", "shift"),
    [("plain", 256, 256, 0.0), ("pad", 192, 192, 0.0), ("fc2shift", 128, 128, GELU_SHIFT)],
)
def test_golden_int4_layers_both_ways(case: str, n: int, k: int, shift: float, tmp_path: Path) -> None:
    logical, packed = golden_case("svdq_int4", case)
    weights = read_svdquant_linear(
        file_of(tmp_path, packed), case, out_features=n, in_features=k, input_shift=shift
    )
    rank = logical["up"].shape[1]
    assert weights.precision == "int4"
    assert torch.equal(weights.codes, logical["codes"])
    assert torch.equal(weights.wscales, logical["group_scale"])
    assert torch.equal(weights.smooth_factor, logical["smooth"])
    assert weights.bias is not None
    assert torch.equal(weights.bias, logical["bias_out"])
    assert torch.equal(weights.proj_down[:, :rank], logical["down_unsmoothed"].T)
    assert torch.equal(weights.proj_up[:, :rank], logical["up"])
    assert not weights.proj_down[:, rank:].any()
    true_rank = replace(weights, proj_down=weights.proj_down[:, :rank], proj_up=weights.proj_up[:, :rank])
    written = svdquant_tensors(case, true_rank)
    assert written.keys() == packed.keys()
    assert all(same_bytes(written[name], packed[name]) for name in packed)


@pytest.mark.parametrize("case", ["tensor_scale", "channel_scale"])
def test_golden_nvfp4_layers_both_ways(case: str, tmp_path: Path) -> None:
    logical, packed = golden_case("svdq_nvfp4", case)
    weights = read_svdquant_linear(file_of(tmp_path, packed), case)
    assert weights.precision == "nvfp4"
    assert torch.equal(weights.codes, logical["codes"])
    assert same_bytes(weights.wscales, logical["micro_scale"])
    if case == "tensor_scale":
        assert weights.wtscale == logical["outer_scale"].float()
        assert weights.wcscales is None
    else:
        assert weights.wcscales is not None
        assert torch.equal(weights.wcscales, logical["outer_scale"])
        assert weights.wtscale is None
    written = svdquant_tensors(case, weights)
    assert written.keys() == packed.keys()
    assert all(same_bytes(written[name], packed[name]) for name in packed)


@pytest.mark.parametrize(("case", "splits"), [("adanorm_zero", 6), ("adanorm_single", 3), ("t5_linear", 1)])
def test_golden_weight_only_layers_both_ways(case: str, splits: int, tmp_path: Path) -> None:
    logical, packed = golden_case("awq_w4a16", case)
    weights = read_w4a16(file_of(tmp_path, packed), case, splits=splits)
    codes = logical["codes"] if case == "t5_linear" else (logical["codes_signed"] + 7).to(torch.uint8)
    assert torch.equal(weights.codes, codes)
    assert torch.equal(weights.scales, logical["group_scale"])
    written = w4a16_tensors(case, weights, splits=splits)
    assert written.keys() == packed.keys()
    assert all(same_bytes(written[name], packed[name]) for name in packed)


def test_the_golden_checkpoint_is_reproduced_tensor_by_tensor() -> None:
    path = GOLDEN / "mini_flux_single_block_int4.safetensors"
    file, theirs = open_safetensors(path), golden(path.stem)
    probes = golden("mini_flux_single_block_int4_probes")
    written: dict[str, Tensor] = {}
    for prefix, kind in quantized_layers(file).items():
        if kind == "w4a16":
            written |= w4a16_tensors(prefix, read_w4a16(file, prefix, splits=3), splits=3)
            continue
        layer = prefix.rpartition(".")[2]
        weights = read_svdquant_linear(file, prefix, input_shift=GELU_SHIFT if layer == "mlp_fc2" else 0.0)
        orig = theirs[f"{prefix}.smooth_orig"]
        written |= svdquant_tensors(prefix, weights) | {f"{prefix}.smooth_orig": orig}
        weight, bias = weights.dense()
        assert bias is not None
        found = probes[f"{layer}.x"].double() @ weight.double().T + bias.double()
        assert (found - probes[f"{layer}.y"]).abs().max() < 1e-5
    assert len(written) == 4 * 7 + 4
    assert all(same_bytes(written[name], theirs[name]) for name in written)


@PER_FILE
@given(
    precision=st.sampled_from(["int4", "nvfp4"]),
    n=st.integers(1, 300),
    groups=st.integers(1, 5),
    rank=st.integers(0, 40),
    names=st.sampled_from(["v1", "v2"]),
    seed=st.integers(0, 1000),
)
def test_any_layer_is_read_as_it_was_written(
    precision: Precision, n: int, groups: int, rank: int, names: Names, seed: int, tmp_path: Path
) -> None:
    k = groups * 64
    weights = random_linear(precision, n, k, rank, seed)
    file = file_of(tmp_path, svdquant_tensors("layer", weights, names=names))
    found = read_svdquant_linear(file, "layer", out_features=n, in_features=k)
    assert found.rank == (rank + 15) // 16 * 16
    assert not found.proj_down[:, rank:].any()
    assert not found.proj_up[:, rank:].any()
    assert same_weights(
        replace(found, proj_down=found.proj_down[:, :rank], proj_up=found.proj_up[:, :rank]), weights
    )


@PER_FILE
@given(
    group_size=st.sampled_from([64, 128]),
    quarters=st.integers(1, 20),
    splits=st.sampled_from([1, 3, 6]),
    groups=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_any_weight_only_layer_is_read_as_it_was_written(
    group_size: int, quarters: int, splits: int, groups: int, seed: int, tmp_path: Path
) -> None:
    g = torch.Generator().manual_seed(seed)
    rows, k = 4 * quarters * splits, groups * group_size
    scales, zeros = torch.rand(2, rows, groups, generator=g).half()
    bias = torch.rand(rows, generator=g).half() if seed % 2 else None
    codes = torch.randint(0, 16, (rows, k), generator=g, dtype=torch.uint8)
    weights = W4A16Weights(codes, scales, zeros, bias, group_size)
    file = file_of(tmp_path, w4a16_tensors("layer", weights, splits=splits))
    assert same_weights(read_w4a16(file, "layer", splits=splits), weights)


def test_every_layer_has_its_own_precision_rank_and_kind(tmp_path: Path) -> None:
    tensors = (
        svdquant_tensors("a", random_linear("int4", 128, 128, 16))
        | svdquant_tensors("b", random_linear("int4", 128, 128, 48))
        | svdquant_tensors("c", random_linear("nvfp4", 128, 128, 0), names="v2")
        | golden_case("awq_w4a16", "t5_linear")[1]
    )
    file = file_of(tmp_path, tensors)
    assert quantized_layers(file) == {"a": "svdquant", "b": "svdquant", "c": "svdquant", "t5_linear": "w4a16"}
    headers = [check_svdquant_linear(file, name) for name in "abc"]
    assert [(header.precision, header.rank) for header in headers] == [("int4", 16), ("int4", 48), ("nvfp4", 0)]


def test_a_folder_of_two_files_is_one_checkpoint(tmp_path: Path) -> None:
    blocks = svdquant_tensors("transformer_blocks.0.out_proj", random_linear("int4", 128, 128, 16))
    others = {"x_embedder.weight": torch.randn(4, 4)}
    folder = tmp_path / "svdq-int4-flux"
    folder.mkdir()
    write_safetensors(folder / "transformer_blocks.safetensors", blocks, {})
    with pytest.raises(ProblemError, match=r"svdq-int4-flux has no unquantized_layers\.safetensors"):
        open_checkpoint(folder)
    write_safetensors(folder / "unquantized_layers.safetensors", others, {"kept": "1"})
    (folder / "config.json").write_text('{"num_layers": 1}')
    file = open_checkpoint(folder)
    assert file.path == folder
    assert file.tensors.keys() == blocks.keys() | others.keys()
    assert file.read_config() == {"num_layers": 1}
    assert file.metadata["kept"] == "1"
    assert torch.equal(file.read("x_embedder.weight"), others["x_embedder.weight"])
    assert check_svdquant_linear(file, "transformer_blocks.0.out_proj").rank == 16
    (folder / "config.json").write_text('{"num_layers": 1')
    with pytest.raises(ProblemError, match=r"config\.json is damaged"):
        open_checkpoint(folder)
    write_safetensors(folder / "unquantized_layers.safetensors", others | blocks, {})
    with pytest.raises(ProblemError, match="it is in unquantized_layers"):
        open_checkpoint(folder)


NAN, INFINITY = float("nan"), float("inf")
DAMAGE = {
    "qweight of another type": ("qweight", lambda t: t.to(torch.int16), "int8 of 2 dimensions"),
    "qweight of one dimension": ("qweight", lambda t: t.flatten(), "int8 of 2 dimensions"),
    "unpadded rows": ("qweight", lambda t: t[:100], "multiples of 128 x 64"),
    "too few rows": ("qweight", lambda t: t[:128], r"256 rows of codes, found 128"),
    "no wscales": ("wscales", None, "it is missing"),
    "mxfp4": ("wscales", lambda t: t.to(torch.uint8), "MXFP4"),
    "float64 wscales": ("wscales", lambda t: t.double(), r"16 bit \(int4\).*found float64"),
    "nvfp4 scales of int4 shape": ("wscales", lambda t: t.to(torch.float8_e4m3fn), r"\[8, 256\], .* \[2, 256\]"),
    "NaN scale": ("wscales", lambda t: t.index_fill(0, torch.tensor(1), NAN), "finite numbers"),
    "infinite scale": ("wscales", lambda t: t.index_fill(0, torch.tensor(0), INFINITY), "finite numbers"),
    "no smooth": ("smooth", None, "it is missing"),
    "short smooth": ("smooth", lambda t: t[:64], r"\[128\], found bfloat16 \[64\]"),
    "smooth of 0": ("smooth", torch.zeros_like, "to divide by"),
    "integer bias": ("bias", lambda t: t.to(torch.int32), "found int32"),
    "NaN bias": ("bias", lambda t: t * NAN, "finite numbers"),
    "odd rank": ("lora_down", lambda t: t[:, :10], "rank of 16, 32"),
    "rank without columns": ("lora_down", lambda t: t[:, :0], "rank of 16, 32"),
    "no lora_up": ("lora_up", None, "it is missing"),
    "no lora_down": ("lora_down", None, "it is missing"),
    "ranks that differ": ("lora_up", lambda t: t[:, :8], r"\[256, 16\], found bfloat16 \[256, 8\]"),
    "NaN in the low-rank branch": ("lora_up", lambda t: t * NAN, "finite numbers"),
    "wcscales of K": ("wcscales", lambda t: torch.ones(128), r"\[256\], found float32 \[128\]"),
    "two wtscales": ("wtscale", lambda t: torch.ones(2), r"\[1\], found float32 \[2\]"),
    "infinite wtscale": ("wtscale", lambda t: torch.full((1,), INFINITY), "finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_layer_is_refused_with_file_tensor_and_what_was_expected(damage: str, tmp_path: Path) -> None:
    suffix, change, expected = DAMAGE[damage]
    tensors = svdquant_tensors("blocks.0.fc1", random_linear("int4", 256, 128, 16, seed=1))
    name = f"blocks.0.fc1.{suffix}"
    before = tensors.pop(name, torch.ones(1))
    if change is not None:
        tensors[name] = change(before).contiguous()
    file = file_of(tmp_path, tensors)
    with pytest.raises(ProblemError, match=expected) as refused:
        read_svdquant_linear(file, "blocks.0.fc1", out_features=256, in_features=128)
    what = refused.value.problem.what
    assert "layer.safetensors" in what
    assert "blocks.0.fc1." in what
    assert "expected" in what


def test_nan_and_negative_nvfp4_scales_are_refused(tmp_path: Path) -> None:
    tensors = svdquant_tensors("fc1", random_linear("nvfp4", 128, 128, 16))
    for byte, expected in ((0x7F, "finite numbers"), (0xB8, "negative ones")):
        wscales = tensors["fc1.wscales"].clone()
        wscales.view(torch.uint8)[3, 7] = byte
        with pytest.raises(ProblemError, match=expected):
            read_svdquant_linear(file_of(tmp_path, tensors | {"fc1.wscales": wscales}), "fc1")


def test_both_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    weights = random_linear("int4", 128, 128, 16)
    file = file_of(tmp_path, svdquant_tensors("a", weights) | svdquant_tensors("a", weights, names="v2"))
    with pytest.raises(ProblemError, match="found both"):
        read_svdquant_linear(file, "a")


WEIGHT_ONLY_DAMAGE = {
    "qweight of bytes": ("qweight", lambda t: t.view(torch.int8), "int32 or int16"),
    "half a tile": ("qweight", lambda t: t[:, :100], "groups of 64"),
    "rows that do not split": ("qweight", lambda t: t[:5], "6 equal splits"),
    "no zeros": ("wzeros", None, "missing"),
    "too few groups": ("wscales", lambda t: t[:15], r"16 to 16 rows of 24, found bfloat16 \[15, 24\]"),
    "too many groups": ("wscales", lambda t: torch.cat([t, t]), "16 to 16 rows"),
    "NaN zero": ("wzeros", lambda t: t * NAN, "finite"),
    "short bias": ("bias", lambda t: t[:23], r"\[24\]"),
}  # fmt: skip


@pytest.mark.parametrize("damage", WEIGHT_ONLY_DAMAGE)
def test_a_damaged_weight_only_layer_is_refused(damage: str, tmp_path: Path) -> None:
    suffix, change, expected = WEIGHT_ONLY_DAMAGE[damage]
    tensors = dict(golden_case("awq_w4a16", "adanorm_zero")[1])
    before = tensors.pop(f"adanorm_zero.{suffix}")
    if change is not None:
        tensors[f"adanorm_zero.{suffix}"] = change(before).contiguous()
    with pytest.raises(ProblemError, match=expected) as refused:
        read_w4a16(file_of(tmp_path, tensors), "adanorm_zero", splits=6)
    assert "layer.safetensors" in refused.value.problem.what
    assert "adanorm_zero." in refused.value.problem.what
