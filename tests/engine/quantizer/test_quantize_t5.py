"""A T5 encoder in the public 4-bit format: read back, it embeds nearly the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.events import Cancelled, Event, Finished, Notice
from engine.problems import ProblemError
from engine.quantizer.quantize_model import quantize_model
from engine.requests import QuantizeRequest
from engine.text.t5 import T5Encoder
from tests.end_to_end.tiny_bundle import T5, WORDS, make_tiny_bundle, write_t5
from tests.tolerances import relative_error

IDS = [3, 9, 14, 8, 1, 0, 0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose T5 is as wide as groups of 128 need."""
    from transformers import T5Config, T5EncoderModel

    path = make_tiny_bundle(tmp_path_factory.mktemp("t5") / "tiny")
    config = {**T5, "d_model": 128, "d_kv": 32, "d_ff": 256}
    torch.manual_seed(3)
    network = T5EncoderModel(T5Config(**config))
    tensors = {
        name: weight.detach().half()
        for name, weight in network.named_parameters()
        if name != "encoder.embed_tokens.weight"
    }
    write_safetensors(path / "t5.safetensors", tensors, {"config": json.dumps(config)})
    return path


def run(source: Path, out: Path, **fields: Any) -> list[Event]:
    return list(quantize_model(QuantizeRequest(str(source), str(out), **fields)))


def embeds(path: Path) -> torch.Tensor:
    return T5Encoder(open_safetensors(path), torch.device("cpu"), torch.float32).encode(IDS)


def test_with_prompts_it_embeds_nearly_the_same(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "\n".join(f"a {word} in the {other}" for word in WORDS for other in WORDS)
    )
    out = tmp_path / "t5-int4.safetensors"
    final = run(folder / "t5.safetensors", out, prompts=str(tmp_path / "prompts.txt"))[-1]
    assert isinstance(final, Finished)
    assert len(final.result["per_layer"]) == 2 * 7
    for layer in final.result["per_layer"]:
        assert layer["error_final"] < 0.8 * layer["error_rtn"]
    run(folder / "t5.safetensors", tmp_path / "rtn.safetensors", rounding="nearest")
    gptq, nearest = (
        relative_error(embeds(path), embeds(folder / "t5.safetensors"))
        for path in (out, tmp_path / "rtn.safetensors")
    )
    assert gptq < 0.6 * nearest
    assert nearest < 0.3


def test_the_file_has_the_public_names_types_and_padding(folder, tmp_path):
    out = tmp_path / "q.safetensors"
    run(folder / "t5.safetensors", out)
    file = open_safetensors(out)
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    assert (file.info(f"{name}.qweight").dtype, file.info(f"{name}.qweight").shape) == (torch.int16, (32, 256))
    assert file.info(f"{name}.scales").shape == file.info(f"{name}.scaled_zeros").shape == (8, 128)
    assert f"{name}.weight" not in file.tensors
    assert file.info("shared.weight").dtype == torch.float16
    assert json.loads(file.metadata["config"])["d_model"] == 128


def test_without_a_bundle_it_rounds_to_nearest_and_says_so(folder, tmp_path):
    source = tmp_path / "alone.safetensors"
    shutil.copy(folder / "t5.safetensors", source)
    events = run(source, tmp_path / "q.safetensors")
    assert any(isinstance(event, Notice) for event in events)
    assert relative_error(embeds(tmp_path / "q.safetensors"), embeds(source)) < 0.3


def test_the_same_source_gives_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        run(folder / "t5.safetensors", tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_cancel_leaves_nothing(folder, tmp_path):
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 100

    request = QuantizeRequest(str(folder / "t5.safetensors"), str(tmp_path / "q.safetensors"))
    assert list(quantize_model(request, cancelled))[-1] == Cancelled()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_done_is_a_problem(folder, tmp_path):
    with pytest.raises(ProblemError, match="nvfp4"):
        run(folder / "t5.safetensors", tmp_path / "q.safetensors", precision="nvfp4")
    with pytest.raises(ProblemError, match="4-bit already"):
        run(write_t5(tmp_path / "4bit.safetensors", four_bit=True), tmp_path / "q.safetensors")
    with pytest.raises(ProblemError, match="multiple of 128"):
        run(write_t5(tmp_path / "narrow.safetensors"), tmp_path / "q.safetensors")
