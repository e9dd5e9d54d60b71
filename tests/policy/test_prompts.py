"""`Policy.prompt`: what it takes, refuses, and does to the actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.policy.inputs import check_keys
from llmdpd.policy.policy import Policy
from llmdpd.prompts import TextPrompt
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig

S, A = 7, 3
KNOWN = "Task: push the puck."
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8)
MakePolicy = Callable[..., Policy]


def test_no_prompt_yet(make_policy: MakePolicy) -> None:
    with pytest.raises(InputError, match="no prompt yet"):
        make_policy().act(np.ones(S))


@pytest.mark.parametrize("which", ["text", "trajectory"])
def test_a_prompt_that_is_needed(make_policy: MakePolicy, example: Any, which: str) -> None:
    given = {"text": KNOWN, "trajectory": example}
    del given[which]
    with pytest.raises(InputError, match=f"{which} prompt") as error:
        make_policy().prompt(**given)
    assert error.value.field == which
    off = make_policy(**{which: False})
    assert off.prompt(**given).act(np.ones(S)).shape == (A,)
    dropout = make_policy(text_dropout=0.2, trajectory_dropout=0.2)
    assert dropout.prompt(**given).act(np.ones(S)).shape == (A,)


@pytest.mark.parametrize("which", ["text", "trajectory"])
def test_a_prompt_that_it_was_not_trained_with(make_policy: MakePolicy, example: Any, which: str) -> None:
    with pytest.raises(InputError, match=f"without {which} prompts") as error:
        make_policy(**{which: False}).prompt(KNOWN, example)
    assert error.value.field == which


def test_each_prompt_changes_the_action(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy, state = make_policy(), rng.normal(size=S)
    other = (example[0] + 1.0, example[1])

    def action(text: str, trajectory: Any) -> np.ndarray:
        policy.seed(5)
        return policy.prompt(text, trajectory).act(state)

    base = action(KNOWN, example)
    np.testing.assert_array_equal(action(KNOWN, example), base)
    assert not np.array_equal(action("Task: reach.", example), base)
    assert not np.array_equal(action(KNOWN, other), base)


def test_text_prompt_objects_and_trajectory_objects(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy()
    observations, actions = (part.astype(np.float32) for part in example)
    trajectory = Trajectory(observations, actions, np.zeros(20, np.float32), "push")
    state = np.ones(S)
    first = policy.prompt(KNOWN, example).act(state)
    policy.seed(0)
    second = policy.prompt(TextPrompt(task="push the puck."), trajectory).act(state)
    assert TextPrompt(task="push the puck.").render() == KNOWN
    np.testing.assert_array_equal(first, second)


def test_the_observation_after_the_last_action_may_be_there(make_policy: MakePolicy, example: Any) -> None:
    observations, actions = example
    more = np.concatenate([observations, observations[-1:] + 1])
    policy = make_policy()

    def action(seen: Any) -> Any:
        policy.seed(0)
        return policy.prompt(KNOWN, (seen, actions)).act(np.ones(S))

    np.testing.assert_array_equal(action(more), action(observations))


def test_observations_of_a_dict_space_are_taken_by_key(make_policy: MakePolicy, example: Any) -> None:
    observations, actions = example
    policy = make_policy()
    policy.metadata["observation"] = ["zone", "arm"]
    policy.prompt(KNOWN, example)

    def by_key(array: np.ndarray[Any, Any]) -> dict[str, Any]:
        return {"arm": array[..., 2:], "zone": array[..., :2], "unread": "anything"}

    batch = np.asarray(observations[:3])
    for seen in (batch[0], batch, batch[:1]):
        policy.reset()
        policy.seed(1)
        expected = policy.act(seen)
        policy.reset()
        policy.seed(1)
        np.testing.assert_array_equal(policy.act(by_key(seen)), expected)
    shown = []
    for demonstration in (example, (by_key(np.asarray(observations)), actions)):
        policy.seed(1)
        shown.append(policy.prompt(KNOWN, demonstration).act(batch[0]))
    np.testing.assert_array_equal(*shown)
    for wrong, found in (({"arm": batch[0, 2:]}, "a dict of arm"), (by_key(np.ones(S + 1)), "wrong observation")):
        with pytest.raises(InputError, match=found):
            policy.act(wrong)


def test_several_demonstrations_without_a_text(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy(text_dropout=0.1, trajectory_dropout=0.1)
    other = tuple(part + 0.1 for part in example)

    def action(*demonstrations: Any) -> Any:
        policy.seed(0)
        return policy.prompt(trajectory=list(demonstrations)).act(np.ones(S))

    assert not np.array_equal(action(example, other), action(example))
    np.testing.assert_allclose(action(example, example), action(example), rtol=1e-5, atol=1e-6)


def test_prompts_of_wrong_kinds(make_policy: MakePolicy, example: Any) -> None:
    with pytest.raises(InputError, match="an empty prompt"):
        make_policy().prompt()
    with pytest.raises(InputError, match="this is no text") as error:
        make_policy().prompt(example, "text")
    assert "trajectory" in str(error.value.hint)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((np.ones((5, S + 1)), np.ones((5, A))), f"observations of {S + 1} and actions of {A} numbers"),
        ((np.ones((5, S)), np.ones((5, A - 1))), f"observations of {S} and actions of {A - 1} numbers"),
        ((1.0, 2.0), "another width"),
        (([[1.0], [1.0, 2.0]], [[1.0]]), "not a pair of number arrays"),
        (("a", "b"), "not a pair of number arrays"),
        (5, "not a demonstration"),
        (iter([(np.ones((5, S)), np.ones((5, A)))]), "not a demonstration"),
        ("demo", "not a pair of number arrays"),
        ((np.ones((0, S)), np.ones((0, A))), "empty"),
        ((np.full((5, S), np.nan), np.ones((5, A))), "NaN"),
        ((np.ones((5, S)), np.ones((3, A))), "do not fit"),
        ((np.ones((4, S)), np.ones((5, A))), "do not fit"),
        (({"arm": np.ones((5, S))}, np.ones((5, A))), "a dict of arm"),
    ],
)
def test_a_demonstration_that_is_refused(make_policy: MakePolicy, bad: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_policy().prompt(KNOWN, bad)


def test_a_demonstration_that_is_too_long(make_policy: MakePolicy, example: Any) -> None:
    every = make_policy(encoder=dataclasses.replace(ENCODER, sampling="all"))
    with pytest.raises(InputError, match="limit") as error:
        every.prompt(KNOWN, example)
    assert "20" in str(error.value.found)
    assert "8" in str(error.value.expected)
    every.prompt(KNOWN, (example[0][:8], example[1][:8]))


def test_a_prompt_that_is_refused_leaves_the_old_one(policy: Policy, example: Any) -> None:
    policy.seed(1)
    before = policy.act(np.ones(S))
    with pytest.raises(InputError):
        policy.prompt(KNOWN, (example[0][:, 1:], example[1]))
    policy.seed(1)
    np.testing.assert_array_equal(policy.act(np.ones(S)), before)


def test_some_prompts_and_not_others(make_policy: MakePolicy, example: Any) -> None:
    """Never left out in silence, also where the policy could do without."""
    policy = make_policy(text_dropout=0.5, trajectory_dropout=0.5)
    with pytest.raises(InputError, match="all or for none") as error:
        policy.encode_prompts([KNOWN, None], [example, example])
    assert error.value.field == "text"
    with pytest.raises(InputError, match="all or for none"):
        policy.encode_prompts([KNOWN, KNOWN], [None, example])


def test_several_demonstrations_are_one_prompt(make_policy: MakePolicy, rng: np.random.Generator) -> None:
    policy, state = make_policy(kind="retrieval", features="normalised"), rng.normal(size=S)
    shown = [(rng.normal(size=(n, S)), rng.uniform(-1, 1, (n, A))) for n in (20, 5, 9)]

    def action(trajectory: Any) -> np.ndarray:
        policy.seed(5)
        return policy.prompt(KNOWN, trajectory).act(state)

    base = action(shown[0])
    np.testing.assert_array_equal(action([shown[0]]), base)
    np.testing.assert_array_equal(action(list(shown[0])), base)  # a list of two arrays: observations and actions
    assert not np.array_equal(action(shown), base)
    assert action(shown * 5 + shown[:1]).shape == (A,)
    for bad, found in ((shown * 6, "18"), ([], "0")):
        with pytest.raises(InputError, match="number of demonstrations") as error:
            policy.prompt(KNOWN, bad)
        assert found in str(error.value)
    mixed = policy.encode_prompts([KNOWN, KNOWN], [shown, shown[1]])
    assert len(mixed) == 2


def test_what_is_cut_of_a_demonstration_is_said(make_policy: MakePolicy, example: Any, caplog: Any) -> None:
    observations, actions = (np.concatenate([part] * 4).astype(np.float32) for part in example)
    trajectory = Trajectory(observations, actions, np.zeros(80, np.float32), "push", success=1, success_step=9)
    whole = make_policy()
    useful = make_policy(encoder=dataclasses.replace(ENCODER, trim="useful"))
    useful.network.load_state_dict(whole.network.state_dict())
    useful.texts = whole.texts
    caplog.set_level("INFO", "llmdpd")
    first = [part[:30] for part in (observations, actions)]
    expected = whole.prompt(KNOWN, (first[0], first[1])).act(np.ones(S))
    assert not caplog.messages
    np.testing.assert_array_equal(useful.prompt(KNOWN, trajectory).act(np.ones(S)), expected)
    assert caplog.messages == ["1 of 1 demonstrations are read in part, 30 of 80 steps; end found by success"]


def test_long_standing_still_is_left_out(make_policy: MakePolicy, example: Any, caplog: Any) -> None:
    observations, actions = (part.astype(np.float32) for part in example)
    index = np.concatenate([np.arange(10), np.full(100, 10), np.arange(10, 20)])
    policy = make_policy(encoder=dataclasses.replace(ENCODER, trim="useful"))
    caplog.set_level("INFO", "llmdpd")
    first = policy.prompt(KNOWN, (observations[index], actions[index])).act(np.ones(S))
    assert caplog.messages == [
        "1 of 1 demonstrations are read in part, 39 of 120 steps; without standing still for long"
    ]
    kept = np.concatenate([np.arange(10), np.full(19, 10), np.arange(10, 20)])
    policy.seed(0)
    np.testing.assert_array_equal(policy.prompt(KNOWN, (observations[kept], actions[kept])).act(np.ones(S)), first)


@pytest.mark.parametrize(
    ("keys", "widths", "field"),
    [
        ("ab", [], "observation"),
        (["a", 1], [], "observation"),
        (["a", "b"], [1], "observation_widths"),
        (["a", "b"], [1, True], "observation_widths"),
        (["a"], {"a": 1}, "observation_widths"),
    ],
)
def test_keys_and_widths_that_are_none_are_refused(keys: Any, widths: Any, field: str) -> None:
    with pytest.raises(InputError) as refused:
        check_keys(keys, widths)
    assert refused.value.field == f"metadata.{field}"
    check_keys(["a", "b"], [1, 2])
