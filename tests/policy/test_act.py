"""`Policy.act`: observations in, actions out; the clock, and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.policy.policy import Policy

S, A = 7, 3
KNOWN = "Task: push the puck."
MakePolicy = Callable[..., Policy]


def test_shapes(policy: Policy, rng: np.random.Generator) -> None:
    one = policy.act(rng.normal(size=S))
    many = policy.act(rng.normal(size=(6, S)).tolist())
    assert (one.shape, many.shape) == ((A,), (6, A))
    assert one.dtype == many.dtype == np.float32
    assert np.abs(many).max() <= 1
    assert policy.act(np.zeros((0, S))).shape == (0, A)


def test_where_it_looks(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy = make_policy(kind="retrieval")
    assert policy.retrieves
    seen = rng.normal(size=(7, S)).astype(np.float32)
    weights, times = policy.looks(KNOWN, example, seen)
    heads = policy.network.config.context.retrieval.heads
    assert weights.shape == (7, heads, len(times))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert times[0] == 0
    assert times[-1] == 19
    assert (np.diff(times) > 0).all()
    # The clock runs from the episode's start.
    later, _ = policy.looks(KNOWN, example, np.concatenate([seen, seen[:1]]))
    np.testing.assert_allclose(later[:7], weights, rtol=1e-4, atol=1e-6)
    assert np.abs(later[7] - weights[0]).max() > 1e-6
    pooled = make_policy()
    assert not pooled.retrieves
    with pytest.raises(ValueError, match="retrieves nothing"):
        pooled.looks(KNOWN, example, seen)


@pytest.mark.parametrize("bad", [[[1.0], [1.0, 2.0]], "push", {"a": 1}, [object()]])
def test_an_observation_that_is_no_numbers(policy: Policy, bad: Any) -> None:
    with pytest.raises(InputError, match="no array of numbers") as error:
        policy.act(bad)
    assert error.value.field == "observation"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_an_observation_that_is_not_finite(policy: Policy, value: Any) -> None:
    row = [1.0] * (S - 1) + [value]
    for bad in (row, [[1.0] * S, row]):
        with pytest.raises(InputError, match="NaN or Inf"):
            policy.act(bad)


def test_views_of_every_kind(policy: Policy, rng: np.random.Generator) -> None:
    rows = rng.normal(size=(4, 2 * S))
    frozen = rows[:, :S].astype(np.float32)
    frozen.flags.writeable = False
    for view in (
        rows[::-1, :S],
        rows[:, ::-2],
        rows[:1, :S][::-1],
        rows[0, S - 1 :: -1],
        rows[:, :S].T.copy().T,
        frozen,
    ):
        policy.seed(1)
        action = policy.act(view)
        policy.seed(1)
        np.testing.assert_array_equal(action, policy.act(np.ascontiguousarray(view, np.float32).copy()))


@pytest.mark.parametrize("shape", [(S + 1,), (4, S - 1), (2, 3, S), ()])
def test_wrong_observations(policy: Policy, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="wrong observation") as error:
        policy.act(np.ones(shape))
    assert error.value.found == shape
    assert str(S) in str(error.value.expected)


# The clock


def test_the_clock_counts_and_is_reset(policy: Policy, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    condition = type(policy.network.context).condition

    def spy(self: Any, state: Any, prompts: Any, index: Any, clock: torch.Tensor) -> Any:
        seen.append(clock.tolist())
        return condition(self, state, prompts, index, clock)

    monkeypatch.setattr(type(policy.network.context), "condition", spy)
    for _ in range(2):
        policy.act(np.ones(S))
    policy.act(np.ones((2, S)))
    policy.act(np.ones(S), step=40)
    policy.act(np.ones(S))
    policy.reset()
    policy.act(np.ones(S))
    policy.act(np.ones(S), step=0)
    policy.prompt(KNOWN, example).act(np.ones(S))
    # Rows are filled up to eight, which changes no row's own.
    assert seen == [[step] * 8 for step in (0, 1, 2, 40, 41, 0, 0, 0)]


# Seeds


def test_seeds_are_reproducible(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy, states = make_policy().prompt(KNOWN, example), rng.normal(size=(5, S))
    policy.seed(7)
    first = [policy.act(state) for state in states]
    torch.manual_seed(1)  # has no say in it
    policy.seed(7)
    for state, action in zip(states, first, strict=True):
        np.testing.assert_array_equal(policy.act(state), action)
    policy.seed(8)
    assert not np.array_equal(policy.act(states[0]), first[0])


def test_noise_is_new_at_each_act_and_in_each_row(policy: Policy) -> None:
    rows = policy.act(np.ones((4, S)))
    assert len({row.tobytes() for row in rows}) == 4
    assert not np.array_equal(policy.act(np.ones((4, S))), rows)


@pytest.mark.parametrize("samples", [1, 6])
def test_many_episodes_at_once_equal_each_alone(
    make_policy: MakePolicy, rng: np.random.Generator, samples: int
) -> None:
    policy = make_policy(acting=ActingConfig(samples=samples))
    examples = [(rng.normal(size=(n, S)), rng.normal(size=(n, A))) for n in (3, 30)]
    prompts = policy.encode_prompts([KNOWN, "Task: reach."], examples)
    states = rng.normal(size=(9, S)).astype(np.float32)
    index, seeds = rng.integers(0, 2, 9), rng.integers(0, 2**62, 9)
    steps = rng.integers(0, 50, 9)
    whole = policy.act_many(states, prompts, index, steps, seeds)
    for row in range(9):
        alone = policy.encode_prompts([[KNOWN, "Task: reach."][index[row]]], [examples[index[row]]])
        one = slice(row, row + 1)
        action = policy.act_many(states[one], alone, None, steps[one], seeds[one])
        np.testing.assert_allclose(action[0], whole[row], atol=1e-4)


def test_another_way_of_acting(policy: Policy, example: Any) -> None:
    other = policy.with_acting(samples=9, selection="max")
    assert (other.acting.samples, other.acting.selection) == (9, "max")
    assert policy.acting.samples == 1
    assert other.network is policy.network
    assert other.prompt(KNOWN, example).act(np.ones(S)).shape == (A,)
    with pytest.raises(InputError, match="selection"):
        policy.with_acting(selection="best")


def test_a_policy_shows_what_it_is_in_a_line(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy()
    assert "no prompt yet" in repr(policy)
    assert f"{policy.network.state_dim} state" in repr(policy)
    assert "prompted" in repr(policy.prompt(text=KNOWN, trajectory=example))
