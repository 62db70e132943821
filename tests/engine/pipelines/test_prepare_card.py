"""A card is made ready with progress, and what cannot be made ready is a problem: told without a card."""

from __future__ import annotations

import pytest
import torch

from engine import jit
from engine.jit import KernelError, Variant
from engine.pipelines import prepare_card
from engine.pipelines.prepare_card import prepare_kernels
from engine.problems import ProblemError, ProblemKind

VARIANTS = [Variant("svdq_linear.w4a8", (("EPILOGUE", i),)) for i in range(3)]


class Network:
    """Launches three kernels, one of them twice."""

    steps = 0

    def __call__(self, *inputs):
        self.steps += 1
        assert torch.is_inference_mode_enabled()
        for variant in [*VARIANTS, VARIANTS[0]]:
            jit.launch(variant, (1,), (32,))


@pytest.fixture
def loaded(monkeypatch):
    """What was loaded; compiling takes no time."""
    monkeypatch.setattr(jit, "current_arch", lambda: "90a")
    kernels: list[Variant] = []
    monkeypatch.setattr(jit, "load", lambda variants: kernels.extend(variants))
    monkeypatch.setattr(
        jit, "prepare", lambda variants, arch: ((done, len(variants)) for done in range(1, len(variants) + 1))
    )
    return kernels


def test_every_kernel_of_a_step_is_compiled_once_with_progress(loaded):
    told, network = [], Network()
    prepare_kernels(network, (), lambda what, fraction: told.append((what, fraction)))
    assert network.steps == 1
    assert loaded == VARIANTS
    assert told[0] == ("Preparing your graphics card, 1 of 3", pytest.approx(1 / 3))
    assert told[-1] == ("Preparing your graphics card, 3 of 3", 1.0)


def test_a_stop_while_compiling_goes_through(loaded):
    def stop(what, fraction):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        prepare_kernels(Network(), (), stop)
    assert loaded == []


def test_a_kernel_that_does_not_compile_is_a_problem_of_this_machine(loaded, monkeypatch):
    def broken(variants, arch):
        raise KernelError("svdq_linear.w4a8 does not compile")

    monkeypatch.setattr(jit, "prepare", broken)
    with pytest.raises(ProblemError) as refused:
        prepare_kernels(Network(), (), lambda what, fraction: None)
    assert refused.value.problem.kind is ProblemKind.MACHINE
    assert "device cpu" in refused.value.problem.todo
    assert "does not compile" in refused.value.problem.detail


def test_attention_is_chosen_for_the_networks_heads(monkeypatch, tmp_path):
    from engine.models.flux import FluxConfig

    monkeypatch.setenv("TONFA_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(prepare_card, "choose", lambda *given: asked.append(given) or "cudnn")
    network = type("Network", (), {"config": FluxConfig()})()
    assert prepare_card.choose_attention(network, 4608, torch.bfloat16, torch.device("cuda")) == "cudnn"
    assert asked == [(24, 4608, 128, torch.bfloat16, torch.device("cuda"), tmp_path / "cache")]
