"""A user's environment: its spaces, its actions, its successes and its end, as the project's own environments have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from llmdpd.errors import InputError
from llmdpd.tasks.user import use_no_file
from llmdpd.tasks.user.environment import UserEnvironment
from llmdpd.tasks.user.file import Success, UserTask

TASK = UserTask("mine", env="tests_env:make", max_steps=5, success=Success("ok"))


class Env(gymnasium.Env):
    """Notes the actions that it is given."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, observation: Any = None, action: Any = None, **behaviour: Any) -> None:
        self.observation_space = observation or Box(-1, 1, (3,), np.float64)
        self.action_space = action or Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)
        self.behaviour, self.given = behaviour, []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.given.append(action)
        count = len(self.given)
        observation = self.behaviour.get("observation_of", lambda _: self.observation_space.sample())(count)
        info = self.behaviour.get("info_of", lambda count: {"ok": count == 2})(count)
        return observation, 1.5, count == self.behaviour.get("falls"), False, info


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., UserEnvironment]:
    def made(task: UserTask = TASK, render: bool = False, **options: Any) -> UserEnvironment:
        import types

        module = types.ModuleType("tests_env")
        module.make = lambda: Env(**options)  # type: ignore[attr-defined]
        monkeypatch.setitem(__import__("sys").modules, "tests_env", module)
        return UserEnvironment(task, tmp_path, render=render)

    return made


def test_actions_are_clipped_and_handed_over_in_the_spaces_own_type_and_shape(make: Any) -> None:
    low = np.array([[-2.0, 0.0], [-1.0, -1.0]])
    for dtype in (np.float64, np.float32, np.int32):
        env = make(action=Box(low.astype(dtype), (low + 3).astype(dtype), dtype=dtype))
        env.reset(0)
        assert env.action_dim == 4
        assert env.action_bounds == ((-2, 0, -1, -1), (1, 3, 2, 2))
        env.step(np.array([9.0, -9.0, 0.6, 0.5], np.float32))
        given = env._env.unwrapped.given[0]
        assert given.dtype == dtype
        np.testing.assert_allclose(given, [[1, 0], [1, 0]] if dtype == np.int32 else [[1, 0], [0.6, 0.5]], atol=1e-6)


def test_actions_without_a_bound_have_none_there(make: Any) -> None:
    low, high = np.array([-np.inf, -2.0, -np.inf]), np.array([1.0, 2.0, np.inf])
    env = make(action=Box(low, high, dtype=np.float64))
    assert env.action_bounds == ((-np.inf, -2, -np.inf), (1, 2, np.inf))
    env.try_out()
    env.step([9, 9, 9])
    np.testing.assert_array_equal(env._env.unwrapped.given[-1], [1, 2, 9])
    assert make(action=Box(-np.inf, np.inf, (2,))).action_bounds is None


def test_keys_of_dict_observations_in_the_order_that_is_asked_for(make: Any) -> None:
    space = Dict({"a": Box(0, 1, (2,)), "b": Box(2, 3, (1, 2)), "c": Discrete(3)})
    whole = make(observation=space)
    first = whole.reset(7)
    assert (whole.state_dim, first.dtype) == (7, np.float32)
    chosen = make(replace(TASK, observation=("b", "a")), observation=space)
    seen = chosen.reset(7)
    assert chosen.parts == {"b": 2, "a": 2}
    np.testing.assert_array_equal(seen, np.concatenate([first[2:4], first[:2]]))


def test_success_by_a_key_by_the_return_or_by_none(make: Any) -> None:
    outcomes = {}
    for name, success in {"key": Success("ok"), "return": Success(None, 3.0), "none": Success()}.items():
        env = make(replace(TASK, success=success))
        env.reset(0)
        outcomes[name] = [env.step([0, 0])[2] for _ in range(3)]
    assert outcomes == {"key": [False, True, False], "return": [False, True, True], "none": [False, False, False]}


def test_an_episode_ends_at_the_limit_or_in_a_terminal_state_and_these_are_told_apart(make: Any) -> None:
    for falls, length, terminated in ((None, 5, False), (3, 3, True)):
        env = make(falls=falls)
        for _ in range(2):
            env.reset(0)
            env._env.unwrapped.given.clear()
            over = [env.step([0, 0])[3] for _ in range(length)]
            assert over == [False] * (length - 1) + [True]
            assert env.terminated is terminated


def test_the_limit_of_steps_is_the_tasks_or_the_environments_and_never_beyond(make: Any, tmp_path: Path) -> None:
    own = replace(TASK, env="Pusher-v5", success=Success())
    for given, limit in ((None, 100), (30, 30)):
        env = UserEnvironment(replace(own, max_steps=given), tmp_path)
        assert env.max_steps == limit
        env.close()
    with pytest.raises(InputError, match="1 to 100") as error:
        UserEnvironment(replace(own, max_steps=101), tmp_path)
    assert error.value.field == "tasks.mine.max_steps"
    with pytest.raises(InputError, match="nothing ends the episodes"):
        make(replace(TASK, max_steps=None))


def test_a_seed_repeats_an_episodes_start(make: Any, fresh_seed: int) -> None:
    env = make()
    first = env.reset(fresh_seed)
    assert not np.array_equal(first, env.reset(fresh_seed + 1))
    np.testing.assert_array_equal(first, env.reset(fresh_seed))


def test_what_an_environment_does_wrong_is_said(make: Any) -> None:
    env = make(replace(TASK, max_steps=1), info_of=lambda _: {"okay": True})
    env.reset(0)
    with pytest.raises(InputError, match="nearest: okay") as error:
        env.step([0, 0])
    assert error.value.field == "tasks.mine.success"
    env = make(observation_of=lambda _: np.array([0.0, np.nan, 0.0]))
    env.reset(0)
    with pytest.raises(InputError, match="nan at number 1 in step 1"):
        env.step([0, 0])


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("FetchPus-v99", "unknown Gymnasium environment"),
        ("absent_module:make", "no such module"),
        ("absent_module:Push-v0", "no such module"),
        (":CartPole-v1", "no environment is named"),
        (":make", "no environment is named"),
        ("module:", "no environment is named"),
        (".relative:make", "module fails"),
        ("broken:make", "broken.py, line 2"),
        ("broken:Foo-v0", "RuntimeError: no licence"),
        ("leaves:make", "SystemExit"),
        ("needs:make", "No module named 'absent_package'"),
        ("tests_env:mak", "nearest: make"),
        ("json:dumps", "cannot be made"),
        ("collections:OrderedDict", "makes a OrderedDict"),
    ],
)
def test_an_environment_that_is_not_there(make: Any, tmp_path: Path, env: str, words: str) -> None:
    make()
    (tmp_path / "broken.py").write_text("import json\nraise RuntimeError('no licence')")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    (tmp_path / "needs.py").write_text("import absent_package")
    with pytest.raises(InputError, match=words) as error:
        UserEnvironment(replace(TASK, env=env), tmp_path)
    use_no_file()
    assert error.value.field == "tasks.mine.env"


GOOD = (np.zeros(3), 1.0, False, False, {"ok": False})


def good(place: int, value: Any) -> tuple[Any, ...]:
    return (*GOOD[:place], value, *GOOD[place + 1 :])


@pytest.mark.parametrize(
    ("answer", "field", "words"),
    [
        (GOOD[:4], "env", "a tuple of 4 values.*interface of the old gym"),
        (list(GOOD), "env", "of type list"),
        (good(4, None), "env", "does not return what Gymnasium asks for"),
        (good(0, np.zeros(4)), "env", "4 numbers in step 1"),
        (good(0, "nothing"), "env", "not of its space"),
        (good(0, None), "env", "not of its space"),
        (good(1, np.nan), "env", "reward cannot be used"),
        (good(1, np.inf), "env", "a finite number"),
        (good(1, None), "env", "reward cannot be used"),
        (good(1, np.zeros(2)), "env", "reward cannot be used"),
        (good(2, "no"), "env", "terminated cannot be used"),
        (good(3, np.zeros(2, np.bool_)), "env", "truncated cannot be used"),
        (good(4, {"ok": "False"}), "success", "true or false"),
        (good(4, {"ok": None}), "success", "true or false"),
        (good(4, {"ok": np.nan}), "success", "true or false"),
        (ZeroDivisionError("by nought"), "env", r"step fails.*step 1.*ZeroDivisionError: by nought \(test_env.*line"),
    ],
)
def test_what_step_returns_is_held_against_its_interface(make: Any, answer: Any, field: str, words: str) -> None:
    for usable in (GOOD, good(1, np.float32(2)), good(1, np.ones(1)), good(4, {"ok": np.bool_(True)})):
        env = make()
        env.reset(0)
        env._env.unwrapped.step = lambda action, usable=usable: usable
        assert env.step([0, 0])[2] is bool(usable[4]["ok"])

    def step(action: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    env._env.unwrapped.step = step
    env.reset(0)
    with pytest.raises(InputError, match=f"(?s){words}") as error:
        env.step([0, 0])
    assert error.value.field == f"tasks.mine.{field}"


def test_what_reset_returns_is_held_against_its_interface(make: Any) -> None:
    env = make()
    for reset, words in (
        (lambda seed, options=None: np.zeros(3), "of type ndarray"),
        (lambda: (np.zeros(3), {}), "reset fails"),
        (lambda seed, options=None: (np.zeros(2), {}), "2 numbers"),
    ):
        env._env.unwrapped.reset = reset
        with pytest.raises(InputError, match=words):
            env.reset(0)


def test_a_try_is_a_step_or_an_episode_where_success_shows_at_its_end(make: Any) -> None:
    for shown, steps in ((1, 1), (5, 5)):
        env = make(info_of=lambda count, shown=shown: {"ok": True} if count >= shown else {})
        env.try_out()
        assert len(env._env.unwrapped.given) == steps
    with pytest.raises(InputError, match="nearest: okay"):
        make(info_of=lambda _: {"okay": True}).try_out()


def test_spaces_that_cannot_be_used(make: Any) -> None:
    for options, task, field, words in (
        ({"action": Discrete(3)}, TASK, "env", "a Box"),
        ({}, replace(TASK, observation=("a",)), "observation", "only Dict"),
        ({"observation": Dict(a=Box(0, 1))}, replace(TASK, observation=("b",)), "observation", "nearest: a"),
        ({"observation": gymnasium.spaces.Sequence(Box(0, 1))}, TASK, "observation", "fixed size"),
    ):
        with pytest.raises(InputError, match=words) as error:
            make(task, **options)
        assert error.value.field == f"tasks.mine.{field}"
