"""A user's Gymnasium environment as an environment of this project's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks.base import FloatArray, Frame
from llmdpd.tasks.user.file import UserTask
from llmdpd.tasks.user.modules import import_from, in_words
from llmdpd.utils.extras import extra

with extra("data"):
    import gymnasium
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.wrappers import TimeLimit

_RENDER_MODE = "rgb_array"


class UserEnvironment:
    """A task's environment: observations as vectors, actions within their bounds, an end after `max_steps`.

    Args:
        task: whose `env` is made.
        folder: where the module of "module:factory" is looked for first.
        render: whether `render()` will be called.

    Attributes:
        state_dim, action_dim: S, the numbers of an observation, and A, those of an action.
        action_bounds: the lowest and the highest action [A], ±inf where a number has none; None where none has one.
        max_steps: the task's own, or the environment's time limit.
        renders: whether it can render pictures.
        terminated: whether the last step ended in a terminal state, not at a limit of steps.
        infos: keys of the infos of the present episode so far.

    Raises:
        InputError: there is no such environment, it cannot be made, its spaces cannot be used, nothing ends its
            episodes, or its time limit is below the task's.
    """

    def __init__(self, task: UserTask, folder: Path, *, render: bool = False) -> None:
        assert task.env is not None, "the caller knows that there is an environment"
        self._task = task
        self._env = _make(task, folder, render)
        self._action_space = _box(self._env.action_space, task)
        self._observed = _observed(self._env.observation_space, task)
        self.state_dim = sum(gymnasium.spaces.flatdim(space) for space in self._observed.values())
        self.action_dim = int(np.prod(self._action_space.shape))
        low, high = self._action_space.low.ravel(), self._action_space.high.ravel()
        bounded = np.isfinite(low).any() or np.isfinite(high).any()
        self.action_bounds = (tuple(map(float, low)), tuple(map(float, high))) if bounded else None
        self.max_steps = _limit(self._env, task)
        self.renders = _RENDER_MODE in (self._env.metadata.get("render_modes") or ())
        self.terminated = False
        self._steps, self._return = 0, 0.0
        self.infos: set[str] = set()

    @property
    def parts(self) -> dict[str, int]:
        """The keys of a Dict observation that are read, in their order, and how many numbers each has; else none."""
        space = self._env.observation_space
        known = space.spaces if isinstance(space, gymnasium.spaces.Dict) else {}
        return {key: gymnasium.spaces.flatdim(known[key]) for key in self.read}

    @property
    def read(self) -> tuple[str, ...]:
        """The keys of a Dict observation that are read, in their order; none of other observations."""
        return self._task.observation or self.keys

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a Dict observation, in Gymnasium's order; none of other observations."""
        space = self._env.observation_space
        return tuple(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else ()

    def reset(self, seed: int) -> FloatArray:
        """Start the episode of `seed`; returns obs f32 [S]. Raises InputError as `step`."""
        self.terminated, self._steps, self._return = False, 0, 0.0
        self.infos.clear()
        observation, _ = self._answer("reset", ("observation", "info"), lambda: self._env.reset(seed=int(seed)))
        return self._vector(observation)

    def step(self, action: npt.ArrayLike) -> tuple[FloatArray, float, bool, bool]:
        """Execute `action` [A], clipped to its bounds: obs f32 [S], reward, success, over.

        Over is a terminal state or the limit of steps; `terminated` tells them apart.

        Raises:
            InputError: the environment fails, or returns something else than Gymnasium's five values, an observation
                of its space and a finite reward; an episode whose infos never had the key of success, or a value
                there that is neither a boolean nor a number.
        """
        space = self._action_space
        whole = np.asarray(action, np.float64).reshape(space.shape)
        if not np.issubdtype(space.dtype, np.floating):
            whole = np.rint(whole)
        within = np.clip(whole, space.low, space.high).astype(space.dtype)
        names = ("observation", "reward", "terminated", "truncated", "info")
        observation, reward, *ends, info = self._answer("step", names, lambda: self._env.step(within))
        self._steps += 1
        gain = self._number("reward", reward)
        self._return += gain
        self.infos.update(info)
        terminated, truncated = (bool(self._number(name, end)) for name, end in zip(names[2:4], ends, strict=True))
        self.terminated = terminated
        over = terminated or truncated or self._steps >= self.max_steps
        return self._vector(observation), gain, self._succeeds(info, over), over

    def try_out(self, seed: int = 0) -> None:
        """Take a step, or where its infos lack the key of success, the steps of one episode.

        Raises:
            InputError: as `reset` and `step`: what would otherwise come up after the training.
        """
        self.reset(seed)
        low, high = self.action_bounds or (np.full(self.action_dim, -np.inf), np.full(self.action_dim, np.inf))
        middle = np.clip(np.zeros(self.action_dim), low, high)
        over, key = False, self._task.success.key
        while not over and (self._steps == 0 or (key is not None and key not in self.infos)):
            over = self.step(middle)[3]

    def render(self) -> Frame:
        """The present state as a picture, uint8 [H, W, 3]; needs `render=True` at construction."""
        frame = np.asarray(self._attempt("render", self._env.render))
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            found = f"{frame.dtype} of shape {list(frame.shape)}"
            raise self._wrong("a picture cannot be used", "env", found, "uint8 of shape [H, W, 3]")
        return np.ascontiguousarray(frame)

    def close(self) -> None:
        """Free what the environment holds."""
        self._env.close()

    def _attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """What a method of the environment returns. It can fail in any way, and only the way says what to do."""
        try:
            return call()
        except Exception as error:
            found = f"in step {self._steps + 1}" if name == "step" else None
            raise InputError(
                f"the environment's {name} fails", field=self._field("env"), found=found, hint=in_words(error)
            ) from error

    def _answer(self, name: str, values: tuple[str, ...], call: Callable[[], Any]) -> tuple[Any, ...]:
        """What `reset` or `step` returns, which has to be as many values as Gymnasium's, an info the last."""
        answer = self._attempt(name, call)
        if not isinstance(answer, tuple) or len(answer) != len(values) or not isinstance(answer[-1], Mapping):
            found = (
                f"a tuple of {len(answer)} values"
                if isinstance(answer, tuple)
                else f"one value, of type {type(answer).__name__}"
            )
            problem, hint = f"the environment's {name} does not return what Gymnasium asks for", None
            if not isinstance(answer, tuple) or len(answer) != len(values):
                hint = "this is the interface of the old gym: gymnasium.wrappers, or the package shimmy, convert it"
            raise self._wrong(problem, "env", found, ", ".join(values), hint)
        return answer

    def _number(self, name: str, value: Any, field: str = "env") -> float:
        """A number, or yes or no, that an environment returned as it liked, also as an array of one."""
        array = np.asarray(value) if not isinstance(value, (str, bytes)) else np.empty(0)
        if array.size != 1 or array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            expected = "a finite number" if name == "reward" else "true or false, or a finite number"
            raise self._wrong(f"the environment's {name} cannot be used", field, repr(value)[:80], expected)
        return float(array.item())

    def _flat(self, key: str, observation: Any) -> FloatArray:
        """A part of an observation as its numbers, which have to be as many as its space says."""
        space = self._observed[key]
        try:
            value = observation[key] if key else observation
            flat: FloatArray = np.asarray(gymnasium.spaces.flatten(space, value), np.float32)
        except Exception as error:
            found = f"{repr(observation)[:80]}: {in_words(error)}"
            raise self._wrong("the environment's observation is not of its space", "env", found, str(space)) from error
        if flat.shape != (gymnasium.spaces.flatdim(space),):
            found = f"{flat.size} numbers in step {self._steps}"
            raise self._wrong("the environment's observation is not of its space", "env", found, str(space))
        return flat

    def _vector(self, observation: Any) -> FloatArray:
        vector: FloatArray = np.concatenate([self._flat(key, observation) for key in self._observed])
        if not np.isfinite(vector).all():
            place = int(np.flatnonzero(~np.isfinite(vector))[0])
            found = f"{vector[place]} at number {place} in step {self._steps}"
            raise self._wrong("the environment's observation is not finite", "env", found, "finite numbers")
        return vector

    def _succeeds(self, info: dict[str, Any], over: bool) -> bool:
        success = self._task.success
        if success.episode_return is not None:
            return self._return >= success.episode_return
        if success.key is None:
            return False
        if over and success.key not in self.infos:
            found, hint = ", ".join(sorted(self.infos)) or "no infos", nearest_names(success.key, self.infos)
            raise InputError(
                "the environment's infos do not say whether a step succeeds",
                field=f"tasks.{self._task.name}.success",
                found=found,
                expected=success.key,
                hint=f"nearest: {hint}" if hint else "leave success out: then the return counts",
            )
        return success.key in info and bool(self._number(f"info {success.key!r}", info[success.key], "success"))

    def _field(self, key: str) -> str:
        return f"tasks.{self._task.name}.{key}"

    def _wrong(self, problem: str, field: str, found: str, expected: str, hint: str | None = None) -> InputError:
        return InputError(problem, field=self._field(field), found=found, expected=expected, hint=hint)


def _make(task: UserTask, folder: Path, render: bool) -> gymnasium.Env:
    name, kwargs = str(task.env), dict(task.env_kwargs)
    field = f"tasks.{task.name}.env"
    if task.factory:
        factory = _factory(name, field, folder)
        if render and _takes(factory, "render_mode"):
            kwargs["render_mode"] = _RENDER_MODE
        made = _attempt(lambda: factory(**kwargs), name, field)
    else:
        _check_registered(name, field, folder)
        if render:
            kwargs["render_mode"] = _RENDER_MODE
        made = _attempt(lambda: gymnasium.make(name, disable_env_checker=True, **kwargs), name, field)
    if not isinstance(made, gymnasium.Env):
        found, expected = f"{name} makes a {type(made).__name__}", "a gymnasium.Env"
        raise InputError("this is not an environment", field=field, found=found, expected=expected)
    return made


def _attempt(make: Callable[[], Any], name: str, field: str) -> Any:
    """What `make` makes. Making a user's environment can fail in any way, and only the way says what to do."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*out of date.*")  # the version was chosen on purpose
            return make()
    except InputError:
        raise
    except Exception as error:
        raise InputError("the environment cannot be made", field=field, found=name, hint=in_words(error)) from error


def _factory(name: str, field: str, folder: Path) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise _unnamed(name, field)
    found = import_from(folder, module, field)
    factory = getattr(found, attribute, None)
    if not callable(factory):
        known = [key for key, value in vars(found).items() if callable(value)]
        hint = f"nearest: {nearest_names(attribute, known)}"
        raise InputError(
            "the module has no such function", field=field, found=name, expected="module:factory", hint=hint
        )
    return factory


def _takes(factory: Callable[..., Any], keyword: str) -> bool:
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == keyword or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _unnamed(name: str, field: str) -> InputError:
    return InputError("no environment is named", field=field, found=name, expected='an id, or "module:factory"')


def _check_registered(name: str, field: str, folder: Path) -> None:
    """Raise `InputError`, which offers the nearest ids, for an id that is not registered."""
    module, colon, plain = name.rpartition(":")
    if not plain or (colon and not module):
        raise _unnamed(name, field)
    if colon:
        import_from(folder, module, field)
    try:
        gymnasium.spec(plain)
    except gymnasium.error.Error as error:
        near = nearest_names(plain, gymnasium.registry)
        expected = 'a registered id such as "Pusher-v5", or "module:factory"'
        hint = f'nearest: {near}; a package\'s ids are there once it is imported, as in "package:{plain}"'
        raise InputError(
            "unknown Gymnasium environment", field=field, found=name, expected=expected, hint=hint
        ) from error


def _box(space: gymnasium.Space[Any], task: UserTask) -> gymnasium.spaces.Box:
    if isinstance(space, gymnasium.spaces.Box):
        return space
    expected = "a Box: actions are vectors of numbers"
    raise InputError(
        "these actions cannot be used", field=f"tasks.{task.name}.env", found=str(space), expected=expected
    )


def _observed(space: gymnasium.Space[Any], task: UserTask) -> dict[str, gymnasium.Space[Any]]:
    """The spaces of the observation's parts, by key in their order; "" for the whole of it."""
    field = f"tasks.{task.name}.observation"
    parts: dict[str, gymnasium.Space[Any]] = {"": space}
    if task.observation:
        if not isinstance(space, gymnasium.spaces.Dict):
            raise InputError("only Dict observations have keys", field=field, found=str(space), expected="left out")
        for key in task.observation:
            if key not in space.spaces:
                hint = f"nearest: {nearest_names(key, space.spaces)}"
                expected = f"one of {', '.join(space.spaces)}"
                raise InputError(
                    "the observation has no such key", field=field, found=key, expected=expected, hint=hint
                )
        parts = {key: space.spaces[key] for key in task.observation}
    for key, part in parts.items():
        if not part.is_np_flattenable:
            expected = "spaces of fixed size, which Gymnasium can flatten"
            raise InputError("this observation cannot be used", field=field, found=f"{key} {part}", expected=expected)
    return parts


def _limit(env: gymnasium.Env, task: UserTask) -> int:
    """Steps of an episode at most: the task's own, else the environment's time limit, which bounds it."""
    own, field = time_limit(env), f"tasks.{task.name}.max_steps"
    if own is None and task.max_steps is None:
        raise InputError(
            "nothing ends the episodes",
            field=field,
            found="neither max_steps nor a time limit of the environment",
            expected="max_steps = NUMBER, of the task or of [suite]",
        )
    if own is not None and task.max_steps is not None and task.max_steps > own:
        expected = f"1 to {own}, where the environment's time limit is"
        raise InputError("the number is out of range", field=field, found=task.max_steps, expected=expected)
    return int(task.max_steps or own or 0)


def time_limit(env: gymnasium.Env) -> int | None:
    """Steps after which an environment truncates its episodes, of its registration or of a `TimeLimit` around it."""
    spec: EnvSpec | None = env.spec
    limits = [] if spec is None or spec.max_episode_steps is None else [spec.max_episode_steps]
    layer: Any = env
    while isinstance(layer, gymnasium.Wrapper):
        if isinstance(layer, TimeLimit):
            limits.append(layer._max_episode_steps)
        layer = layer.env
    return min(limits, default=None)
