"""Diffusion of actions, and of trajectories, learns two tasks that only the prompt tells apart, and not without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.nn.trajectory_denoiser import TrajectoryConfig
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens

GOALS = np.array([[0.8, 0.5], [-0.8, -0.5]], np.float32)
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=32, steps=6, dropout=0.0)
H = 3
CHANGES: dict[str, dict[str, Any]] = {
    "llmdpd": {"network.hidden_dim": 48, "network.time_dim": 16, "critic_hidden": 48, "acting.samples": 1},
    "trajectory-diffusion": {
        **{"network.diffusion_steps": 10, "network.time_dim": 16, "acting.sampler": "ddim", "acting.steps": 4},
        "network.trajectory": TrajectoryConfig(horizon=H, layers=1, width=32, inner=64, dropout=0.0),
    },
}


class TwoGoals:
    """A point in the unit square: the best action is half of the way to the goal of the task."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.text = torch.from_numpy(rng.normal(size=(2, 8)).astype(np.float32))

    def best(self, state: np.ndarray, task: np.ndarray) -> np.ndarray:
        return 0.5 * (GOALS[task] - state)

    def demonstration(self, task: int) -> tuple[np.ndarray, np.ndarray]:
        state = self.rng.uniform(-1, 1, (6, 2)).astype(np.float32)
        return state, self.best(state, np.full(6, task)).astype(np.float32)

    def windows(self, state: np.ndarray, task: np.ndarray) -> StepWindows:
        """H steps by the best actions."""
        states, actions = [state], []
        for _ in range(H):
            actions.append(self.best(states[-1], task).astype(np.float32))
            states.append(states[-1] + actions[-1])
        parts = [torch.from_numpy(np.stack(part[:H], 1)) for part in (states, actions)]
        mask = torch.ones(len(state), H, dtype=torch.bool)
        return StepWindows(parts[0], parts[1], None, mask, torch.zeros(len(state), H))

    def batch(self, size: int, random_actions: bool) -> PromptedBatch:
        state = self.rng.uniform(-1, 1, (size, 2)).astype(np.float32)
        task = np.repeat([0, 1], size // 2)
        best = self.best(state, task)
        actions = self.rng.uniform(-1, 1, (size, 2)) if random_actions else best
        reward = -np.square(actions - best).sum(1)
        tensors: list[Tensor] = [torch.from_numpy(x.astype(np.float32)) for x in (state, actions, reward, state)]
        return PromptedBatch(
            *tensors,
            terminals=torch.ones(size),
            expert_actions=None,
            timesteps=torch.zeros(size, dtype=torch.int64),
            text=self.text,
            tokens=make_tokens([self.demonstration(0), self.demonstration(1)], ENCODER),
            windows=self.windows(state, task),
        )


@pytest.fixture
def world(rng: np.random.Generator) -> TwoGoals:  # type: ignore[override]
    """The two tasks."""
    return TwoGoals(rng)


@pytest.fixture
def error_of(world: TwoGoals, make_method: Any) -> Callable[..., float]:
    """Train with these prompts; the mean distance of the actions from the best ones, over both tasks."""

    def error(name: str, text: bool, trajectory: bool, iterations: int, random_actions: bool, **changes: Any) -> float:
        sizes = {"text_dim": 8, "text_hidden": 32, "trajectory_dim": 8, "encoder": ENCODER}
        context = ContextConfig(text=text, trajectory=trajectory, **sizes)  # type: ignore[arg-type]
        learning = {"lr": 3e-3, "lr_final": 0.1, "ema_decay": 0.9, "network.context": context, **CHANGES[name]}
        method = make_method(name, iterations, spaces=Spaces(2, 2, 8), **learning, **changes)
        for iteration in range(iterations):
            method.update(world.batch(128, random_actions), iteration)
        policy = Policy(name, method.acting_network, method.acting_critic, method.config.acting)
        prompts = policy.network.encode(
            world.text, make_tokens([world.demonstration(0), world.demonstration(1)], ENCODER)
        )
        state, task = world.rng.uniform(-1, 1, (600, 2)).astype(np.float32), np.repeat([0, 1], 300)
        zeros = np.zeros(600, np.int64)
        actions = policy.episodes(prompts, task if text or trajectory else None).act(
            np.arange(600), zeros, state, zeros.astype(np.float32), lambda rows: world.rng.integers(0, 2**62, len(rows))
        )
        return float(np.linalg.norm(actions - world.best(state, task), axis=1).mean())

    return error


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(("text", "trajectory"), [(True, False), (False, True), (True, True), (False, False)])
def test_cloning_follows_either_prompt(error_of: Callable[..., float], name: str, text: bool, trajectory: bool) -> None:
    alone = {"eta": 0.0} if name == "llmdpd" else {"ema_start": 100}
    error = error_of(name, text, trajectory, 300, random_actions=False, **alone)
    # The two tasks' best actions lie 0.94 apart: half of that is the least that not knowing the task costs.
    assert error < 0.2 if text or trajectory else error > 0.4


def test_the_reward_term_improves_on_the_data(error_of: Callable[..., float]) -> None:
    """From random actions: cloning is as bad as the data, with the critics' reward term it finds the best ones."""
    cloned = error_of("llmdpd", True, False, 250, random_actions=True, eta=0.0)
    critics = {"eta": 3.0, "critic_sees_prompts": True, "critic_lr": 3e-3}
    assert cloned > 0.5
    assert error_of("llmdpd", True, False, 350, random_actions=True, **critics) < 0.6 * cloned
