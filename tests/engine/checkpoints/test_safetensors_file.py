"""safetensors files in and out: the public library is the oracle, and what is written is written whole or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints.safetensors_file import SafetensorsWriter, open_safetensors, write_safetensors
from engine.checkpoints.safetensors_header import DTYPES
from engine.problems import ProblemError, ProblemKind
from tests.engine.checkpoints.test_svdquant_layout import random_bytes, same_bytes

LAYOUT: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"a": (torch.float32, (2,))}
METADATA = {"config": '{"a": 1}', "ключ\n": 'quote " and \U0001f600'}


def assorted() -> dict[str, torch.Tensor]:
    tensors = {str(dtype): random_bytes(3, 5, dtype=dtype) for dtype in DTYPES.values() if dtype != torch.bool}
    return tensors | {"bool": torch.tensor([True, False]), "empty": torch.zeros(0, 4), "number": torch.tensor(2.5)}


def test_what_we_write_the_public_library_reads(tmp_path: Path) -> None:
    tensors = assorted()
    write_safetensors(tmp_path / "ours.safetensors", tensors, METADATA)
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(same_bytes(theirs[name], tensors[name]) for name in tensors)


def test_what_the_public_library_writes_we_read(tmp_path: Path) -> None:
    tensors = assorted()
    save_file(tensors, tmp_path / "theirs.safetensors", METADATA)
    file = open_safetensors(tmp_path / "theirs.safetensors")
    assert file.metadata == METADATA
    assert file.read_config() == {"a": 1}
    assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert all(same_bytes(file.read(name), tensors[name]) for name in tensors)


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = assorted()
    write_safetensors(tmp_path / "a", tensors, METADATA)
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(METADATA.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_are_written_as_they_are_seen(tmp_path: Path) -> None:
    view = torch.arange(12.0).view(3, 4).T[1:]
    write_safetensors(tmp_path / "a", {"view": view}, {})
    assert torch.equal(open_safetensors(tmp_path / "a").read("view"), view)


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.zeros(2)}, {})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(path, LAYOUT, {}):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="1 tensors were not written"), SafetensorsWriter(path, LAYOUT, {}):
        pass
    with pytest.raises(ValueError, match="once"), SafetensorsWriter(path, LAYOUT, {}) as writer:
        writer.write("a", torch.zeros(3))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_folder_that_is_not_there_is_a_problem_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(ProblemError) as refused:
        write_safetensors(tmp_path / "nowhere" / "model.safetensors", {"a": torch.zeros(2)}, {})
    assert refused.value.problem.kind == ProblemKind.MACHINE
    assert "model.safetensors cannot be written" in refused.value.problem.what


def test_a_missing_tensor_and_a_file_that_changed_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.zeros(1000)}, {})
    file = open_safetensors(path)
    with pytest.raises(ProblemError, match=r"model.safetensors.*'b'.*missing"):
        file.read("b")
    os.truncate(path, 500)
    with pytest.raises(ProblemError, match=r"model.safetensors was changed.*'a'"):
        file.read("a")
    path.unlink()
    with pytest.raises(ProblemError, match="no file"):
        file.read("a")


@pytest.mark.parametrize("header_bytes", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, header_bytes: int) -> None:
    path = tmp_path / "model.safetensors"
    for padding in range(header_bytes):
        write_safetensors(path, {"a": torch.zeros(2)}, {"note": "x" * padding})
        if path.read_bytes()[:2] == header_bytes.to_bytes(2, "little"):
            break
    assert path.read_bytes()[:8] == header_bytes.to_bytes(8, "little")
    assert list(open_safetensors(path).tensors) == ["a"]
