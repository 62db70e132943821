"""Files that are damaged, foreign or hostile: each ends in a problem that names the file and what was expected."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.problems import ProblemError, ProblemKind
from engine.safe_json import parse_json
from tests.conftest import REPO

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def raw(header: bytes | dict[str, Any], data: bytes = bytes(24), num_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if num_bytes is None else num_bytes) + text + data


def entry(**changes: Any) -> bytes:
    return raw({"w": GOOD | changes})


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "at least 10 bytes, found 0"),
    "cut in the length": (b"\x10\0\0", "at least 10 bytes, found 3"),
    "cut in the header": (raw({"w": GOOD})[:30], "header of 65 bytes, the file ends after 22"),
    "cut in the data": (raw({"w": GOOD})[:-4], r"'w'.*up to 24, but the data ends at byte 20"),
    "header longer than the file": (raw(b"{}", b"", 1000), "header of 1000 bytes, the file ends after 2"),
    "header too long": (raw(b"{}", b"", 2**63), "at most 16777216 bytes"),
    "bytes after the last tensor": (raw({"w": GOOD}, bytes(25)), "24 bytes of data.*found 25"),
    "no JSON": (raw(b"x" * 20), r"expected '\{'.*found 'xxxx"),
    "no UTF-8": (raw(b'{"\xff":1}'), "not UTF-8"),
    "a list": (raw(b"[]", b""), r"expected '\{'"),
    "something after the object": (raw(b"{}x", b""), "the end"),
    "unknown dtype": (entry(dtype="F4"), r"'w'.*dtype.*'F4'"),
    "dtype of another type": (entry(dtype=4), "string in tensor 'w'"),
    "shape of another dtype": (entry(dtype="F16"), r"'w'.*12 bytes for \(2, 3\) of float16, found 24"),
    "shape that does not fit": (entry(shape=[2, 4]), "32 bytes"),
    "negative size": (entry(shape=[-2, -3]), "whole number from 0 in tensor 'w'"),
    "fractional size": (entry(shape=[2.0, 3]), "whole number from 0 in tensor 'w'"),
    "size in words": (entry(shape=["2", 3]), "whole number from 0 in tensor 'w'"),
    "product beyond 64 bits": (entry(shape=[2**33, 2**33]), r"'w'.*2\^60"),
    "product beyond 64 bits, times 0": (entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), r"2\^60"),
    "number of a thousand digits": (raw(b'{"w":{"shape":[' + b"9" * 1000), "whole number"),
    "seventeen dimensions": (entry(shape=[1] * 17), "at most 16 numbers"),
    "negative offset": (entry(data_offsets=[-24, 0]), "whole number from 0 in tensor 'w'"),
    "offsets in the wrong order": (entry(data_offsets=[24, 0]), "end after they start"),
    "one offset": (entry(data_offsets=[24]), "two data_offsets"),
    "three offsets": (entry(data_offsets=[0, 24, 24]), "at most 2"),
    "offset out of range": (entry(data_offsets=[10**6, 10**6 + 24]), r"'w'.*the data ends at byte 24"),
    "overlapping": (raw({"v": GOOD, "w": GOOD}), r"'[vw]'.*overlaps"),
    "partly overlapping": (raw({"v": GOOD, "w": GOOD | {"data_offsets": [20, 44]}}, bytes(44)), r"'w'.*overlaps"),
    "a hole": (raw({"v": GOOD, "w": GOOD | {"data_offsets": [28, 52]}}, bytes(52)), r"'w'.*hole"),
    "no shape": (raw({"w": {"dtype": "F32", "data_offsets": [0, 24]}}), r"'w'.*dtype, shape and two"),
    "another field": (entry(strides=[1]), "'w'.*each once; found.*strides"),
    "tensor twice": (raw(b'{"w":%s,"w":%s}' % ((json.dumps(GOOD).encode(),) * 2)), "'w'.*twice"),
    "tensor twice, spelled apart": (raw(b'{"w":%s,"\\u0077":%s}' % ((json.dumps(GOOD).encode(),) * 2)), "twice"),
    "field twice": (raw(b'{"w":{"dtype":"F32","dtype":"F32"}}', b""), "each once"),
    "metadata twice": (raw(b'{"__metadata__":{},"__metadata__":{}}', b""), "'__metadata__'.*twice"),
    "metadata key twice": (raw(b'{"__metadata__":{"a":"","a":""}}', b""), "key.*twice"),
    "metadata key twice, spelled apart": (raw(b'{"__metadata__":{"a":"","\\u0061":""}}', b""), "key.*twice"),
    "metadata of numbers": (raw(b'{"__metadata__":{"a":1}}', b""), "expected a string in '__metadata__'"),
    "half a character": (raw(b'{"\\ud800":{}}', b""), "expected a string"),
    "deep nesting": (raw(b'{"w":' + b"[" * 100_000, b""), "expected '{' in tensor 'w'"),
    "deep nesting of objects": (raw(b'{"w":' * 100_000, b""), "'w'"),
    "long name": (raw(b'{"' + b"n" * 2000 + b'":{}}', b""), "names of at most 1024 bytes"),
    "zip": (b"PK\x03\x04" + bytes(100), "pickle.*runs whatever program"),
    "bare pickle": (b"\x80\x02}q\0." + bytes(100), "pickle"),
    "gguf": (b"GGUF\x03" + bytes(100), "a GGUF file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "pointer.*Git LFS"),
    "web page": (b"<!DOCTYPE html><html></html>", "a web page"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_problem_with_its_name_and_what_was_expected(name: str, tmp_path: Path) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProblemError, match=expected) as refused:
        open_safetensors(path)
    problem = refused.value.problem
    assert problem.kind == ProblemKind.FILE
    assert "model.safetensors" in problem.what
    assert problem.todo
    assert len(problem.what) < 500


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".PTH"])
def test_pickles_are_refused_by_name_without_being_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.touch(mode=0)
    with pytest.raises(ProblemError, match=f"model{suffix} is a pickle") as refused:
        open_safetensors(path)
    assert "safetensors" in refused.value.problem.todo


def test_what_is_no_file_is_a_problem(tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path / "nowhere.safetensors", "no file"),
        (tmp_path, "not a file"),
        (Path("nul\0character"), "cannot be read"),
        (tmp_path / ("x" * 5000), "cannot be read"),
    ):
        with pytest.raises(ProblemError, match=expected):
            open_safetensors(path)
    for path in (tmp_path / "nowhere", Path("nul\0character"), tmp_path / ("x" * 5000)):
        with pytest.raises(ProblemError):
            open_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ProblemError, match="not a file"):
        open_safetensors(tmp_path / "pipe.safetensors")


def test_sound_files_of_unusual_looks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    spaced = b'\t{ "w" : { "data_offsets" : [ 0 , 24 ] , "shape" : [2,3] , "dtype" : "\\u004632" } }  \n'
    path.write_bytes(raw(spaced))
    assert open_safetensors(path).read("w").shape == (2, 3)
    path.write_bytes(raw(b"{}", b""))
    assert open_safetensors(path).tensors == {}
    write_safetensors(path, {"none": torch.zeros(0, 3), "also none": torch.zeros(5, 0), "w": torch.ones(2)}, {})
    assert open_safetensors(path).read("none").shape == (0, 3)


BAD_JSON: dict[str, tuple[str | bytes, str]] = {
    "twice": ('{"a": 1, "a": 2}', "'a' stands in it twice"),
    "deep": ("[" * 33 + "]" * 33, "deeper than 32"),
    "very deep": ("[" * 1_000_000, "deeper than 32"),
    "long": (" " * (1 << 20) + "1", "at most 1048576"),
    "NaN": ("[NaN]", "NaN is not a number"),
    "infinite": ("[-Infinity]", "Infinity is not a number"),
    "too large": ("[1e999]", "too large"),
    "many digits": ("9" * 5000, "too large"),
    "cut": ('{"a": ', "not valid JSON"),
    "no text": (b"\xff\xfe", "UTF-8"),
    "nothing": ("", "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_a_problem_that_says_where(name: str) -> None:
    text, expected = BAD_JSON[name]
    with pytest.raises(ProblemError, match=expected) as refused:
        parse_json(text, "config.json of x")
    assert refused.value.problem.what.startswith("config.json of x is damaged")


def test_sound_json_is_itself() -> None:
    text = '{"a": [1, 2.5, "[[[[", null, true], "b": {"a": -3e2}}'
    assert parse_json(text, "x") == json.loads(text)
    assert parse_json("[" * 32 + "]" * 32, "x") is not None


SIZE = (16 << 20) - 64
EMPTY_TENSOR = b'"%07d":{"dtype":"U8","shape":[0,300,300,300,300,300],"data_offsets":[0,0]},'
HOSTILE_HEADERS = {
    "brackets": b'{"a":' + b"[" * SIZE,
    "lists": b'{"a":[' + b"[]," * (SIZE // 3) + b"]}",
    "only brackets": b"[" * SIZE,
    "escapes": b'{"__metadata__":{"a":"' + b"\\n" * (SIZE // 2 - 40) + b'"},"x":3}',
    "a wide character": b'{"__metadata__":{"a":"\xf0\x9f\x98\x80' + b"a" * (SIZE - 40) + b'"},"x":3}',
    "metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(1_000_000)) + b"}}",
    "tensors": b"{" + b"".join(EMPTY_TENSOR % i for i in range(32_767)) + b'"a":4}',
    "too many tensors": b"{" + b"".join(EMPTY_TENSOR % i for i in range(200_000)) + b'"a":4}',
    "spaces": b"{" + b" " * (SIZE - 2) + b"x",
    "a name": b'{"' + b"n" * (SIZE - 3),
    "dimensions": b'{"a":{"shape":[' + b"1," * (SIZE // 2 - 10),
    "digits": b'{"a":{"shape":[' + b"1" * (SIZE - 20),
}
HOSTILE_JSON = ["[" + "[]," * 340_000, "[" + "1," * 500_000, '{"' + "a" * 1_000_000, "[" * 1_000_000]
MEASURE = """
import re, sys
from pathlib import Path
from engine.checkpoints.checkpoint import open_checkpoint
from engine.safe_json import parse_json
from engine.problems import ProblemError
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        parse_json(path.read_text(), path.name) if path.suffix == ".json" else open_checkpoint(path)
    except ProblemError:
        print(path.name, peak() - before)
    else:
        raise SystemExit(f"{path.name} was accepted")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_a_refusal_takes_at_most_64_mib(tmp_path: Path) -> None:
    """Headers of 16 MiB that a general parser would make gigabytes of. The peak of a process of its own counts."""
    for name, header in HOSTILE_HEADERS.items():
        (tmp_path / f"{name}.safetensors").write_bytes(raw(header, b""))
    for number, text in enumerate(HOSTILE_JSON):
        (tmp_path / f"{number}.json").write_text(text)
    program = [sys.executable, "-c", MEASURE, str(tmp_path)]
    lines = subprocess.run(program, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(HOSTILE_HEADERS) + len(HOSTILE_JSON)
    assert int(lines[-1].rpartition(" ")[2]) <= 64 << 20, lines
