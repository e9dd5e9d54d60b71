"""A stand-in for the device's part of CUDA graphs, below `CudaGraphs`, by which PyTorch's operations are recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.policy.recorded_graphs import Record


class Generator:
    """Of the device; its state is a number."""

    def __init__(self) -> None:
        self.state = 0

    def clone_state(self) -> int:
        return self.state

    def graphsafe_set_state(self, state: int) -> None:
        self.state = state


class Device:
    """What happened there: work on the captures' stream, and captures, as they began and ended."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.generator, self.pools, self.log = Generator(), 0, []  # type: ignore[var-annotated]
        stream = SimpleNamespace(device_index=0, wait_stream=lambda _: None)
        for name, value in {
            "Stream": lambda _: stream,
            "current_stream": lambda _: stream,
            "stream": self._on_stream,
            "device": lambda _: contextlib.nullcontext(),
            "default_generators": [self.generator],
            "graph_pool_handle": self._pool,
            "CUDAGraph": lambda: SimpleNamespace(replay=None, register_generator_state=lambda _: None),
            "graph": self._graph,
        }.items():
            patch.setattr(torch.cuda, name, value)

    def _pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def _on_stream(self, _: Any) -> Iterator[None]:
        self.log.append("begin")
        try:
            yield
        finally:
            self.log.append("end")

    @contextlib.contextmanager
    def _graph(self, graph: Any, *_: Any, **__: Any) -> Iterator[None]:
        self.generator.state = -1  # as long as it is captured from
        with Record() as record:
            yield
        graph.replay, self.generator.state = record.repeat, 1
