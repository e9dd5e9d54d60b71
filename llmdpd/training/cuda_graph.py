"""Training iterations as replays of CUDA graphs.

An iteration is some hundreds of small kernels; launched one by one, the host is slower than the GPU. A graph holds
them all and is launched at once. It is captured from `learn`, the method's device work, for one kind of batch (shapes,
dtypes, absent parts): the inputs lie in buffers of its own, which every batch is copied into before a replay.

The iterations before a capture run eagerly and count like any other, so a run with graphs is the run without them:
torch's CUDA generator advances under replay as it does without, and nothing is executed twice.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.methods.base import Learner, Method
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.stacked import Stacked, of_each, side_by_side
from llmdpd.ops.resident import keys_on_device
from llmdpd.utils.capture import CaptureError, CudaGraphs
from llmdpd.utils.options import CudaGraphMode

if TYPE_CHECKING:
    from llmdpd.methods.llmdpd.device_stack import DeviceStack

_log = logging.getLogger(__name__)
_FIELD = "training.cuda_graph"


class Graphed(Protocol):
    """What iterations are captured of: a method, or several at once."""

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]: ...

    def schedule(self, iteration: int) -> None: ...

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]: ...

    def follow(self, iteration: int) -> None: ...


@dataclass(frozen=True)
class _Recorded:
    """A captured `learn`: its input buffers, its metrics' names and where each replay writes them [M].

    The buffers are by dtype, and by place in the batch: tensors of one dtype are copied by one kernel.
    """

    inputs: list[dict[str, Tensor]]
    names: tuple[str, ...]
    values: Tensor
    replay: Callable[[], None]
    written: list[Tensor]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Every buffer, by name: none can keep what an earlier batch left.
        for group in self.inputs:
            torch._foreach_copy_(list(group.values()), [tensors[name] for name in group], non_blocking=True)
        self.replay()
        # A replay writes behind autograd's back; caches that go by a tensor's version must see it.
        torch.autograd.graph.increment_version(self.written)
        # The next replay writes over them.
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))


class GraphedUpdate:
    """A method, for the training loop, that replays its iterations from graphs.

    A kind of batch is captured when it comes again after `warm_up` eager iterations; kinds beyond `limit` stay eager.

    Args:
        method: what learns.
        backend: `CudaGraphs`.
        required: whether what can't be captured is an error, or runs eagerly, for a reason logged once.
        warm_up: eager iterations of a kind of batch before its capture.
        limit: graphs at most.
    """

    def __init__(
        self,
        method: Graphed,
        backend: CudaGraphs,
        *,
        required: bool = False,
        warm_up: int = 3,
        limit: int = 8,
    ) -> None:
        self.method, self.backend, self.required = method, backend, required
        self.modules: Mapping[str, nn.Module] = method.modules
        self.optimizers: Mapping[str, torch.optim.Optimizer] = method.optimizers
        self._warm_up, self._limit = warm_up, limit
        self._graphs: dict[Hashable, _Recorded] = {}
        self._seen: Counter[Hashable] = Counter()
        self._full = False
        self.reason: str | None = None
        itself = weakref.ref(self)  # the optimisers may outlive it

        def forget(_: torch.optim.Optimizer) -> None:
            graphed = itself()
            if graphed is not None:
                graphed.forget()

        for optimizer in method.optimizers.values():
            # It replaces the tensors that the graphs hold the addresses of.
            optimizer.register_load_state_dict_post_hook(forget)

    @property
    def captured(self) -> int:
        """Graphs so far."""
        return len(self._graphs)

    def update(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        """The method's iteration on the batch, from a graph where there is one.

        Raises:
            InputError: it can't be captured, and `required`.
        """
        self.method.schedule(iteration)
        with keys_on_device():
            metrics = self._learn(batch)
        self.method.follow(iteration)
        return metrics

    def forget(self) -> None:
        """Drop all graphs: the method's tensors are no longer those that they were captured with."""
        self._graphs.clear()
        self._seen.clear()
        self._full = False

    def _learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        if self.reason is not None:
            return self.method.learn(batch)
        leaves = batch.leaves()
        kind, tensors = _kind(leaves), {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        if kind not in self._graphs:
            if len(self._graphs) >= self._limit:
                if not self._full:
                    self._full = True
                    _log.info("more than %d kinds of batch: the others run without a CUDA graph", self._limit)
                return self.method.learn(batch)
            self._seen[kind] += 1
            if (left := self._warm_up - self._seen[kind]) >= 0:
                metrics, reason = self.backend.warm_up(lambda: self.method.learn(batch))
                # What is made once and kept, at the first iterations, may do what a capture can't hold.
                if left == 0 and reason is not None:
                    self._give_up(reason)
                return metrics
            try:
                self._graphs[kind] = self._capture(batch, tensors)
            except CaptureError as error:
                self._give_up(str(error))
                return self.method.learn(batch)
            except BaseException:
                self.forget()
                raise
        return self._graphs[kind].run(tensors)

    def _capture(self, batch: PromptedBatch, tensors: Mapping[str, Tensor]) -> _Recorded:
        inputs = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        buffered = batch.with_tensors(inputs)
        names: list[str] = []
        state = list(_state(self.method))
        versions = [tensor._version for tensor in state]

        def work() -> Tensor:
            metrics = self.method.learn(buffered)
            names.extend(metrics)
            return torch.stack([value.float() for value in metrics.values()])

        replay, values = self.backend.capture(work)
        written = [tensor for tensor, version in zip(state, versions, strict=True) if tensor._version != version]
        dtypes = {buffer.dtype: None for buffer in inputs.values()}
        groups = [{name: b for name, b in inputs.items() if b.dtype == dtype} for dtype in dtypes]
        return _Recorded(groups, tuple(names), values, replay, written)

    def _give_up(self, reason: str) -> None:
        self.forget()  # after a capture that broke off, earlier ones may not be replayed
        if self.required:
            problem, expected = "the training iteration can't be captured in a CUDA graph", "work of the GPU alone"
            hint = "use --training.cuda-graph auto, which then runs without"
            raise InputError(problem, field=_FIELD, found=reason, expected=expected, hint=hint)
        self.reason = reason
        _log.info("training runs without a CUDA graph: %s", reason)


def with_cuda_graph(learner: Learner, mode: CudaGraphMode, device: torch.device) -> Learner | GraphedUpdate:
    """What the loop trains: the learner itself, or behind `GraphedUpdate` where the mode and the device allow it.

    Raises:
        InputError: `on`, of a method that no graph can hold.
    """
    if mode == "off" or device.type != "cuda":
        return learner
    if not learner.same_work:
        if mode == "on":
            found = f"on, with {type(learner).__name__}, which does not do the same at every iteration"
            raise InputError("no CUDA graph can hold this method", field=_FIELD, found=found, expected="auto or off")
        return learner
    return GraphedUpdate(cast("Method[Any, Any]", learner), CudaGraphs(device), required=mode == "on")


class GraphedStack:
    """Learners that do their iterations at once, from graphs; see `Stacked`."""

    def __init__(self, stack: DeviceStack, device: torch.device, required: bool) -> None:
        self._stack, self._device, self._required = stack, device, required
        self._graphed: GraphedUpdate | None = None

    def update(
        self, batches: Sequence[PromptedBatch], iteration: int, generators: Sequence[torch.Generator]
    ) -> list[dict[str, Tensor]]:
        """See `Stacked.update`; every call is given the same generators."""
        if self._graphed is None:
            work, backend = self._stack.with_generators(generators), CudaGraphs(self._device, generators)
            self._graphed = GraphedUpdate(work, backend, required=self._required)
        return of_each(self._graphed.update(side_by_side(batches), iteration))

    @property
    def graphed(self) -> GraphedUpdate | None:
        """What replays them, from the first update on."""
        return self._graphed


def stacked(learners: Sequence[object]) -> Stacked | None:
    """What does the iterations of these at once, from graphs where each does its own so; None: they take turns.

    Called whenever other learners than before train together, or one of them alone: their weights may lie elsewhere
    then, and each drops its own graphs.
    """
    methods = [learner.method if isinstance(learner, GraphedUpdate) else learner for learner in learners]
    first, method = learners[0], methods[0]
    for learner in learners:
        if isinstance(learner, GraphedUpdate):
            learner.forget()
    stack = method.stacked(methods) if len(methods) > 1 and isinstance(method, Learner) else None
    if stack is not None and isinstance(first, GraphedUpdate):
        return GraphedStack(cast("DeviceStack", stack), first.backend.device, first.required)
    return stack


def describe_cuda_graph(trained: object) -> str:
    """How the iterations were run, in words for the run's notes."""
    if isinstance(trained, GraphedStack):
        trained = trained.graphed
    if not isinstance(trained, GraphedUpdate):
        return "not used"
    return f"captured {trained.captured}" if trained.reason is None else f"not used: {trained.reason}"


def _kind(leaves: Mapping[str, Any]) -> Hashable:
    """What a capture holds fast of a batch: everything but the numbers in its tensors."""
    return tuple(
        (name, leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (name, leaf)
        for name, leaf in leaves.items()
    )


def _state(method: Graphed) -> list[Tensor]:
    """The tensors that an iteration may write: of networks and optimisers."""
    tensors = [t for module in method.modules.values() for t in (*module.parameters(), *module.buffers())]
    for optimizer in method.optimizers.values():
        tensors += [t for fields in optimizer.state.values() for t in fields.values() if isinstance(t, Tensor)]
    return tensors
