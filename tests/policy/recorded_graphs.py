"""Stand-ins for CUDA graphs that record PyTorch's operations and do them again, and policies that act by them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmdpd.config.presets import find_preset
from llmdpd.methods.llmdpd.method import LLMDPDConfig
from llmdpd.methods.llmdpd.network import DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.folder import text_key
from llmdpd.policy.graphs import ActingGraphs
from llmdpd.policy.policy import Policy
from llmdpd.tasks.metaworld.layout import LAYOUT
from llmdpd.utils.capture import CaptureError
from tests.policy.conftest import KNOWN

BEST = BestOfN(samples=5)
FEW: dict[str, Any] = {"network": {"diffusion_steps": 2}}
CHUNKS = {"network": {"chunk": 3, "diffusion_steps": 2}, "critic": False}
SOFTLY = {"soft": BEST, "max": BestOfN(samples=5, selection="max")}


class Passed(TorchDispatchMode):
    """Lets all pass; under it PyTorch computes what C++ would, which no mode sees."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Record(Passed):
    """What was done: operations, what they had, and what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, _tensors(result)))
        return result

    def repeat(self) -> None:
        for func, args, kwargs, made in self.done:
            known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            for before, now in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                # A view of what there was has been written with it; memory that is new holds nothing yet.
                if before.untyped_storage().data_ptr() not in known and "empty" not in str(func):
                    before.copy_(now)


def _tensors(of: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, Tensor)]


class Recorder:
    """The stand-in for `CudaGraphs`: a capture leaves nothing but the record, a replay does what was recorded."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.refusal: str | None = None
        self.warmed = self.captures = self.replays = 0

    def run(self, work: Callable[[], Any]) -> Any:
        self.warmed += 1
        return work()

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.refusal is not None:
            raise CaptureError(self.refusal)
        self.captures += 1
        with Record() as record:
            output = work()
        output.fill_(float("nan"))

        def replay() -> None:
            self.replays += 1
            record.repeat()

        return replay, output


def recorded(policy: Policy, mode: Any = "on", **options: Any) -> Recorder:
    """Has the policy act from graphs of the stand-in."""
    backend = Recorder()
    own = ActingGraphs(policy.network, policy.acting, policy.critic, mode, **{"warm_up": 2} | options)
    own._backend = backend  # type: ignore[assignment]
    policy.graphs = own
    return backend


def pair(policy: Policy, **options: Any) -> tuple[Policy, Policy, Recorder]:
    """The same policy without graphs and with them."""
    plain = copy.deepcopy(policy)
    plain.graphs.mode = "off"
    return plain, policy, recorded(policy, **options)


def by_itself(policy: Policy) -> Policy:
    """The same policy, whose network samples by itself, without buffers and rows that are filled up.

    The noise of both begins anew.
    """
    policy.seed(0)
    other = policy.with_acting()
    other.graphs.serves = lambda: False  # type: ignore[method-assign]
    return other


def default_policy(rng: np.random.Generator) -> tuple[Policy, Callable[[int], Any]]:
    """A small one of the preset metaworld, which knows a text, and what makes demonstrations of T steps."""
    preset = find_preset("metaworld").method
    assert isinstance(preset, LLMDPDConfig)
    context = preset.network.context
    retrieval = dataclasses.replace(context.retrieval, width=16, heads=2)
    encoder = dataclasses.replace(context.encoder, width=16, inner=16, heads=2, steps=8)
    sizes = {"text_dim": 5, "text_hidden": 16, "trajectory_dim": 4}
    context = dataclasses.replace(context, retrieval=retrieval, encoder=encoder, **sizes)
    config = dataclasses.replace(preset.network, hidden_dim=24, time_dim=8, diffusion_steps=2, context=context)
    network = DiffusionPolicy(Spaces(39, 4, 10, LAYOUT), config)
    network.context.features.fit(0.3 * torch.randn(50, 39))
    acting = dataclasses.replace(preset.acting, track_after=0.0)

    def demonstration(steps: int) -> Any:
        states, actions = rng.normal(0, 0.3, (steps, 39)), rng.uniform(-1, 1, (steps, 4))
        return states.astype(np.float32), actions.astype(np.float32)

    return Policy("llmdpd", network, None, acting, texts={text_key(KNOWN): torch.randn(10)}), demonstration


def assert_same_episodes(
    plain: Policy,
    other: Policy,
    prompts: list[Any],
    rng: np.random.Generator,
    rows: tuple[int, ...] = (1, 5, 8),
    tolerance: float = 0.0,
) -> None:
    """Episodes of single and of several observations under prompts that take turns, with seeds set in between."""
    width = plain.network.spaces.observed_dim
    for number, prompt in enumerate(prompts):
        for one in (plain, other):
            one.prompt(KNOWN, prompt)
            if number % 2:
                one.seed(number)
        for count in rows:
            plain.reset()
            other.reset()
            for _ in range(3):
                seen = rng.normal(0, 0.3, (count, width)) if count > 1 else rng.normal(0, 0.3, width)
                found, expected = other.act(seen), plain.act(seen)
                assert np.isfinite(found).all()
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
