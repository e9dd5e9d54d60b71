"""Work of a CUDA device recorded in CUDA graphs: what training's iterations and acting are replayed from."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
# Generators in a capture, filters of warnings and the debug mode of waiting are the process's: one thread at a time.
_alone = threading.RLock()


class CaptureError(RuntimeError):
    """Work that can't be captured; the message is why."""


class CudaGraphs:
    """Captures work on a CUDA device, which samples by the device's own generator, or by others.

    Of all objects of this class in a process one captures, or runs what it is about to capture, at a time.

    `beside`: what other threads may do during a capture. With `thread_local` they may use the device, but not draw from
    its default generator nor from `generators`, which torch refuses them then; with `global` they may not make what
    the driver calls unsafe then either, such as memory (see `torch.cuda.graph`).
    """

    def __init__(
        self,
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        beside: Literal["global", "thread_local"] = "global",
    ) -> None:
        self.device, self._generators, self._beside = device, list(generators), beside
        self._stream = torch.cuda.Stream(device)
        # One pool for all graphs: they run one after another, and keep nothing in it from one run to the next.
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], Result]) -> Result:
        """Run the work on the stream of the captures; what it returned."""
        with _alone:
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                result = work()
            current.wait_stream(self._stream)
        return result

    def warm_up(self, work: Callable[[], Result]) -> tuple[Result, str | None]:
        """`run` it; what it returned, and why it can't be captured, if that shows: see `watch`."""
        return self.run(lambda: watch(work))

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record the work without doing it; what replays it, and the tensor that each replay writes.

        Raises:
            CaptureError: it can't be captured; nothing was done then, either. After this error, and any other that
                breaks a capture off, earlier captures may not be replayed.
        """
        with _alone:
            graph = torch.cuda.CUDAGraph()
            generators = [torch.cuda.default_generators[self._stream.device_index], *self._generators]
            before = [generator.clone_state() for generator in generators]
            try:
                output = self._recorded(graph, work)
            except BaseException as error:
                # Older versions of torch leave a generator as if the capture still went on. Graphs from before hold
                # the old state, and no longer share it.
                for generator, state in zip(generators, before, strict=True):
                    generator.graphsafe_set_state(state)
                # torch 2.11 takes this one for still recorded to, and would refuse the next capture.
                self._pool = torch.cuda.graph_pool_handle()
                if isinstance(error, RuntimeError):
                    raise CaptureError(_first_cause(error)) from error
                raise
        return graph.replay, output

    def _recorded(self, graph: torch.cuda.CUDAGraph, work: Callable[[], Tensor]) -> Tensor:
        """What the work returned when it was recorded in the graph."""
        with torch.cuda.device(self.device):  # where the graph keeps their seeds and offsets
            for generator in self._generators:
                graph.register_generator_state(generator)
        recorded = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=self._beside)
        # The outer context brings the stream back where the inner one breaks off.
        with torch.cuda.stream(self._stream), recorded:
            return work()


def watch(work: Callable[[], Result]) -> tuple[Result, str | None]:
    """Run the work; what it returned, and what it did that a CUDA graph can't hold, if anything.

    That is waiting for the device (a capture breaks off there), and random numbers of the host (a graph would repeat
    the ones of its capture for ever). What other threads do meanwhile is taken for the work's: it suits training, which
    has the process to itself.
    """
    with _alone:
        return _watched(work)


def _watched(work: Callable[[], Result]) -> tuple[Result, str | None]:
    drawn = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught, ExitStack() as after:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            after.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        result = work()
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    for warning in caught:
        if warning not in waits:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if not torch.equal(drawn, torch.get_rng_state()):
        return result, "it draws random numbers on the host, which a graph would repeat for ever"
    if waits:
        return result, f"it waits for the device, at {waits[0].filename}:{waits[0].lineno}"
    return result, None


def _first_cause(error: BaseException) -> str:
    """The first line of the error that the others followed from: the end of a broken capture raises one of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or repr(error)).splitlines()[0]
