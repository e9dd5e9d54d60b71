"""Tiny methods and batches, recorded calls, and a world of points to learn in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.methods import METHODS
from llmdpd.methods.base import Method
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.decision_transformer import DemonstrationConfig
from llmdpd.methods.lamo.backbone import LoRAConfig
from llmdpd.methods.lamo.language_model import find_language_model
from llmdpd.methods.mtdiff import MTDiffTrajectoryConfig
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.sequence_model import SequenceConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.nn.trajectory_denoiser import TrajectoryConfig
from llmdpd.nn.world_transformer import WorldTransformerConfig
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.prompts.useful_part import Recorded

S, A, D = 4, 2, 6
SPACES = Spaces(S, A, D)
# Without dropout, so that a prompt is encoded alike twice.
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8, dropout=0.0)
CONTEXT = ContextConfig(text_dim=5, text_hidden=16, trajectory_dim=3, encoder=ENCODER)
TINY_TRAJECTORY = {"layers": 1, "width": 16, "inner": 16, "dropout": 0.0}
DEMONSTRATION = DemonstrationConfig(8, "even")

_DIFFUSION = {"network.hidden_dim": 16, "network.time_dim": 8, "network.context": CONTEXT, "critic_hidden": 16}
_ACTOR = {"network.hidden_dim": 32, "network.context": dataclasses.replace(CONTEXT, text=False, trajectory=False)}
_ACTOR_CRITIC = {**_ACTOR, "critic_hidden": 32}
_SEQUENCE = {
    "network.action_bound": 1.5,
    "network.sequence": SequenceConfig(context=5, layers=2, heads=2, width=16, dropout=0.0, longest=40),
}
TINY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llmdpd", "diffusion-ql", "diffusion-bc"), _DIFFUSION),
    "trajectory-diffusion": {
        **{"network.time_dim": 8, "network.diffusion_steps": 7, "network.context": CONTEXT},
        "network.trajectory": TrajectoryConfig(horizon=5, **TINY_TRAJECTORY),
    },
    "bc": _ACTOR,
    **dict.fromkeys(("td3-bc", "rad", "s4rl", "cql"), _ACTOR_CRITIC),
    "ads": {**_ACTOR_CRITIC, "behaviour_hidden": 24},
    "rd": {**_ACTOR_CRITIC, "members": 3},
    "pnf": {**_ACTOR_CRITIC, "members": 3, "model_hidden": 24, "model_layers": 2},
    "otto": {
        **_ACTOR_CRITIC,
        "network.world": WorldTransformerConfig(horizon=4, layers=1, heads=1, width=16, dropout=0.0),
    },
    "dt": _SEQUENCE,
    "prompt-dt": {**_SEQUENCE, "network.demonstration": DEMONSTRATION},
    "mtdiff": {
        **{"network.action_bound": 1.5, "network.time_dim": 8, "network.diffusion_steps": 12},
        "network.demonstration": DEMONSTRATION,
        "network.trajectory": MTDiffTrajectoryConfig(horizon=3, history=2, **TINY_TRAJECTORY),
    },
    "lamo": {
        **{"network.sequence.context": 5, "network.sequence.dropout": 0.0, "network.sequence.longest": 40},
        **{"network.lora": LoRAConfig(rank=3, alpha=7, dropout=0.0), "language_block": 9, "language_batch": 4},
    },
}
"""Changes of a method's default configuration, by dotted names."""


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration with the fields of these dotted names changed."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        value = changed(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: value})
    return config


@pytest.fixture
def make_config(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A method's configuration with tiny networks; further changes by dotted names, as `eta` or `network.chunk`."""

    def make(name: str, **changes: Any) -> Any:
        config = METHODS[name].Config()
        if name == "lamo":
            with torch.enable_grad():  # it is made when it is first asked for, and trained
                model, corpus = map(str, request.getfixturevalue("tiny_gpt2"))
            sizes = find_language_model(model).sizes
            config = changed(config, {"model": model, "corpus": corpus, "network.language": sizes})
        return changed(config, {**TINY[name], **changes})

    return make


@pytest.fixture
def make_network(make_config: Any, rng: np.random.Generator) -> Callable[..., Any]:
    """A method's network for S, A and D, with statistics of random data; changes as of `make_config`."""

    def make(name: str, spaces: Spaces = SPACES, **changes: Any) -> Any:
        network = METHODS[name].build_network(spaces, make_config(name, **changes).network)
        network.fit(torch.randn(60, spaces.state_dim) * 2 + 1, lambda: torch.tensor([1.0, -30.0, 7.0]))
        return network.eval()

    return make


@pytest.fixture
def make_method(make_config: Any, make_network: Any) -> Callable[..., Any]:
    """A method by its name, of which the EMA and the targets differ from what is trained."""

    def make(
        name: str = "llmdpd",
        iterations: int = 100,
        network: Any = None,
        spaces: Spaces = SPACES,
        **changes: Any,
    ) -> Method[Any, Any]:
        kind: Any = METHODS[name]
        network = make_network(name, spaces, **changes) if network is None else network
        method: Method[Any, Any] = kind(network, make_config(name, **changes), iterations)
        with torch.no_grad():
            for part, module in method.modules.items():
                for parameter in module.parameters() if part.startswith(("target_", "ema_")) else ():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return method

    return make


@pytest.fixture
def make_pairs(rng: np.random.Generator) -> Callable[..., list[tuple[np.ndarray, np.ndarray]]]:
    """Demonstrations of these lengths, as observations and actions."""
    return lambda *lengths: [
        (rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)) for n in lengths
    ]


@pytest.fixture
def make_batch(rng: np.random.Generator, make_pairs: Any) -> Callable[..., PromptedBatch]:
    """B transitions under P prompts; where H is given with windows of `before` steps and H from the transition on.

    Their episodes end after 1 … H of those, and every second one begins at the transition.
    """

    def windows(observations: torch.Tensor, H: int, before: int, expert: bool) -> StepWindows:
        B, steps = len(observations), torch.arange(before + H)
        rows = torch.arange(B)[:, None]
        mask = (steps <= before + rows % H) & ((steps >= before) | (rows % 2 == 1))
        actions = torch.rand(2, B, before + H, A) * 2 - 1
        states = torch.randn(B, before + H, S)
        states[:, before] = observations
        return StepWindows(states, actions[0], actions[1] if expert else None, mask, 20 * torch.randn(mask.shape))

    def make(B: int = 6, P: int = 1, expert: bool = True, H: int = 0, before: int = 0) -> PromptedBatch:
        recorded = [Recorded(*pair, rng.normal(size=len(pair[0]))) for pair in make_pairs(*rng.integers(2, 12, P))]
        observations = torch.randn(B, S)
        return PromptedBatch(
            observations=observations,
            actions=torch.rand(B, A) * 2 - 1,
            rewards=torch.randn(B),
            next_observations=torch.randn(B, S),
            terminals=(torch.arange(B) % 3 == 1).float(),
            expert_actions=torch.rand(B, A) * 2 - 1 if expert else None,
            timesteps=torch.from_numpy(rng.integers(0, 60, B)),
            text=torch.randn(P, D),
            tokens=make_tokens(recorded, ENCODER, returns=True),
            windows=windows(observations, H, before, expert) if H else None,
        )

    return make


@pytest.fixture
def calls_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[tuple[Any, ...]]]:
    """Records the calls of `owner.name`: their arguments, and what was returned as the last."""

    def record(owner: Any, name: str) -> list[tuple[Any, ...]]:
        real, calls = getattr(owner, name), list[tuple[Any, ...]]()

        def recorded(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            calls.append((*arguments, *options.values(), result))
            return result

        monkeypatch.setattr(owner, name, recorded)
        return calls

    return record


@pytest.fixture
def q_by_hand() -> Callable[..., np.ndarray]:
    """An MLP in numpy, float64, with this activation: inputs [B, n] side by side → [B, outputs]."""

    def value(activation: Callable[[np.ndarray], np.ndarray], network: torch.nn.Module, *parts: Any) -> np.ndarray:
        x = np.concatenate([np.asarray(torch.as_tensor(part).detach(), np.float64) for part in parts], -1)
        layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
        for number, layer in enumerate(layers):
            x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
            x = activation(x) if number < len(layers) - 1 else x
        return x

    return value


class Point:
    """A point in the unit square goes where its action says; the state holds the goal, one of two."""

    GOALS = np.array([[0.8, 0.5], [-0.8, -0.5]], np.float32)
    STEPS = 8

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def start(self, count: int) -> np.ndarray:
        goal = self.GOALS[self.rng.integers(0, 2, count)]
        return np.concatenate([self.rng.uniform(-1, 1, (count, 2)), goal], 1).astype(np.float32)

    def step(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = np.clip(state[:, :2] + 0.3 * action, -1, 1)
        reward = -np.linalg.norm(place - state[:, 2:], axis=1)
        return np.concatenate([place, state[:, 2:]], 1).astype(np.float32), reward

    def best(self, state: np.ndarray, step: int = 0) -> np.ndarray:
        """The best action: straight to the goal."""
        return np.clip((state[:, 2:] - state[:, :2]) / 0.3, -1, 1).astype(np.float32)

    def behave(self, state: np.ndarray, step: int = 0) -> np.ndarray:
        """A weaker version of the best action, with noise as large."""
        best = self.best(state)
        return np.clip(0.8 * best + self.rng.normal(0, 0.9, best.shape), -1, 1)

    def anyhow(self, state: np.ndarray, step: int = 0) -> np.ndarray:
        """Random actions."""
        return self.rng.uniform(-1, 1, (len(state), A))

    def episodes(self, act: Callable[[np.ndarray, int], np.ndarray], count: int) -> tuple[float, list[np.ndarray]]:
        """The mean return, and states, actions, rewards, next states and time steps of the episodes, [count, STEPS]."""
        state, total, steps = self.start(count), np.zeros(count), []
        for step in range(self.STEPS):
            action = act(state, step).astype(np.float32)
            following, reward = self.step(state, action)
            steps.append((state, action, reward.astype(np.float32), following, np.full(count, step)))
            state, total = following, total + reward
        return float(total.mean()), [np.stack(part, 1) for part in zip(*steps, strict=True)]

    def check(self, policy: Any, behaviour: float, margin: float) -> None:
        """A prompted policy, which is given its rewards, goes this part of the way from a return to the best one."""

        def act(state: np.ndarray, step: int) -> np.ndarray:
            distance = np.linalg.norm(state[:, :2] - state[:, 2:], axis=1)
            return policy.act(state, step, reward=-distance if step else None)

        policy.reset()
        learned, best = self.episodes(act, 300)[0], self.episodes(self.best, 300)[0]
        print("behaviour, learned, best:", behaviour, learned, best)
        assert learned > behaviour + margin * (best - behaviour), (behaviour, learned, best)


@pytest.fixture
def world(rng: np.random.Generator) -> Point:
    """A world of points."""
    return Point(rng)
