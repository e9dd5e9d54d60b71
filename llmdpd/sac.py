"""Soft actor-critic by stable-baselines3, in pieces that can be stopped between any two steps and go on bit for bit.

The one module that imports stable-baselines3 (an optional extra: `pip install 'llmdpd[sac]'`), and only when used.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llmdpd.envs import COLLECTION_SEED_END
from llmdpd.envs.specs import task_spec
from llmdpd.envs.worker import Environment, make_environment
from llmdpd.errors import InputError
from llmdpd.training.checkpoint import load_checkpoint, read_state, save_checkpoint

_EVALUATION = 1  # the stream of seeds of evaluation episodes; 0 is the collected ones'
_COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


@dataclass(frozen=True)
class Level:
    """How good the policy is, by its deterministic actions: mean return and share of episodes that succeeded."""

    mean_return: float
    success: float


def require_sac() -> None:
    """Raise `InputError`, saying how to get it, where stable-baselines3 is not installed."""
    try:
        import stable_baselines3  # noqa: F401
    except ImportError as error:
        raise InputError(
            "stable-baselines3 is not installed",
            field="policy",
            found=str(error),
            expected="its SAC",
            hint="pip install 'stable-baselines3>=2.4' (the extra `sac` of this package)",
        ) from None


def episode_seed(seed: int, task: str, number: int, stream: int = 0) -> int:
    """The environment's seed of episode `number`: below `COLLECTION_SEED_END`, so never an evaluated episode's."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(task.encode()), stream, number])
    return int(sequence.generate_state(1, np.uint32)[0]) % COLLECTION_SEED_END


class SacTrainer:
    """SAC with stable-baselines3's defaults, on one core, on a task by its name.

    Args:
        task: a canonical name (see `llmdpd.envs.specs`).
        seed: of networks, actions, batches and episodes.
        capacity: steps that the replay buffer holds: all there will be, so that nothing is forgotten.
        max_steps: steps after which an episode is cut; None: the environment's own limit.
        goal_visible: whether Meta-World's observations hold the goal.

    Everything random comes from generators that `advance` swaps in and out: the process's own are left as they were.

    Raises:
        InputError: stable-baselines3 is not installed, or the task is unknown.
    """

    def __init__(self, task: str, seed: int, capacity: int, *, max_steps: int | None, goal_visible: bool) -> None:
        require_sac()
        from stable_baselines3 import SAC
        from stable_baselines3.common.vec_env import DummyVecEnv

        spec = task_spec(task)
        self.task, self.seed = spec.task, seed
        self.max_steps = min(max_steps or spec.max_steps, spec.max_steps)
        self._make = lambda: make_environment(spec.task, goal_visible, False)
        self._episodes = _episodes(self._make(), spec.task, seed, spec.state_dim, spec.action_dim, self.max_steps)
        self._venv = DummyVecEnv([lambda: self._episodes])
        self._random: dict[str, Any] | None = None
        with self._own_random():
            self._model = SAC("MlpPolicy", self._venv, buffer_size=capacity, seed=seed, device="cpu")

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self._model.num_timesteps)

    @property
    def seeds(self) -> npt.NDArray[np.int64]:
        """Seeds of the episodes so far, the present one included."""
        count = len(self._episodes.successes) + 1
        return np.array([episode_seed(self.seed, self.task, number) for number in range(count)], np.int64)

    @property
    def successes(self) -> list[bool]:
        """Whether the success flag was up at any step, of each episode so far, the present one included."""
        return [*self._episodes.successes, self._episodes.success]

    def advance(self, count: int) -> None:
        """Take `count` steps, each followed by a gradient step once the warm-up is over."""
        with self._own_random():
            self._model.learn(count, reset_num_timesteps=False, progress_bar=False)

    def evaluate(self, episodes: int) -> Level:
        """Roll out the deterministic policy; nothing of the training depends on it."""
        environment, returns, successes = self._make(), [], []
        for number in range(episodes):
            observation = environment.reset(episode_seed(self.seed, self.task, number, _EVALUATION))
            total, success = 0.0, False
            for _ in range(self.max_steps):
                action, _ = self._model.predict(observation, deterministic=True)
                observation, reward, flag, over = environment.step(action)
                total, success = total + reward, success or flag
                if over:
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
        """Every network by name, and the entropy's weight: with the optimisers, what a checkpoint holds."""
        log_alpha: Any = self._model.log_ent_coef
        return {"policy": self._model.policy, "entropy": nn.ParameterList([nn.Parameter(log_alpha.data)])}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Every optimiser by name."""
        model: Any = self._model
        found = (model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer)
        return dict(zip(("actor", "critic", "entropy"), found, strict=True))

    def save(self, folder: Path, more: Mapping[str, Any]) -> None:
        """A checkpoint of all but the transitions (see `llmdpd.training.checkpoint`), with `more` in its state.json."""
        model = self._model
        counters = [model.num_timesteps, model._n_updates, model._episode_num]
        with self._own_random():
            random_state = _get_random()
            del random_state["torch"]  # the checkpoint has it
            own = {"counters": counters, "successes": self._episodes.successes, "random": random_state}
            own["actions"] = model.action_space.np_random.bit_generator.state
            save_checkpoint(folder, self, self.steps, {**own, **more})

    def restore(self, checkpoint: Path, transitions: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Go on where `save` was called; `transitions` are all steps up to there.

        The present episode is brought back by its seed and its actions, which on one machine gives the same bits.

        Raises:
            InputError: a checkpoint that is broken or does not fit.
            KeyError, ValueError: transitions that do not.
        """
        state, model = read_state(checkpoint), self._model
        steps = int(state["counters"][0])
        with self._own_random():
            load_checkpoint(checkpoint, self)
            _set_random({**state["random"], "torch": torch.get_rng_state()})
            model.action_space.np_random.bit_generator.state = state["actions"]
        model.num_timesteps, model._n_updates, model._episode_num = state["counters"]
        buffer: Any = model.replay_buffer
        for name in _COLUMNS:
            if len(transitions[name]) != steps:
                raise ValueError(f"{len(transitions[name])} transitions for {steps} steps")
            getattr(buffer, name)[:steps, 0] = transitions[name]
        buffer.pos, buffer.full = steps % buffer.buffer_size, steps == buffer.buffer_size
        ends = np.flatnonzero(transitions["dones"])
        self._episodes.begin(list(state["successes"]))
        observation: Any = self._venv.reset()
        for action in transitions["actions"][ends[-1] + 1 if len(ends) else 0 :]:
            observation, _, _, _ = self._venv.step(model.policy.unscale_action(action[None]))
        model._last_obs = observation
        model._last_episode_starts = np.zeros(1, bool)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Put this trainer's generators in place of the process's while the block runs, and one thread of torch."""
        outside, threads = _get_random(), torch.get_num_threads()
        torch.set_num_threads(1)  # sums depend on it
        try:
            if self._random is not None:
                _set_random(self._random)
            yield
        finally:
            self._random = _get_random()
            _set_random(outside)
            torch.set_num_threads(threads)


def _get_random() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's global generators, which stable-baselines3 draws from."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"].tolist()
    return {
        "torch": torch.get_rng_state(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "python": random.getstate(),
    }


def _set_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    numbers = {**state["numpy"]["state"], "key": np.array(state["numpy"]["state"]["key"], np.uint32)}
    np.random.set_state({**state["numpy"], "state": numbers})
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _episodes(environment: Environment, task: str, seed: int, state_dim: int, action_dim: int, max_steps: int) -> Any:
    """A Gymnasium environment around ours, in which episode n has a seed of its own, whatever happened before."""
    import gymnasium
    from gymnasium.spaces import Box

    class Episodes(gymnasium.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
        observation_space = Box(-np.inf, np.inf, (state_dim,), np.float32)
        action_space = Box(-1.0, 1.0, (action_dim,), np.float32)
        successes: list[bool]

        def begin(self, successes: list[bool]) -> None:
            """The next reset starts the episode after those that ended in `successes`."""
            self.successes, self.success, self._length = successes, False, 0

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
            # stable-baselines3 resets once an episode is over, and once at the start.
            if self._length:
                self.begin([*self.successes, self.success])
            return environment.reset(episode_seed(seed_of_all, task, len(self.successes))), {}

        def step(self, action: Any) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
            observation, reward, flag, over = environment.step(action)
            self._length += 1
            self.success = self.success or flag
            terminated = bool(getattr(environment, "terminated", False))
            truncated = not terminated and (over or self._length >= max_steps)
            return observation, reward, terminated, truncated, {}

    seed_of_all = seed
    episodes = Episodes()
    episodes.begin([])
    return episodes
