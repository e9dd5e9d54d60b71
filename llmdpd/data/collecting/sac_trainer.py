"""Soft actor-critic by stable-baselines3 that can stop between any two steps and continue with the same bits.

The one module that imports stable-baselines3 (an optional extra: `pip install 'llmdpd[sac]'`), and only when used.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llmdpd.errors import InputError
from llmdpd.tasks import COLLECTION_SEED_END
from llmdpd.tasks.base import Environment
from llmdpd.tasks.simulation.isolated import IsolatedEnvironments
from llmdpd.tasks.simulation.rollout import MAKE_ENVIRONMENT
from llmdpd.tasks.simulation.worker import EnvironmentHost, State
from llmdpd.tasks.specs import TaskSpec
from llmdpd.utils.extras import extra

MakeEnvironment = Callable[[str, bool, bool], Environment]
"""(task, goal_visible, render) → an environment."""

_KEPT_ENVIRONMENTS = 8
_EVALUATION = 1  # the stream of seeds of evaluation episodes; 0 is the collected ones'
_LOSSES = (("critic", "critic_loss"), ("actor", "actor_loss"), ("temperature", "ent_coef_loss"))
_COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class Level(NamedTuple):
    """The quality of the deterministic policy: mean return and share of successful episodes."""

    mean_return: float
    success: float


class EpisodeEnd(NamedTuple):
    """A finished episode: its task, undiscounted return, and whether the success flag was set at any step."""

    task: str
    episode_return: float
    success: bool


def require_sac(field: str = "policy") -> None:
    """Raise `InputError`, naming the field and the command to install it, if stable-baselines3 is not installed."""
    with extra("sac", field):
        import stable_baselines3  # noqa: F401


def episode_seed(seed: int, task: str, number: int, stream: int = 0) -> int:
    """The environment's seed of episode `number`: below `COLLECTION_SEED_END`, so never an evaluated episode's."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(task.encode()), stream, number])
    return int(sequence.generate_state(1, np.uint32)[0]) % COLLECTION_SEED_END


def check_unit_actions(spec: TaskSpec) -> None:
    """Raise `InputError` for a task whose actions have other bounds than ±1, within which SAC acts here."""
    ones = (1.0,) * spec.action_dim
    known = spec.action_low is not None or spec.action_high is not None
    if known and (spec.action_low, spec.action_high) != (tuple(-one for one in ones), ones):
        raise InputError(
            "SAC acts within ±1, and the environment has other bounds",
            field=f"actions of {spec.task}",
            found=f"{spec.action_low} to {spec.action_high}",
            expected="-1 to 1 in each dimension",
            hint="wrap the environment in gymnasium.wrappers.RescaleAction(env, -1, 1)",
        )


class SacTrainer:
    """SAC by stable-baselines3, with its defaults unless stated otherwise, on one core.

    Episode n belongs to task n mod the number of tasks: one policy learns all of them.

    Args:
        specs: the tasks, alike in observations and actions.
        seed: of networks, actions, batches and episodes.
        capacity: steps that the replay buffer holds: those of the whole run, so that none is overwritten.
        max_steps: steps after which an episode is truncated; None: the environments' own limit.
        goal_visible: whether observations hold the goal, where the suite can hide it.
        settings: arguments of `stable_baselines3.SAC` in place of its defaults.
        make: factory of the environments; one that is named ("module:function") is called in a process of its own.

    All random numbers come from generators that each call swaps in and out; the process's own are left unchanged.

    Raises:
        InputError: stable-baselines3 is not installed, or actions have other bounds than ±1.
    """

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        seed: int,
        capacity: int,
        *,
        max_steps: int | None,
        goal_visible: bool,
        settings: Mapping[str, Any] | None = None,
        make: MakeEnvironment | str = MAKE_ENVIRONMENT,
    ) -> None:
        require_sac()
        check_unit_actions(specs[0])
        with extra("sac"):
            from stable_baselines3 import SAC
            from stable_baselines3.common.logger import Logger
            from stable_baselines3.common.vec_env import DummyVecEnv

        limit = min(spec.max_steps for spec in specs)
        self.tasks, self.seed = tuple(spec.task for spec in specs), seed
        self.max_steps = min(max_steps or limit, limit)

        kept: dict[str, Any] = {"goal_visible": goal_visible, "limit": _KEPT_ENVIRONMENTS}
        self._environments = (
            IsolatedEnvironments(make, **kept) if isinstance(make, str) else EnvironmentHost(make, **kept)
        )
        self._episodes = _episodes(self._environments, specs, seed, self.max_steps)
        self._venv = DummyVecEnv([lambda: self._episodes])
        self._random: dict[str, Any] | None = None
        self._within = False
        self._callback: Any = None
        with self.own_random():
            settings = {"buffer_size": capacity, "seed": seed, "device": "cpu", **(settings or {})}
            self._model = SAC("MlpPolicy", self._venv, **settings)
        # Its own logger makes a folder for temporary files at every call of `learn`.
        self._model.set_logger(Logger(None, []))

    @property
    def actor(self) -> nn.Module:
        """stable-baselines3's actor as it is now: `latent_pi`, then `mu` and `log_std`."""
        return self._model.actor

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self._model.num_timesteps)

    @property
    def seeds(self) -> npt.NDArray[np.int64]:
        """Seeds of the episodes so far, the current one included."""
        count = len(self._episodes.successes) + 1
        return np.array([self._episodes.seed_of(number) for number in range(count)], np.int64)

    @property
    def successes(self) -> list[bool]:
        """For each episode so far, the current one included: whether the success flag was set at any step."""
        return [*self._episodes.successes, self._episodes.success]

    def advance(self, count: int) -> None:
        """Take `count` steps, each followed by a gradient step once the warm-up is over."""
        with self.own_random():
            for _ in range(count):
                self.step()
                self.learn()

    def step(self) -> EpisodeEnd | None:
        """Take and store a step in the environment; returns the episode that it ended, if any.

        Followed by `learn`, it is an iteration of stable-baselines3's own `learn`.
        """
        model: Any = self._model
        ended = len(self._episodes.successes)
        with self.own_random():
            if self._callback is None:
                _, self._callback = model._setup_learn(model.replay_buffer.buffer_size, reset_num_timesteps=False)
            settings = {name: getattr(model, name) for name in ("train_freq", "replay_buffer", "learning_starts")}
            model.collect_rollouts(model.env, callback=self._callback, **settings)
        return self._episodes.last if len(self._episodes.successes) > ended else None

    def learn(self) -> dict[str, float]:
        """A gradient step of critics, actor and entropy weight; returns its losses by name, none during the warm-up."""
        model = self._model
        if self.steps <= model.learning_starts:
            return {}
        with self.own_random():
            model.train(gradient_steps=1, batch_size=model.batch_size)
        logged = model.logger.name_to_value
        losses = {f"loss/{name}": float(logged[f"train/{theirs}"]) for name, theirs in _LOSSES}
        return {**losses, "temperature": float(logged["train/ent_coef"])}

    def evaluate(self, episodes: int, check: Callable[[], None] = lambda: None) -> Level:
        """Roll out the deterministic policy for `episodes` episodes per task; training does not depend on it.

        `check` is called before each and may raise to stop.
        """
        returns, successes = [], []
        for task in self.tasks:
            for number in range(episodes):
                check()
                seed = episode_seed(self.seed, task, number, _EVALUATION)
                state = self._environments.reset("evaluation", task, seed)
                total, success = 0.0, False
                for _ in range(self.max_steps):
                    action = self._model.predict(state.observation, deterministic=True)[0]
                    state = self._environments.step("evaluation", action)
                    total, success = total + state.reward, success or state.success
                    if state.over:
                        break
                returns.append(total)
                successes.append(success)
        return Level(float(np.mean(returns)), float(np.mean(successes)))

    def transitions(self, start: int = 0) -> dict[str, npt.NDArray[np.float32]]:
        """The steps from `start` on, as taken: arrays [N, S], [N, A] and [N] by name."""
        buffer = self._model.replay_buffer
        return {name: np.asarray(getattr(buffer, name)[start : self.steps, 0], np.float32) for name in _COLUMNS}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every network by name, and the entropy weight: with the optimisers, the content of a checkpoint."""
        log_alpha: Any = self._model.log_ent_coef
        return {"policy": self._model.policy, "entropy": nn.ParameterList([nn.Parameter(log_alpha.data)])}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Every optimiser by name."""
        model: Any = self._model
        actor, critic = model.actor.optimizer, model.critic.optimizer
        return {"actor": actor, "critic": critic, "entropy": model.ent_coef_optimizer}

    def state(self) -> dict[str, Any]:
        """Everything besides networks, optimisers and transitions that is needed to continue, as JSON."""
        model = self._model
        with self.own_random():
            random_state = _get_random()
        return {
            "counters": [model.num_timesteps, model._n_updates, model._episode_num],
            "successes": self._episodes.successes,
            "random": _random_to_json(random_state),
            "actions": model.action_space.np_random.bit_generator.state,
        }

    def load_state(self, state: Mapping[str, Any], transitions: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Restore a `state` after networks and optimisers; `transitions` are all steps before it.

        The current episode is replayed from its seed and its actions, which on one machine gives the same bits. Raises
        KeyError or ValueError for a state or transitions that do not fit.
        """
        model, steps = self._model, int(state["counters"][0])
        self._random = _random_from_json(state["random"])
        model.action_space.np_random.bit_generator.state = state["actions"]
        model.num_timesteps, model._n_updates, model._episode_num = state["counters"]
        self._episodes.begin(list(state["successes"]))
        if not steps:
            return
        buffer: Any = model.replay_buffer
        for name in _COLUMNS:
            if len(transitions[name]) != steps:
                raise ValueError(f"{len(transitions[name])} transitions for {steps} steps")
            getattr(buffer, name)[:steps, 0] = transitions[name]
        buffer.pos, buffer.full = steps % buffer.buffer_size, steps == buffer.buffer_size
        ends = np.flatnonzero(transitions["dones"])
        observation: Any = self._venv.reset()
        for action in transitions["actions"][ends[-1] + 1 if len(ends) else 0 :]:
            observation, _, _, _ = self._venv.step(model.policy.unscale_action(action[None]))
        model._last_obs = observation
        model._last_episode_starts = np.zeros(1, bool)

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Use this trainer's generators instead of the process's, and one thread of torch, while the block runs."""
        if self._within:
            yield
            return
        outside, threads = _get_random(), torch.get_num_threads()
        torch.set_num_threads(1)  # sums depend on it
        self._within = True
        try:
            if self._random is not None:
                _set_random(self._random)
            yield
        finally:
            self._within = False
            self._random = _get_random()
            _set_random(outside)
            torch.set_num_threads(threads)


def _get_random() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's global generators, which stable-baselines3 samples from."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False), "python": random.getstate()}


def _set_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _random_to_json(state: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {**state["numpy"]["state"], "key": state["numpy"]["state"]["key"].tolist()}
    words = state["torch"].numpy().tobytes().hex()
    return {**state, "torch": words, "numpy": {**state["numpy"], "state": numbers}}


def _random_from_json(state: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {**state["numpy"]["state"], "key": np.array(state["numpy"]["state"]["key"], np.uint32)}
    version, words, gauss = state["python"]
    return {
        "torch": torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8),
        "numpy": {**state["numpy"], "state": numbers},
        "python": (version, tuple(words), gauss),
    }


def _episodes(
    environments: EnvironmentHost | IsolatedEnvironments, specs: Sequence[TaskSpec], seed: int, max_steps: int
) -> Any:
    """A Gymnasium environment in which episode n has a task and a seed of its own, independent of earlier episodes."""
    with extra("sac"):
        import gymnasium
        from gymnasium.spaces import Box

    class Episodes(gymnasium.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
        observation_space = Box(-np.inf, np.inf, (specs[0].state_dim,), np.float32)
        action_space = Box(-1.0, 1.0, (specs[0].action_dim,), np.float32)
        successes: list[bool]
        last: EpisodeEnd | None = None

        def begin(self, successes: list[bool]) -> None:
            """The next reset starts the episode after those that ended in `successes`."""
            self.successes, self.success, self._length, self._return = successes, False, 0, 0.0

        def task_of(self, number: int) -> str:
            return specs[number % len(specs)].task

        def seed_of(self, number: int) -> int:
            return episode_seed(seed_of_all, self.task_of(number), number)

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
            # stable-baselines3 resets once an episode is over, and once at the start.
            if self._length:
                self.last = EpisodeEnd(self.task_of(len(self.successes)), self._return, self.success)
                self.begin([*self.successes, self.success])
            number = len(self.successes)
            before = _get_random()
            state = environments.reset("training", self.task_of(number), self.seed_of(number))
            # Which environments are made anew depends on where a run was resumed; random numbers must not.
            _set_random(before)
            return state.observation, {}

        def step(self, action: Any) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
            state: State = environments.step("training", action)
            self._length += 1
            self._return += state.reward
            self.success = self.success or state.success
            truncated = not state.terminated and (state.over or self._length >= max_steps)
            return state.observation, state.reward, state.terminated, truncated, {}

    seed_of_all = seed
    episodes = Episodes()
    episodes.begin([])
    return episodes
