"""A network's steps as CUDA graphs: one launch in the place of a thousand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EAGER_STEPS = 2  # of a shape before it is captured: kernels get loaded, libraries choose, workspaces are made
MOST_GRAPHS = 3  # alive at once; the one that was not used for longest goes

Inputs = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class StepGraph:
    """One captured step. It reads `inputs` and writes `output`, always the same memory."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    output: Tensor

    @classmethod
    def capture(cls, step: Callable[..., Tensor], inputs: Inputs, pool: Any) -> StepGraph:
        """Raises OutOfMemoryError where the memory does not suffice for a second set of activations."""
        own = tuple(None if one is None else one.clone() for one in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = step(*own)
        return cls(graph, own, output)

    def replay(self, inputs: Inputs) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay, also of another graph, writes over it


class StepGraphs:
    """Calls `step`, from the third call of a shape on by replaying its graph: the same bytes in less time.

    LoRA strengths live in device memory that a graph reads when it runs, so they stay live. Whatever else decides
    which kernels run on which memory is in the key: shapes and types of the inputs, and `layout`, which changes
    with the LoRAs. Without memory for a graph steps go on as they are.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step = step
        self._steps_done: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, StepGraph | None] = OrderedDict()  # None: there was no memory for one
        self._pool: Any = None

    def __call__(self, layout: Hashable, *inputs: Tensor | None) -> Tensor:
        key = (layout, *(None if one is None else (tuple(one.shape), one.dtype) for one in inputs))
        if key not in self._graphs:
            done = self._steps_done.get(key, 0)
            if done < EAGER_STEPS:
                self._steps_done[key] = done + 1
                return self._step(*inputs)
            self._capture(key, inputs)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        return self._step(*inputs) if graph is None else graph.replay(inputs)

    def forget(self) -> None:
        """Give the graphs' memory back."""
        self._graphs.clear()
        self._steps_done.clear()
        self._pool = None

    def _capture(self, key: Hashable, inputs: Inputs) -> None:
        while len(self._graphs) >= MOST_GRAPHS:
            gone, _ = self._graphs.popitem(last=False)
            del self._steps_done[gone]
        if self._pool is None:  # one for all graphs: they never run at the same time, and outputs are copied
            self._pool = torch.cuda.graph_pool_handle()
        try:
            self._graphs[key] = StepGraph.capture(self._step, inputs, self._pool)
        except torch.OutOfMemoryError:
            self._graphs[key] = None
            torch.cuda.empty_cache()
