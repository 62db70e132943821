"""Tokenizers and text encoders, held to transformers' own way of loading them."""

from __future__ import annotations

import json

import pytest
import torch

from engine.checkpoints.safetensors_file import open_safetensors, write_safetensors
from engine.problems import ProblemError
from engine.text.clip import ClipEncoder
from engine.text.prompts import PromptEmbeds, PromptMemory, TextEncoders
from engine.text.t5 import T5Encoder
from engine.text.tokenizer import PromptTokenizer
from tests.end_to_end import tiny_bundle

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return {
        "t5": tiny_bundle.write_t5(folder / "t5.safetensors"),
        "t5_4bit": tiny_bundle.write_t5(folder / "t5-4bit.safetensors", four_bit=True),
        "clip": tiny_bundle.write_clip(folder / "clip.safetensors"),
        "tokenizer": tiny_bundle.tiny_tokenizer(folder / "tokenizer.json"),
    }


def load(path):
    file = open_safetensors(path)
    return {name: file.read(name) for name in file.tensors}


def test_a_prompt_is_padded_behind_its_end_token(files):
    tokenizer = PromptTokenizer(files["tokenizer"], 8, pad_id=0)
    ids = tokenizer.encode("a Red fox")
    assert ids[3:] == [1, 0, 0, 0, 0]
    assert tokenizer.encode("") == [1] + [0] * 7


def test_a_long_prompt_keeps_its_end_token(files):
    ids = PromptTokenizer(files["tokenizer"], 8, pad_id=0).encode("fox " * 100)
    assert len(ids) == 8
    assert ids[-1] == 1
    assert 0 not in ids


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"model": {"type": "BPE"}}', b"\xff\xfe\x00"])
def test_a_damaged_tokenizer_is_a_problem(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ProblemError, match="not a tokenizer"):
        PromptTokenizer(path, 8, 0)


def test_t5_gives_what_transformers_gives(files):
    from transformers import T5Config, T5EncoderModel

    ids = [5, 9, 12, 1, 0, 0]
    oracle = T5EncoderModel(T5Config(**tiny_bundle.T5)).eval()
    state = {name: tensor.float() for name, tensor in load(files["t5"]).items()}
    oracle.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    expected = oracle(input_ids=torch.tensor([ids])).last_hidden_state
    embeds = T5Encoder(open_safetensors(files["t5"]), CPU, torch.float32).encode(ids)
    assert embeds.shape == (1, 6, 64)
    assert torch.allclose(embeds, expected, atol=1e-5)


def test_a_4bit_t5_gives_what_its_expanded_weights_give(files):
    from transformers import T5Config, T5EncoderModel

    ids, file = [5, 9, 12, 1, 0, 0], open_safetensors(files["t5_4bit"])
    oracle = T5EncoderModel(T5Config(**json.loads(file.metadata["config"]))).eval()
    state = {name: tensor.float() for name, tensor in load(files["t5_4bit"]).items() if "qweight" not in name}
    state = {name: tensor for name, tensor in state.items() if not name.endswith(("scales", "scaled_zeros"))}
    for name, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear):
            state[f"{name}.weight"] = tiny_bundle.random_w4a16(module.out_features, module.in_features).dense()
    oracle.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    expected = oracle(input_ids=torch.tensor([ids])).last_hidden_state
    assert torch.allclose(T5Encoder(file, CPU, torch.float32).encode(ids), expected, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_gives_what_transformers_gives_with_either_spelling(files, tmp_path, prefix):
    from transformers import CLIPTextConfig, CLIPTextModel

    bare = {name.removeprefix("text_model."): tensor for name, tensor in load(files["clip"]).items()}
    path = tmp_path / "clip.safetensors"
    metadata = {"config": json.dumps(tiny_bundle.CLIP)}
    write_safetensors(path, {prefix + name: tensor for name, tensor in bare.items()}, metadata)
    ids = [5, 9, 1, 0]
    oracle = CLIPTextModel(CLIPTextConfig(**tiny_bundle.CLIP)).eval()
    names = set(oracle.state_dict())
    oracle.load_state_dict(
        {(name if name in names else f"text_model.{name}"): tensor.float() for name, tensor in bare.items()},
        strict=False,
    )
    expected = oracle(input_ids=torch.tensor([ids])).pooler_output
    pooled = ClipEncoder(open_safetensors(path), CPU, torch.float32).encode(ids)
    assert pooled.shape == (1, 32)
    assert torch.allclose(pooled, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 10**9}, "num_layers"),
        ({"d_model": -1}, "d_model"),
        ({"d_ff": "many"}, "d_ff"),
        ({"d_ff": 96}, "expected the shape"),
        ({"num_layers": 3}, "missing"),
        ({"feed_forward_proj": "gated-evil"}, "feed_forward_proj"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance"),
    ],
)
def test_a_t5_file_that_contradicts_its_config_is_a_problem(files, tmp_path, change, words):
    path = tmp_path / "t5.safetensors"
    write_safetensors(path, load(files["t5"]), {"config": json.dumps({**tiny_bundle.T5, **change})})
    with pytest.raises(ProblemError, match=words):
        T5Encoder(open_safetensors(path), CPU, torch.float32)


def test_an_encoder_that_makes_no_numbers_is_a_problem(files, tmp_path):
    tensors = load(files["t5"])
    tensors["shared.weight"] = torch.full_like(tensors["shared.weight"], float("nan"))
    path = tmp_path / "t5.safetensors"
    write_safetensors(path, tensors, {"config": json.dumps(tiny_bundle.T5)})
    with pytest.raises(ProblemError, match="not numbers"):
        T5Encoder(open_safetensors(path), CPU, torch.float32).encode([5, 1])


def test_cancelling_stops_between_layers(files):
    class StopError(Exception):
        pass

    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise StopError

    encoder = T5Encoder(open_safetensors(files["t5"]), CPU, torch.float32)
    with pytest.raises(StopError):
        encoder.encode([5, 1], check)
    encoder.encode([5, 1])  # nothing of the stopped call is left


def test_a_tokenizer_of_another_encoder_is_a_problem(files, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({str(i): i for i in range(100)}, unk_token="0")).save(str(tmp_path / "big.json"))
    small = PromptTokenizer(files["tokenizer"], 8, 0)
    big = PromptTokenizer(tmp_path / "big.json", 8, 0)
    t5 = T5Encoder(open_safetensors(files["t5"]), CPU, torch.float32)
    clip = ClipEncoder(open_safetensors(files["clip"]), CPU, torch.float32)
    with pytest.raises(ProblemError, match="do not belong together"):
        TextEncoders(t5, clip, big, small)
    with pytest.raises(ProblemError, match="CLIP takes 16 tokens"):
        TextEncoders(t5, clip, small, PromptTokenizer(files["tokenizer"], 20, 0))


@pytest.mark.parametrize(
    ("vocabulary", "pad_id", "words"),
    [({"zzz": 100_000}, 0, "do not belong together"), ({"zzz": 0}, 64, "do not belong together")],
    ids=["few pieces with high numbers", "padding"],
)
def test_the_largest_number_of_a_token_counts(files, tmp_path, vocabulary, pad_id, words):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel(vocabulary, unk_token="zzz")).save(str(tmp_path / "other.json"))
    good = PromptTokenizer(files["tokenizer"], 8, 0)
    other = PromptTokenizer(tmp_path / "other.json", 8, pad_id)
    t5 = T5Encoder(open_safetensors(files["t5"]), CPU, torch.float32)
    clip = ClipEncoder(open_safetensors(files["clip"]), CPU, torch.float32)
    for pair in ((other, good), (good, other)):
        with pytest.raises(ProblemError, match=words):
            TextEncoders(t5, clip, *pair)


def test_a_special_token_the_encoder_does_not_know_is_a_problem(files, tmp_path):
    content = json.loads(files["tokenizer"].read_text())
    content["post_processor"]["special_tokens"]["</s>"]["ids"] = [999]
    (tmp_path / "special.json").write_text(json.dumps(content))
    special = PromptTokenizer(tmp_path / "special.json", 8, 0)
    t5 = T5Encoder(open_safetensors(files["t5"]), CPU, torch.float32)
    clip = ClipEncoder(open_safetensors(files["clip"]), CPU, torch.float32)
    good = PromptTokenizer(files["tokenizer"], 8, 0)
    for pair in ((special, good), (good, special)):
        with pytest.raises(ProblemError, match="number 999"):
            TextEncoders(t5, clip, *pair).encode("fox")


def test_a_tokenizer_without_a_piece_for_unknown_words_is_a_problem(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(tmp_path / "small.json"))
    with pytest.raises(ProblemError, match="cannot turn this prompt into tokens"):
        PromptTokenizer(tmp_path / "small.json", 8, 0).encode("zzz")


def test_asking_whether_a_prompt_is_known_changes_nothing():
    memory = PromptMemory(size=2)
    for word in ("a", "b"):
        memory.put(word, PromptEmbeds(torch.zeros(1), torch.zeros(1)))
    assert "a" in memory
    memory.put("c", PromptEmbeds(torch.zeros(1), torch.zeros(1)))
    assert "a" not in memory


def test_the_last_prompts_are_remembered_and_older_ones_forgotten():
    memory = PromptMemory(size=2)
    for word in ("a", "b"):
        memory.put(word, PromptEmbeds(torch.zeros(1), torch.zeros(1)))
    assert memory.get("a") is not None  # used again: now b is the oldest
    memory.put("c", PromptEmbeds(torch.zeros(1), torch.zeros(1)))
    assert memory.get("b") is None
    assert memory.get("a") is not None
