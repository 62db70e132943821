"""The layouts against tensors that the public packer made, both ways, and against themselves at other sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoints import svdquant_layout as layout
from tests.golden import golden

PLAIN = ["plain", "fc2shift"]
SIZES = st.sampled_from([128, 256, 384, 640])
RANKS = st.sampled_from([16, 32, 48, 128])


def random_bytes(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    bytes_a, bytes_b = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bytes_a, bytes_b)


@pytest.mark.parametrize("case", PLAIN)
def test_int4_tensors_are_those_of_the_public_packer(case: str) -> None:
    tensors = golden("svdq_int4")
    logical = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{case}.logical.")}
    packed = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{case}.packed.")}
    for pack, unpack, ours, theirs in (
        (layout.pack_channels, layout.unpack_channels, logical["bias_out"], packed["bias"]),
        (layout.pack_channels, layout.unpack_channels, logical["smooth"], packed["smooth"]),
        (layout.pack_wscales_int4, layout.unpack_wscales_int4, logical["group_scale"], packed["wscales"]),
        (layout.pack_proj_down, layout.unpack_proj_down, logical["down_unsmoothed"].T, packed["lora_down"]),
        (layout.pack_proj_up, layout.unpack_proj_up, logical["up"], packed["lora_up"]),
    ):
        assert same_bytes(pack(ours), theirs)
        assert same_bytes(unpack(theirs), ours)
    assert same_bytes(layout.pack_qweight(logical["codes"]), packed["qweight"])
    assert same_bytes(layout.unpack_qweight(packed["qweight"], signed=True), logical["codes"])


@pytest.mark.parametrize("case", ["tensor_scale", "channel_scale"])
def test_nvfp4_tensors_are_those_of_the_public_packer(case: str) -> None:
    tensors = golden("svdq_nvfp4")
    codes, qweight = tensors[f"{case}.logical.codes"], tensors[f"{case}.packed.qweight"]
    assert same_bytes(layout.pack_qweight(codes), qweight)
    assert same_bytes(layout.unpack_qweight(qweight, signed=False), codes)
    scales, packed = tensors[f"{case}.logical.micro_scale"], tensors[f"{case}.packed.wscales"]
    assert same_bytes(layout.pack_wscales_nvfp4(scales), packed)
    assert same_bytes(layout.unpack_wscales_nvfp4(packed), scales)


@pytest.mark.parametrize(("case", "splits"), [("adanorm_zero", 6), ("adanorm_single", 3)])
def test_modulation_codes_are_those_of_the_public_packer(case: str, splits: int) -> None:
    tensors = golden("awq_w4a16")
    codes = (tensors[f"{case}.logical.codes_signed"] + 7).to(torch.uint8)
    packed = tensors[f"{case}.packed.qweight"]
    assert same_bytes(layout.pack_awq(layout.interleave_splits(codes, splits)), packed)
    assert same_bytes(layout.deinterleave_splits(layout.unpack_awq(packed), splits), codes)


def test_t5_codes_are_those_of_the_public_packer() -> None:
    tensors = golden("awq_w4a16")
    codes, packed = tensors["t5_linear.logical.codes"], tensors["t5_linear.packed.qweight"]
    assert same_bytes(layout.pack_awq(codes, torch.int16), packed)
    assert same_bytes(layout.unpack_awq(packed), codes)


def test_the_rotary_table_is_that_of_the_public_packer() -> None:
    tensors = golden("rotary_pack")
    table, packed = tensors["logical.sincos"].reshape(32, 128), tensors["packed"].reshape(32, 128)
    assert same_bytes(layout.pack_rotary(table), packed)
    assert same_bytes(layout.unpack_rotary(packed), table)


@settings(max_examples=25, deadline=None)
@given(n=SIZES, k=SIZES, rank=RANKS, seed=st.integers(0, 2**31))
def test_every_packing_is_undone_exactly_at_every_size(n: int, k: int, rank: int, seed: int) -> None:
    """And the other way: any packed bytes are the packing of what they unpack to, so no bit is lost or unused."""
    h = random_bytes(n, k // 64, dtype=torch.bfloat16, seed=seed)
    assert same_bytes(layout.unpack_wscales_int4(layout.pack_wscales_int4(h)), h)
    micro = random_bytes(n, k // 16, dtype=torch.float8_e4m3fn, seed=seed)
    assert same_bytes(layout.unpack_wscales_nvfp4(layout.pack_wscales_nvfp4(micro)), micro)
    vector = random_bytes(n, dtype=torch.float16, seed=seed)
    assert same_bytes(layout.unpack_channels(layout.pack_channels(vector)), vector)
    down, up = (
        random_bytes(k, rank, dtype=torch.int16, seed=seed),
        random_bytes(n, rank, dtype=torch.int16, seed=seed),
    )
    assert same_bytes(layout.unpack_proj_down(layout.pack_proj_down(down)), down)
    assert same_bytes(layout.unpack_proj_up(layout.pack_proj_up(up)), up)
    qweight = random_bytes(n, k // 2, dtype=torch.int8, seed=seed)
    signed, unsigned = (layout.unpack_qweight(qweight, signed=s) for s in (True, False))
    assert same_bytes(layout.pack_qweight(signed), qweight)
    assert same_bytes(layout.pack_qweight(unsigned), qweight)
    assert int(signed.min()) >= -8
    assert int(signed.max()) <= 7
    awq = random_bytes(n // 4, k // 2, dtype=torch.int32, seed=seed)
    assert same_bytes(layout.pack_awq(layout.unpack_awq(awq)), awq)
    table = random_bytes(n, k, dtype=torch.int32, seed=seed).float()
    assert same_bytes(layout.unpack_rotary(layout.pack_rotary(table)), table)
    rows = random_bytes(n * 6, 3, seed=seed)
    assert same_bytes(layout.deinterleave_splits(layout.interleave_splits(rows, 6), 6), rows)


@pytest.mark.parametrize("shape", [(100, 128), (128, 64), (128,)])
def test_sizes_that_need_padding_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of"):
        layout.pack_qweight(torch.zeros(shape, dtype=torch.int8))
