"""Whatever computes it, it is the same attention; the fastest is found, and a wavering clock decides nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.layers import attention_backend
from engine.layers.attention_backend import BACKENDS, Backend, attend, attend_by, choices, fastest, size_class
from engine.reference.attention_fp16 import attention_fp16
from tests.tolerances import relative_error

FLUX = size_class(0, 24, 128, 4608, torch.float16)


def heads(tokens: int, device: str, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    qkv = torch.randn(1, tokens, 3, 4, 128, dtype=dtype, device=device)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[Backend, float | Exception]], None]:
    """Says how long each implementation takes, or what it raises. No card is needed."""

    def say(ms: dict[Backend, float | Exception]) -> None:
        def graph(run: object) -> Backend:
            backend: Backend = run.args[0]  # type: ignore[attr-defined]
            if isinstance(error := ms[backend], Exception):
                raise error
            return backend

        monkeypatch.setattr(attention_backend, "_graph", graph)
        monkeypatch.setattr(attention_backend, "_milliseconds", lambda backend: ms[backend])
        monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.empty(shape, device="meta"))

    return say


def test_sizes_up_to_the_next_512_tokens_share_a_choice() -> None:
    assert size_class(0, 24, 128, 4097, torch.float16) == FLUX
    assert FLUX.most_tokens == 4608
    assert len({FLUX, *(FLUX._replace(**{name: 1}) for name in FLUX._fields)}) == 1 + len(FLUX._fields)


def test_the_fastest_is_taken(clock: Callable[..., None]) -> None:
    clock({"torch": 0.9, "flash": 0.9, "cudnn": 0.5, "efficient": 1.6, "fp16": 1.1})
    assert fastest(FLUX) == "cudnn"
    clock({"torch": 9.0, "flash": 2.0, "cudnn": 2.0, "efficient": 2.0, "fp16": 1.5})
    assert fastest(FLUX) == "fp16"


def test_a_lead_within_what_a_clock_wavers_changes_nothing(clock: Callable[..., None]) -> None:
    clock({"torch": 1.0, "flash": 0.98, "cudnn": 0.99, "efficient": 1.0, "fp16": 0.975})
    assert fastest(FLUX) == "torch"


def test_what_torch_does_not_have_is_left_out(clock: Callable[..., None]) -> None:
    no = RuntimeError("No available kernel.")
    clock({"torch": 5.0, "flash": no, "cudnn": no, "efficient": 5.0, "fp16": 2.0})
    assert fastest(FLUX._replace(head_dim=64)) == "torch"
    assert fastest(FLUX._replace(dtype=torch.bfloat16)) == "torch"
    assert fastest(FLUX) == "fp16"


def test_too_little_memory_is_said_not_taken_for_slowness(clock: Callable[..., None]) -> None:
    clock({"torch": 1.0, "flash": torch.OutOfMemoryError(), "cudnn": 1.0, "efficient": 1.0, "fp16": 1.0})
    with pytest.raises(torch.OutOfMemoryError):
        fastest(FLUX)


def test_every_implementation_is_the_same_attention(device: str) -> None:
    q, k, v = heads(77, device)
    there = []
    for backend in BACKENDS:
        try:
            found = attend_by(backend, q, k, v)
        except RuntimeError:  # torch has no such implementation for this processor
            continue
        there.append(backend)
        assert relative_error(found, attention_fp16(q, k, v)) < 4e-3  # tests/kernels/test_attention_fp16.py has why
    assert {"torch", "fp16"} <= set(there)


def test_a_processor_lets_torch_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(33, "cpu", torch.float32)
    monkeypatch.setitem(choices, size_class(-1, 4, 128, 33, torch.float32), "fp16")
    assert torch.equal(attend(q, k, v), attend_by("torch", q, k, v))


@pytest.mark.gpu
def test_a_choice_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(333, "cuda")
    monkeypatch.setitem(choices, size_class(0, 4, 128, 333, torch.float16), "fp16")
    assert torch.equal(attend(q, k, v), attend_by("fp16", q, k, v))
    assert not torch.equal(attend(q[:, :3], k[:, :3], v[:, :3]), attend_by("fp16", q[:, :3], k[:, :3], v[:, :3]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_is_found_on_this_card(dtype: torch.dtype) -> None:
    assert fastest(FLUX._replace(dtype=dtype)) in BACKENDS
    torch.cuda.synchronize()
