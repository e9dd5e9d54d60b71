"""Acting on a CUDA device: one copy there and one back, and between them one CUDA graph for each kind of call.

A call's observations, time steps and seeds go side by side through page-locked memory to buffers on the device, which
the network samples from; its actions come back the same way, and that alone is waited for. Calls of a kind are the same
in all but these numbers and the prompts' (rows, shapes, settings of torch). After some eager calls of a kind a graph is
captured of everything between the copies: features, context, chain, critics and choice. The noise of an action depends
on its seed alone, so an episode is the same with graphs and without.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.episode_memory import History
from llmdpd.nn.policy_network import PolicyNetwork, States
from llmdpd.ops.resident import weights_of_a_graph
from llmdpd.ops.triton import product_settings
from llmdpd.ops.unchanged import Unwritten, same_objects
from llmdpd.utils.capture import CaptureError, CudaGraphs
from llmdpd.utils.options import CudaGraphMode

_log = logging.getLogger(__name__)
_ALIGNED = 64  # bytes, between the parts of a buffer
_IDLE = 1000  # calls after which a kind that did not come gives way to others

Given = Mapping[str, NDArray[Any]]
"""Numbers of B episodes by name, [B, …] each: observations, steps, seeds; prompt_of, and the fields of `History`."""


def rounded(count: int) -> int:
    """Rows that so many are filled up to: a power of two or one and a half of it, so that there are few kinds."""
    whole = 1 << max(count - 1, 0).bit_length()
    return whole * 3 // 4 if whole >= 32 and count <= whole * 3 // 4 else whole


class _Staged:
    """Numbers of a call, side by side in page-locked memory and on the device; and its actions, the same way back."""

    def __init__(self, given: Given, device: torch.device) -> None:
        self._locked = device.type == "cuda"
        ends = np.cumsum([-(-array.nbytes // _ALIGNED) * _ALIGNED for array in given.values()]).tolist()
        self._host, self._device = self._new(ends[-1]), torch.empty(ends[-1], dtype=torch.uint8, device=device)
        self._written: dict[str, NDArray[Any]] = {}
        self.parts: dict[str, Tensor] = {}
        for (name, array), start in zip(given.items(), [0, *ends], strict=False):
            own = slice(start, start + array.nbytes)
            self._written[name] = self._host.numpy()[own].view(array.dtype).reshape(array.shape)
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            self.parts[name] = self._device[own].view(dtype).view(array.shape)
        self._actions: Tensor | None = None

    def _new(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._locked)

    def load(self, given: Given) -> None:
        """Take these numbers there."""
        for name, array in given.items():
            np.copyto(self._written[name], array)
        self._device.copy_(self._host, non_blocking=True)

    def actions(self, found: Tensor) -> NDArray[np.float32]:
        """The actions [B, H, A] on the host, once they are there; the next call writes over them."""
        if self._actions is None:
            self._actions = self._new(found.nbytes).view(found.dtype).view(found.shape)
        self._actions.copy_(found, non_blocking=True)
        if self._locked:
            torch.cuda.current_stream(self._device.device).synchronize()
        found_here: NDArray[np.float32] = self._actions.numpy()
        return found_here


class _Shown:
    """Prompts where graphs read them: those of one shape share the place, and are copied there in turn."""

    def __init__(self, prompts: EncodedPrompts) -> None:
        self.prompts = EncodedPrompts(prompts.pooled.clone(), {n: t.clone() for n, t in prompts.memory.items()})
        self._source = _leaves(prompts)  # held: no other tensor is taken for one of them
        self._versions = _versions(self._source)

    def show(self, prompts: EncodedPrompts) -> None:
        """Have these prompts there."""
        source = _leaves(prompts)
        versions = _versions(source)
        if versions is not None and versions == self._versions and same_objects(source, self._source):
            return
        torch._foreach_copy_(_leaves(self.prompts), source, non_blocking=True)
        self._source, self._versions = source, versions


@dataclass
class _Graph:
    """A captured call: what replays it, the actions that each replay writes, and what else it reads."""

    replay: Callable[[], None]
    actions: Tensor
    held: list[Any]


@dataclass
class _Kind:
    """A kind of call, and its graph once it has one."""

    staged: _Staged
    kept: bool = False
    used: int = 0
    seen: int = 0
    shown: _Shown | None = None
    graph: _Graph | None = None


class ActingGraphs:
    """Samples the actions of a policy on a CUDA device, from graphs where it can; one thread at a time.

    A graph is captured of a kind of call that comes again after `warm_up` eager ones. Weights that have changed, by
    autograd's counter of writes, and a network that was moved drop all graphs, and what could not be captured is tried
    again. During a capture no other thread may draw from the device's default generator. Kinds beyond `limit` stay
    eager, until one of the others has not come for a thousand calls.

    Args:
        network: what samples. acting: how. critic: what chooses among several samples; None for nothing.
        mode: whether graphs are captured; with `on`, what can't be captured is an error, else runs eagerly, for a
            reason logged once.
        warm_up: eager calls of a kind before its capture. limit: kinds at most.

    Raises:
        InputError: no such mode.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        acting: ActingConfig,
        critic: nn.Module | None,
        mode: CudaGraphMode = "auto",
        *,
        warm_up: int = 3,
        limit: int = 16,
    ) -> None:
        self._network, self._acting, self._critic = network, acting, critic
        self._mode, self._warm_up, self._limit = _known(mode), warm_up, limit
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._backend: CudaGraphs | None = None
        self._kinds: dict[Hashable, _Kind] = {}
        self._shown: weakref.WeakValueDictionary[Hashable, _Shown] = weakref.WeakValueDictionary()
        self._weights: Unwritten | None = None
        self._calls, self._full = 0, False
        self.reason: str | None = None
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        names = ("_network", "_acting", "_critic", "_mode", "_warm_up", "_limit")
        return {name: vars(self)[name] for name in names}  # graphs are captured anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def mode(self) -> CudaGraphMode:
        """Whether graphs are captured; set anew, a reason against it is forgotten."""
        return self._mode

    @mode.setter
    def mode(self, mode: CudaGraphMode) -> None:
        with self._lock:
            self._mode, self.reason = _known(mode), None
            self._told.clear()
            self._forget()

    @property
    def captured(self) -> int:
        """Graphs so far."""
        return sum(kind.graph is not None for kind in self._kinds.values())

    def of(self, network: PolicyNetwork, acting: ActingConfig, critic: nn.Module | None) -> ActingGraphs:
        """These, or new ones where they are of other parts, as those of a policy may have been replaced."""
        same = network is self._network and critic is self._critic and acting == self._acting
        options: dict[str, Any] = {"warm_up": self._warm_up, "limit": self._limit}
        return self if same else ActingGraphs(network, acting, critic, self._mode, **options)

    def serves(self) -> bool:
        """Whether it samples where the network is."""
        return self._network.device.type == "cuda"

    def sample(self, given: Given, prompts: EncodedPrompts) -> NDArray[np.float32]:
        """Chunks [B, H, A] within ±1 of B episodes under P prompts, as `PolicyNetwork.sample`.

        Raises:
            InputError: it can't be captured, and the mode is `on`.
        """
        count = len(given["seeds"])
        given = {name: _filled(array, rounded(count)) for name, array in given.items()}
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._calls += 1
            self._drop_outdated()
            kind = self._kind_of(given, prompts)
            kind.used = self._calls
            kind.staged.load(given)
            return kind.staged.actions(self._sampled(kind, prompts))[:count].copy()

    def _kind_of(self, given: Given, prompts: EncodedPrompts) -> _Kind:
        device, shapes = self._network.device, _shapes(prompts)
        numbers = tuple((name, array.shape, array.dtype.str) for name, array in given.items())
        key = (device, numbers, shapes, product_settings())
        kind = self._kinds.get(key)
        if kind is None:
            kind = _Kind(_Staged(given, device))
            if len(self._kinds) >= self._limit:
                oldest = min(self._kinds, key=lambda one: self._kinds[one].used)
                if self._kinds[oldest].used + _IDLE < self._calls:
                    del self._kinds[oldest]
            kind.kept = len(self._kinds) < self._limit
            if kind.kept:
                self._kinds[key] = kind
            elif self._mode != "off" and not self._full:
                self._full = True
                _log.info("more than %d kinds of calls: the others act without a CUDA graph", self._limit)
        return kind

    def _sampled(self, kind: _Kind, prompts: EncodedPrompts) -> Tensor:
        """The actions on the device, from the numbers that were staged."""
        if kind.graph is not None and kind.shown is not None:
            kind.shown.show(prompts)
            kind.graph.replay()
            return kind.graph.actions
        if self._mode == "off" or self.reason is not None or not kind.kept:
            return self._compute(kind.staged.parts, prompts)
        assert self._weights is not None
        if not self._weights.lasting:
            self._give_up("whether its weights change is not seen: of inference mode's tensors, or without C++ module")
            return self._compute(kind.staged.parts, prompts)
        if self._backend is None:
            self._backend = CudaGraphs(self._network.device, beside="thread_local")
        # As in a capture from the first call on: kernels are made for addresses of such alignments.
        kind.shown, parts = self._show(prompts), kind.staged.parts
        place = kind.shown.prompts
        kind.seen += 1
        if kind.seen <= self._warm_up:
            # Not watched: other threads may draw, wait and warn meanwhile. Actions take no number from the host's
            # generator, and where they wait for the device, or take a tensor from the host, the capture breaks off.
            return self._backend.run(lambda: self._compute(parts, place))
        try:
            with weights_of_a_graph() as held:
                kind.graph = _Graph(*self._backend.capture(lambda: self._compute(parts, place)), held)
        except CaptureError as error:
            self._give_up(str(error))
            return self._compute(parts, prompts)
        except BaseException:
            self._drop_graphs()
            raise
        return self._sampled(kind, prompts)

    def _show(self, prompts: EncodedPrompts) -> _Shown:
        """Prompts where graphs of their shape read them."""
        shapes = _shapes(prompts)
        shown = self._shown.get(shapes)
        if shown is None:
            shown = self._shown[shapes] = _Shown(prompts)
        shown.show(prompts)
        return shown

    def _compute(self, parts: Mapping[str, Tensor], prompts: EncodedPrompts) -> Tensor:
        seen = [parts[name] for name in History._fields if name in parts]
        history = History(*seen) if seen else None
        states = States(parts["observations"], parts.get("prompt_of"), parts["steps"], history)
        return self._network.sample(states, prompts, self._acting, parts["seeds"], self._critic)

    def _drop_outdated(self) -> None:
        """Drop graphs, and a reason against them, where weights have changed; what acts eagerly needs no watch."""
        if self._mode == "off":
            return
        if self._weights is None or (self._weights.lasting and not self._weights.unchanged()):
            self._forget()
            self.reason = None
            self._weights = Unwritten.of([part for part in (self._network, self._critic) if part is not None])

    def _forget(self) -> None:
        """Drop all graphs, and what was made for a device: the network's tensors are no longer what they were."""
        self._kinds.clear()
        self._weights, self._full = None, False
        if self._backend is not None and self._backend.device != self._network.device:
            self._backend = None

    def _drop_graphs(self) -> None:
        """After a capture that broke off, earlier ones may not be replayed."""
        for kind in self._kinds.values():
            kind.graph = None

    def _give_up(self, reason: str) -> None:
        self._drop_graphs()
        if self._mode == "on":
            problem, expected = "acting can't be captured in a CUDA graph", "work of the GPU alone"
            hint = "set cuda_graph to auto, which then acts without"
            raise InputError(problem, field="cuda_graph", found=reason, expected=expected, hint=hint)
        self.reason = reason
        if reason not in self._told:
            self._told.add(reason)
            _log.info("acting runs without CUDA graphs: %s", reason)


def _known(mode: CudaGraphMode) -> CudaGraphMode:
    if mode not in get_args(CudaGraphMode):
        raise InputError("no such mode", field="cuda_graph", found=mode, expected=get_args(CudaGraphMode))
    return mode


def _filled(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """Rows [B, …] with the last one repeated up to so many."""
    more = rows - len(array)
    return np.concatenate([array, np.repeat(array[-1:], more, axis=0)]) if more else array


def _leaves(prompts: EncodedPrompts) -> list[Tensor]:
    return [prompts.pooled, *prompts.memory.values()]


def _shapes(prompts: EncodedPrompts) -> Hashable:
    return tuple((name, t.shape, t.dtype) for name, t in (("", prompts.pooled), *prompts.memory.items()))


def _versions(tensors: list[Tensor]) -> list[int] | None:
    """How often each tensor was written to; None where nobody counts."""
    return None if any(t.is_inference() for t in tensors) else [t._version for t in tensors]
