"""When a step is captured, how many graphs live, what happens without memory. The graphs themselves: on a card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.models import step_graph
from engine.models.step_graph import MOST_GRAPHS, StepGraphs


class FakeGraph:
    """Replays by calling the step; counts."""

    captured: list[object]

    def __init__(self, step, inputs) -> None:
        self.step, self.inputs, self.replays = step, inputs, 0

    @classmethod
    def capture(cls, step, inputs, pool):
        made = cls(step, inputs)
        cls.captured.append(made)
        return made

    def replay(self, inputs):
        self.replays += 1
        return self.step(*inputs)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    FakeGraph.captured = []
    monkeypatch.setattr(step_graph, "StepGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return FakeGraph


def double(x: Tensor, y: Tensor | None) -> Tensor:
    return 2 * x


def test_two_steps_of_a_shape_run_as_they_are_the_third_is_captured(fake):
    graphs = StepGraphs(double)
    for step in range(5):
        assert torch.equal(graphs(0, torch.full((2,), float(step)), None), torch.full((2,), 2.0 * step))
        assert len(fake.captured) == (step >= 2)
    assert fake.captured[0].replays == 3


def test_another_shape_type_or_layout_is_another_graph(fake):
    graphs = StepGraphs(double)
    shapes = [(0, torch.zeros(2)), (0, torch.zeros(3)), (1, torch.zeros(2))]
    for layout, x in shapes * 3:
        graphs(layout, x, None)
    assert len(fake.captured) == 3
    for _ in range(3):
        graphs(0, torch.zeros(2).half(), None)
    assert len(fake.captured) == 4
    assert len(graphs._graphs) == MOST_GRAPHS


def test_the_graph_that_was_not_used_for_longest_goes(fake):
    graphs = StepGraphs(double)
    for size in (1, 2, 3):
        for _ in range(3):
            graphs(0, torch.zeros(size), None)
    graphs(0, torch.zeros(1), None)
    for _ in range(3):
        graphs(0, torch.zeros(4), None)
    assert [key[1][0] for key in graphs._graphs] == [(3,), (1,), (4,)]
    for _ in range(2):
        graphs(0, torch.zeros(2), None)  # forgotten: eager twice before it is captured again
    assert len(fake.captured) == 4
    graphs.forget()
    assert not graphs._graphs


def test_without_memory_for_a_graph_steps_go_on_as_they_are(fake, monkeypatch):
    tries = []

    def no_memory(step, inputs, pool):
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fake, "capture", no_memory)
    graphs = StepGraphs(double)
    for _ in range(6):
        assert torch.equal(graphs(0, torch.ones(2), None), torch.full((2,), 2.0))
    assert len(tries) == 1
