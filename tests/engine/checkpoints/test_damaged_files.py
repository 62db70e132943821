"""Thousands of damaged files: each is read as what it then says, or refused as a problem. Nothing else happens.

The seeds are fixed, so a failure names a file that can be made again: test id, then the seed in the message.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.safetensors_file import write_safetensors
from engine.checkpoints.svdquant_file import quantized_layers, read_svdquant_linear, read_w4a16
from engine.checkpoints.svdquant_tensors import svdquant_tensors
from engine.problems import ProblemError, ProblemKind
from tests.engine.checkpoints.test_svdquant_file import golden_case, random_linear

PER_KIND = 300
DTYPES = ["BOOL", "U8", "I8", "I16", "I32", "F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", ""]
NUMBERS = [0, 1, 2, 15, 16, 17, 63, 64, 127, 128, 129, 255, 256, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -1]

Header = dict[str, Any]


@cache
def sound_file(folder: Path) -> bytes:
    """Every kind of layer at its smallest: 60 KiB."""
    tensors = (
        svdquant_tensors("a.int4", random_linear("int4", 128, 128, 16, seed=1))
        | svdquant_tensors("b.nvfp4", random_linear("nvfp4", 128, 128, 32, seed=3), names="v2")
        | svdquant_tensors("c.channels", random_linear("nvfp4", 128, 128, 0, seed=2))
        | golden_case("awq_w4a16", "adanorm_single")[1]
        | golden_case("awq_w4a16", "t5_linear")[1]
        | {"plain.weight": torch.ones(8, 8), "plain.bias": torch.zeros(8)}
    )
    path = folder / "sound.safetensors"
    write_safetensors(path, tensors, {"config": json.dumps({"num_layers": 1, "axes": [16, 56, 56]}), "note": "é"})
    return path.read_bytes()


def split(content: bytes) -> tuple[bytes, bytes]:
    (num_bytes,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + num_bytes], content[8 + num_bytes :]


def join(header: bytes | Header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def cut_short(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([rng.randrange(16), rng.randrange(4096), rng.randrange(len(content))])]


def change_bytes_anywhere(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def change_bytes_of_the_header(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    changed = bytearray(header)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        changed[rng.randrange(len(changed))] = rng.choice(
            b'{}[]",:\\0123456789-.eEuntf \x00\xff' + bytes(range(256))
        )
    return join(bytes(changed), data)


def move_pieces_of_the_header(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    start, end = sorted(rng.randrange(len(header)) for _ in range(2))
    piece, at = header[start : min(end, start + rng.choice([4, 64, 1024]))], rng.randrange(len(header))
    doing = rng.choice(["insert", "delete", "repeat"])
    if doing == "delete":
        return join(header[:start] + header[start + len(piece) :], data)
    return join(header[:at] + piece * (50 if doing == "repeat" else 1) + header[at:], data)


def change_the_length(content: bytes, rng: random.Random) -> bytes:
    header, _ = split(content)
    near = len(header) + rng.randrange(-300, 300)
    return struct.pack("<Q", rng.choice([near, rng.choice(NUMBERS[:-3]), rng.randrange(2**64)])) + content[8:]


def change_what_the_header_says(content: bytes, rng: random.Random) -> bytes:
    text, data = split(content)
    header: Header = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        match rng.randrange(8):
            case 0:
                entry["dtype"] = rng.choice([*DTYPES, 5, None, ["F32"]])
            case 1:
                entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]
            case 2 if isinstance(entry.get("shape"), list):
                entry["shape"] = list(reversed(entry["shape"])) if rng.random() < 0.5 else [*entry["shape"], 1]
            case 3:
                entry["data_offsets"] = [rng.choice([*NUMBERS, len(data)]) for _ in range(rng.choice([1, 2, 2, 3]))]
            case 4:
                other = rng.choice([key for key in header if key != "__metadata__"])
                header[name], header[other] = header[other], header[name]
            case 5:
                del header[name]
            case 6:
                header[name] = rng.choice([None, 1, "x", [], {}, {"dtype": "F32"}, [[[]]]])
                return join(header, data)
            case _:
                header["__metadata__"] = rng.choice(
                    [None, 1, [], {"config": 1}, {"config": "{"}, {"config": "[" * 99}]
                )
    return join(header, data)


def store_other_tensors(content: bytes, rng: random.Random) -> bytes:
    """Sound containers whose tensors do not fit one another: only the layers' own checks are left."""
    text, data = split(content)
    header: Header = json.loads(text)
    names = [key for key in header if key != "__metadata__"]
    filled, changed, parts = 0, rng.sample(names, rng.choice([1, 1, 2, 4])), []
    for name in names:
        entry = header[name]
        start, end = entry["data_offsets"]
        part = data[start:end]
        if name in changed:
            match rng.randrange(5):
                case 0:  # random bytes: NaN, infinity, negative scales
                    part = rng.randbytes(len(part))
                case 1:  # another type of the same size
                    sizes = [["I8", "U8", "F8_E4M3", "F8_E5M2"], ["BF16", "F16", "I16"], ["F32", "I32"]]
                    same = next((group for group in sizes if entry["dtype"] in group), [entry["dtype"]])
                    entry["dtype"] = rng.choice(same)
                case 2:  # another shape of the same size
                    entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]])
                case 3:  # fewer rows
                    rows = entry["shape"][0]
                    keep = rng.randrange(rows + 1)
                    part = part[: len(part) // max(rows, 1) * keep]
                    entry["shape"] = [keep, *entry["shape"][1:]]
                case _:  # gone
                    del header[name]
                    continue
        entry["data_offsets"] = [filled, filled + len(part)]
        filled += len(part)
        parts.append(part)
    return join(header, b"".join(parts))


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    cut_short,
    change_bytes_anywhere,
    change_bytes_of_the_header,
    move_pieces_of_the_header,
    change_the_length,
    change_what_the_header_says,
    store_other_tensors,
]


def use(path: Path) -> None:
    """Read all there is, as a loader would, and compute with it."""
    file = open_checkpoint(path)
    file.read_config()
    for prefix, kind in quantized_layers(file).items():
        if kind == "svdquant":
            weight, _ = read_svdquant_linear(file, prefix, input_shift=11 / 64).dense()
        else:
            weight = read_w4a16(file, prefix, splits=3 if prefix == "adanorm_single" else 1).dense()
        assert weight.dtype == torch.float32
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape


def test_the_sound_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(sound_file(tmp_path))
    use(path)
    assert len(quantized_layers(open_checkpoint(path))) == 5


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_read_or_is_a_problem(
    damage: Callable[[bytes, random.Random], bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    sound = sound_file(folder)
    path = folder / "damaged.safetensors"
    refused = 0
    for seed in range(PER_KIND):
        path.write_bytes(damage(sound, random.Random(f"{damage.__name__} {seed}")))
        try:
            use(path)
        except ProblemError as error:
            problem = error.problem
            assert problem.kind == ProblemKind.FILE, (seed, problem)
            assert "damaged.safetensors" in problem.what, (seed, problem)
            assert len(problem.what) < 1000, (seed, problem)
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} of {damage.__name__} was no problem but {error!r}") from error
    assert refused > PER_KIND // 4  # the damage is damage
