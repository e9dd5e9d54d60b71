"""A small policy with random weights, a demonstration for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.ops.acting import FrozenActor
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig

S, A, D = 7, 3, 10
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8)
CONTEXT = ContextConfig(text_dim=5, text_hidden=16, trajectory_dim=4, encoder=ENCODER)
KNOWN = "Task: push the puck."
SINGLE = BestOfN(samples=1)

MakePolicy = Callable[..., Policy]


@pytest.fixture
def make_policy(rng: np.random.Generator) -> MakePolicy:
    """A policy of S, A, D that knows two texts; `network`: fields of its configuration, others: of its context."""

    def make(
        critic: bool = True, acting: BestOfN = SINGLE, network: dict[str, Any] | None = None, **context: Any
    ) -> Policy:
        reads = dataclasses.replace(CONTEXT, **context)
        config = DiffusionNetworkConfig(**{"hidden_dim": 24, "time_dim": 8, "context": reads, **(network or {})})
        net = DiffusionPolicy(Spaces(S, A, D), config)
        net.context.features.fit(torch.randn(50, S) * 2 + 1)
        q = net.make_critic(16, sees_prompts=True) if critic else None
        texts = {text_key(text): torch.randn(D) for text in (KNOWN, "Task: reach.")}
        return Policy("llmdpd", net, q, acting, texts=texts, metadata={"trained_on": ["push"], "seed": 3})

    return make


@pytest.fixture
def example(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Observations [20, S] and actions [20, A]."""
    return rng.normal(size=(20, S)), rng.uniform(-1, 1, (20, A))


@pytest.fixture
def policy(make_policy: MakePolicy, example: Any) -> Policy:
    """A policy with its prompt."""
    return make_policy().prompt(text=KNOWN, trajectory=example)


@pytest.fixture
def acted_at(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The time steps of the rows of each call of the C++ code."""
    steps: list[list[int]] = []
    act = FrozenActor.act

    def spy(self: FrozenActor, observations: Any, times: Any, *rest: Any) -> Any:
        steps.append(times.tolist())
        return act(self, observations, times, *rest)

    monkeypatch.setattr(FrozenActor, "act", spy)
    return steps
