"""`Policy.act`: observations in, actions out; the clock, and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.data import EpisodeRecord, TrajectoryDataset
from llmdpd.errors import InputError
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig, RetrievalConfig
from llmdpd.nn.policy_network import States
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.policy import Policy
from llmdpd.tasks.layout import Layout, Point

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


def test_attention_to_the_demonstration(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy, seen = make_policy(kind="retrieval"), rng.normal(size=(7, S)).astype(np.float32)
    found = policy.attention(KNOWN, example, seen)
    assert found is not None
    weights, times = found
    assert weights.shape == (7, policy.network.reads.retrieval.heads, len(times))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (times[0], times[-1]) == (0, 19)
    assert (np.diff(times) > 0).all()
    # The clock runs from the episode's start.
    np.testing.assert_array_equal(policy.attention(KNOWN, example, seen.astype(float).tolist())[0], found[0])
    with pytest.raises(InputError, match="wrong observation"):
        policy.attention(KNOWN, example, seen[:, 1:])
    later = policy.attention(KNOWN, example, np.concatenate([seen, seen[:1]]))
    assert later is not None
    np.testing.assert_allclose(later[0][:7], weights, rtol=1e-4, atol=1e-6)
    assert np.abs(later[0][7] - weights[0]).max() > 1e-6
    for other in (make_policy(), make_policy(kind="retrieval", retrieval=RetrievalConfig(waypoints=False))):
        assert other.attention(KNOWN, example, seen) is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *[(bad, "no array of numbers") for bad in ([[1.0], [1.0, 2.0]], "push", [object()])],
        ({"a": 1}, "wrong observation"),
        *[([1.0] * (S - 1) + [value], "NaN or Inf") for value in (np.nan, np.inf, -np.inf, None)],
        ([[1.0] * S, [np.nan] * S], "NaN or Inf"),
        *[(np.ones(shape), "wrong observation") for shape in ((S + 1,), (4, S - 1), (2, 3, S), ())],
    ],
)
def test_an_observation_that_is_refused(policy: Policy, bad: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        policy.act(bad)
    assert error.value.field == "observation"


def test_arrays_of_every_layout(policy: Policy, rng: np.random.Generator) -> None:
    rows = rng.normal(size=(4, 2 * S))
    frozen = rows[:, :S].astype(np.float32)
    frozen.flags.writeable = False
    layouts = (rows[::-1, :S], rows[:, ::-2], rows[0, S - 1 :: -1], rows[:, :S].T.copy().T, frozen)
    for view in layouts:
        policy.seed(1)
        action = policy.act(view)
        policy.seed(1)
        np.testing.assert_array_equal(action, policy.act(np.ascontiguousarray(view, np.float32).copy()))


# The clock


def test_the_clock_counts_and_is_reset(policy: Policy, example: Any, acted_at: list[list[int]]) -> None:
    for _ in range(2):
        policy.act(np.ones(S))
    policy.act(np.ones(S), step=40)
    policy.act(np.ones(S))
    policy.reset()
    policy.act(np.ones(S))
    policy.act(np.ones(S), step=0)
    policy.prompt(KNOWN, example).act(np.ones(S))
    assert acted_at == [[step] for step in (0, 1, 40, 41, 0, 0, 0)]


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
    policy, texts = make_policy(acting=BestOfN(samples=samples)), (KNOWN, "Task: reach.")
    examples = [(rng.normal(size=(n, S)), rng.normal(size=(n, A))) for n in (3, 30)]
    states, nothing = rng.normal(size=(9, S)).astype(np.float32), np.zeros(9, np.float32)
    index, seeds, steps = rng.integers(0, 2, 9), rng.integers(0, 2**62, 9), rng.integers(0, 50, 9)
    many = policy.episodes(policy.encode_prompts(texts, examples), index)
    whole = many.act(np.arange(9), steps, states, nothing, lambda rows: seeds[rows])
    for row, number in enumerate(index):
        one = policy.episodes(policy.encode_prompts([texts[number]], [examples[number]]))
        part = slice(row, row + 1)
        action = one.act(np.zeros(1, np.int64), steps[part], states[part], nothing[part], lambda _, k=part: seeds[k])
        np.testing.assert_allclose(action[0], whole[row], atol=1e-4)


def test_another_way_of_acting(policy: Policy, example: Any) -> None:
    other = policy.with_acting(samples=9, selection="max")
    assert (other.acting.samples, other.acting.selection) == (9, "max")
    assert policy.acting.samples == 1
    assert other.network is policy.network
    assert other.prompt(KNOWN, example).act(np.ones(S)).shape == (A,)
    for name, value in (("selection", "best"), ("temperature", -1.0), ("steps", 3)):
        with pytest.raises(InputError) as error:
            policy.with_acting(**{name: value})
        assert str(error.value.field).startswith("acting"), name


def test_a_policy_shows_what_it_is_in_a_line(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy()
    assert "no prompt yet" in repr(policy)
    assert f"{policy.network.state_dim} state" in repr(policy)
    assert "prompted" in repr(policy.prompt(text=KNOWN, trajectory=example))


def test_what_is_remembered_of_the_step_before_stands_beside_the_observation(rng: np.random.Generator) -> None:
    """As in training (`TrajectoryDataset.with_remembered`): by episode, at its first step the observation's own."""
    layout, remembered = Layout((Point("hand", (0, 1)), Point("cup", (3, 4))), move=(0, 1)).completed(5)
    assert remembered == (0, 1, 3, 4)
    context = ContextConfig(text=False, trajectory=False, features="relative")
    network = DiffusionPolicy(
        Spaces(9, 2, 0, layout, remembered=remembered), DiffusionNetworkConfig(hidden_dim=8, context=context)
    )
    seen: list[np.ndarray] = []
    sample = network.sample

    def noted(states: States, *arguments: Any) -> torch.Tensor:
        seen.append(states.observations.numpy().copy())
        return sample(states, *arguments)

    network.sample = noted  # type: ignore[method-assign]
    network.freeze = lambda *_: None  # type: ignore[method-assign,assignment]
    policy = Policy("llmdpd", network, None, BestOfN(samples=1)).prompt()
    episodes = rng.normal(size=(2, 6, 5)).astype(np.float32)
    dataset = TrajectoryDataset.from_episodes(
        [EpisodeRecord(np.concatenate([e, e[-1:]]), np.zeros((6, 2)), np.zeros(6), "a") for e in episodes]
    )
    expected = dataset.with_remembered(remembered).observations.reshape(2, 6, 9)
    for step in range(6):
        policy.act(episodes[:, step])
        np.testing.assert_array_equal(seen[-1], expected[:, step])
    policy.reset()
    policy.act(episodes[:, 3])
    np.testing.assert_array_equal(seen[-1][:, 5:], episodes[:, 3][:, list(remembered)])
    policy.act(episodes[:, 4], step=17)
    np.testing.assert_array_equal(seen[-1][:, 5:], episodes[:, 4][:, list(remembered)], "another step than the next")
    for e in range(2):
        np.testing.assert_array_equal(network.spaces.episode(episodes[e]), expected[e])
    with pytest.raises(InputError) as error:
        policy.act(np.zeros(9))
    assert "[5]" in str(error.value.expected)
