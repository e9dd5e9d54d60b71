"""Action chunks: when the next one is sampled, and that each episode executes its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.diffusion import NoiseMLP, reverse_diffusion, sampler_coefficients
from llmdpd.errors import InputError
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.policy_network import States
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.episodes import ActionChunks
from llmdpd.policy.policy import Policy
from llmdpd.utils.bounds import ACTION_NUMBERS

S, A, D = 7, 3, 10
KNOWN, OTHER = "Task: push the puck.", "Task: reach."
NOTHING = np.zeros(99, np.float32)

MakePolicy = Callable[..., Policy]


@pytest.fixture
def make_chunked(make_policy: MakePolicy) -> MakePolicy:
    """A policy whose actions are not clipped, so that no two of them are the same; it reads the clock too."""

    def make(chunk: int = 4, horizon: int | None = None) -> Policy:
        network = {"action_bound": 100.0, "chunk": chunk}
        return make_policy(False, BestOfN(samples=1, action_horizon=horizon), network, kind="retrieval")

    return make


# ActionChunks


def test_each_episode_executes_its_own_chunk_by_its_own_clock(rng: np.random.Generator) -> None:
    """Any subset of episodes at any call, against a plain list for each of them."""
    length, H, sampled = int(rng.integers(2, 5)), 5, 0
    chunks, clocks = ActionChunks(length), np.zeros(6, np.int64)
    left: list[list[np.ndarray]] = [[] for _ in range(6)]
    for _ in range(60):
        episodes = rng.permutation(6)[: int(rng.integers(1, 7))]
        due = chunks.due(episodes, clocks[episodes])
        assert due.tolist() == [row for row, who in enumerate(episodes) if not left[who]]
        new = rng.normal(size=(len(due), H, 2)).astype(np.float32)
        chunks.put(episodes[due], clocks[episodes[due]], new)
        for who, chunk in zip(episodes[due], new, strict=True):
            left[who] = list(chunk[:length])
        np.testing.assert_array_equal(chunks.take(episodes), [left[who].pop(0) for who in episodes])
        clocks[episodes] += 1
        sampled += len(due)
    assert sampled > 6


def test_a_chunk_goes_on_at_the_next_step_alone() -> None:
    chunks, one = ActionChunks(3), np.zeros(1, np.int64)
    for step, due in ((0, 1), (1, 0), (1, 1), (2, 0), (5, 1), (0, 1), (1, 0), (2, 0), (3, 1)):
        assert len(chunks.due(one, one + step)) == due, step
        if due:
            chunks.put(one, one + step, np.zeros((1, 3, 1), np.float32))
        chunks.take(one)
    assert len(chunks.due(one, one + 4)) == 0
    assert len(chunks.due(one + 9, one + 4)) == 1, "another episode has nothing of it"
    chunks.reset()
    assert len(chunks.due(one, one + 4)) == 1


# Policy.act


@pytest.mark.parametrize(("chunk", "horizon", "executed"), [(4, None, 4), (4, 3, 3), (5, 1, 1), (1, None, 1)])
def test_a_chunk_is_executed_then_the_next_is_sampled(
    make_chunked: MakePolicy, example: Any, rng: np.random.Generator, chunk: int, horizon: int | None, executed: int
) -> None:
    """Against chunks that are sampled in each state by hand."""
    policy = make_chunked(chunk, horizon).prompt(KNOWN, example)
    assert policy.action_horizon == executed
    network, prompts = policy.network, policy.encode_prompts([KNOWN], [example])
    assert isinstance(network, DiffusionPolicy)
    states, seed = rng.normal(size=(11, S)).astype(np.float32), int(rng.integers(2**31))
    policy.seed(seed)
    actions = [policy.act(state) for state in states]
    stream = torch.Generator().manual_seed(seed)
    for start in range(0, 11, executed):
        key = torch.randint(2**63 - 1, (1,), generator=stream)
        with torch.no_grad():
            row = torch.from_numpy(states[start : start + 1])
            condition = network.condition(row, prompts, None, torch.tensor([start]))
            coefficients = policy.acting.coefficients(network.config)  # type: ignore[attr-defined]
            whole = reverse_diffusion(network.net, *condition, coefficients, seed=key, backend="reference")
        for action, expected in zip(actions[start : start + executed], whole.view(chunk, A), strict=False):
            np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-4)


def test_what_is_left_is_dropped_at_reset_seed_and_prompt(
    make_chunked: MakePolicy, example: Any, rng: np.random.Generator
) -> None:
    policy, states = make_chunked().prompt(KNOWN, example), rng.normal(size=(6, S))

    def executed() -> np.ndarray:
        return np.stack([policy.act(state) for state in states])

    policy.seed(3)
    first = executed()  # one chunk and a half
    policy.seed(3)
    policy.reset()
    np.testing.assert_array_equal(executed(), first)
    policy.reset()
    assert np.abs(executed()[0] - first[0]).max() > 1e-3, "new noise, in the same state"
    # seed() governs the very next action, whatever was sampled before it.
    seconds = []
    for _ in range(2):
        policy.reset()
        policy.act(states[0])
        policy.seed(3)
        seconds.append(policy.act(states[1]))
    np.testing.assert_array_equal(*seconds)
    policy.prompt(OTHER, example).seed(3)
    assert np.abs(policy.act(states[0]) - first[0]).max() > 1e-3


def test_a_clock_that_is_set_samples_anew(make_chunked: MakePolicy, example: Any, acted_at: list[list[int]]) -> None:
    policy, state = make_chunked(3).prompt(KNOWN, example), np.ones(S)
    for step in (None, 1, None, None, 9, None, 9, 10, 11, 12):
        policy.act(state, step=step)
    assert acted_at == [[0], [3], [9], [9], [12]]
    policy.reset()
    policy.act(state, step=13)
    assert acted_at[5:] == [[13]], "what was left for step 13 was another episode's"


def test_rows_of_one_call_are_episodes_of_their_own(
    make_chunked: MakePolicy, example: Any, rng: np.random.Generator
) -> None:
    policy, states = make_chunked(2).prompt(KNOWN, example), rng.normal(size=(4, 3, S))
    actions = [policy.act(rows) for rows in states]
    assert len({action.tobytes() for rows in actions for action in rows}) == 12
    assert policy.act(np.zeros((0, S))).shape == (0, A)
    # In step 1 of a chunk the observation has no effect; at its end it has.
    runs = []
    for order in ((0, 1, 2), (0, 3, 3)):
        policy.reset()
        policy.seed(1)
        runs.append([policy.act(states[number]) for number in order])
    np.testing.assert_array_equal(runs[0][:2], runs[1][:2])
    assert np.abs(runs[0][2] - runs[1][2]).max() > 1e-3


# Many episodes at once


@pytest.mark.parametrize("horizon", [None, 2])
def test_an_episode_is_the_same_whatever_runs_beside_it(
    make_chunked: MakePolicy, example: Any, rng: np.random.Generator, horizon: int | None
) -> None:
    """Six episodes under two prompts at clocks of their own, any of them at a call, against each of them by itself."""
    policy = make_chunked(4, horizon)
    prompts = policy.encode_prompts([KNOWN, OTHER], [example, example])
    prompt_of, states = np.array([0, 1] * 3), rng.normal(size=(6, 10, S)).astype(np.float32)
    keys = rng.integers(0, 2**62, (6, 10))

    def act(many: Any, who: np.ndarray, steps: np.ndarray) -> np.ndarray:
        found: np.ndarray = many.act(
            who, steps, states[who, steps], NOTHING[: len(who)], lambda rows: keys[who[rows], steps[rows]]
        )
        return found

    single, alone = np.zeros(1, np.int64), np.empty((6, 10, A), np.float32)
    for number in range(6):
        one = policy.episodes(prompts, prompt_of)
        for step in range(10):
            (alone[number, step],) = act(one, single + number, single + step)
    many, clocks = policy.episodes(prompts, prompt_of), np.zeros(6, np.int64)
    while (clocks < 10).any():
        who = np.array([n for n in rng.permutation(6) if clocks[n] < 10 and rng.random() < 0.6], np.int64)
        np.testing.assert_allclose(act(many, who, clocks[who]), alone[who, clocks[who]], rtol=1e-4, atol=1e-4)
        clocks[who] += 1
    assert len({row.tobytes() for row in alone.reshape(-1, A)}) == 60
    # Begun anew, nothing is left of the time before: the same episodes come out.
    np.testing.assert_allclose(act(many, single, single)[0], alone[0, 0], rtol=1e-4, atol=1e-4)


def test_a_chunk_depends_on_its_own_row_alone(make_chunked: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy = make_chunked(4)
    prompts = policy.encode_prompts([KNOWN, OTHER], [example, example])
    index, steps = torch.from_numpy(rng.integers(0, 2, 13)), torch.from_numpy(rng.integers(0, 50, 13))
    states, seeds = torch.randn(13, S), torch.from_numpy(rng.integers(0, 2**62, 13))
    with torch.no_grad():
        whole = policy.network.sample(States(states, index, steps), prompts, policy.acting, seeds)
        some = torch.from_numpy(rng.permutation(13)[: int(rng.integers(1, 13))])
        rows = States(states[some], index[some], steps[some])
        fewer = policy.network.sample(rows, prompts, policy.acting, seeds[some])
    assert whole.shape == (13, 4, A)
    torch.testing.assert_close(fewer, whole[some], rtol=1e-4, atol=1e-4)


# What is refused


@pytest.mark.parametrize(("chunk", "horizon"), [(4, 5), (1, 2)])
def test_more_is_executed_than_there_is(make_chunked: MakePolicy, chunk: int, horizon: int) -> None:
    with pytest.raises(InputError, match="more actions") as error:
        make_chunked(chunk, horizon)
    assert (error.value.field, error.value.found) == ("acting.action_horizon", horizon)
    assert error.value.expected == f"1 to {chunk} (chunk)"


def test_chunks_have_no_critics(make_chunked: MakePolicy) -> None:
    with pytest.raises(InputError, match="single actions") as error:
        make_chunked(2).network.make_critic()
    assert error.value.field == "network.chunk"


def test_the_samplers_take_what_is_allowed_and_no_more_is(rng: np.random.Generator) -> None:
    most = int(ACTION_NUMBERS.high)
    with pytest.raises(InputError, match="samplers take") as error:
        DiffusionPolicy(Spaces(S, most // 1000 + 1, D), DiffusionNetworkConfig(chunk=1000))
    assert error.value.field == "network.chunk"
    assert "1000 actions of 66 numbers: 66000" in str(error.value.found)
    net = NoiseMLP(2, most, 1, 8, 4).requires_grad_(False)
    state, prompt, seeds = torch.randn(2, 2), torch.randn(1), torch.from_numpy(rng.integers(0, 2**62, 2))
    coefficients = sampler_coefficients("ddpm", 2, "vp", 1.0)
    sampled = reverse_diffusion(net, state, prompt, coefficients, seed=seeds)
    expected = reverse_diffusion(net, state, prompt, coefficients, seed=seeds, backend="reference")
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-4)
