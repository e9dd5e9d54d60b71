"""Chunks of actions as a policy plays them: when it looks again, and that each episode has its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.data import Trajectory
from llmdpd.diffusion import NoiseMLP, reverse_diffusion, sampler_plan
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import policy_act
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.networks import make_network
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.critic import DoubleQ
from llmdpd.nn.policy_network import ConditionalPolicy, PolicyConfig
from llmdpd.policy.action_chunks import ChunkPlayer
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.simulation.rollout import EpisodeRequest
from llmdpd.utils.bounds import ACTION_NUMBERS

S, A, D = 7, 3, 10
TASKS = ("reach-v3", "push-v3")
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8)
# The clock is read too.
CONTEXT = ContextConfig("retrieval", text_dim=5, text_hidden=16, trajectory_dim=4, encoder=ENCODER)

MakePolicy = Callable[..., Policy]


@pytest.fixture
def make_policy(rng: np.random.Generator) -> MakePolicy:
    """A policy whose actions are not clipped, so that no two of them are the same."""

    def make(chunk: int = 4, replan: int | None = None, noise_scale: float = 1.0) -> Policy:
        config = PolicyConfig(hidden_dim=24, time_dim=8, action_bound=100.0, chunk=chunk, context=CONTEXT)
        network = ConditionalPolicy(S, A, D, config)
        network.fit(torch.randn(50, S) * 2 + 1)
        texts = {text_key(f"do {task}"): torch.randn(D) for task in TASKS}
        acting = ActingConfig(samples=1, replan=replan, noise_scale=noise_scale)
        return Policy(network, None, acting, texts=texts)

    return make


@pytest.fixture
def example(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(20, S)), rng.uniform(-1, 1, (20, A))


# The player


def test_each_episode_plays_its_own_chunk_by_its_own_clock(rng: np.random.Generator) -> None:
    """Any subset of episodes at any call, against a plain list for each of them."""
    length, H, drawn = int(rng.integers(2, 5)), 5, 0
    player = ChunkPlayer(length)
    clocks, left = np.zeros(6, np.int64), [[] for _ in range(6)]
    for _ in range(60):
        episodes = rng.permutation(6)[: int(rng.integers(0, 7))]
        due_rows: list[int] = []
        chunks = rng.normal(size=(len(episodes), H, 2)).astype(np.float32)

        def draw(rows: np.ndarray, due: list[int] = due_rows, made: np.ndarray = chunks) -> np.ndarray:
            assert not due, "one call for all"
            due.extend(rows.tolist())
            return made[rows]

        played = player.play(episodes, clocks[episodes], draw)
        assert played.shape == (len(episodes), 2)
        for row, episode in enumerate(episodes):
            assert (row in due_rows) == (not left[episode])
            if not left[episode]:
                left[episode] = list(chunks[row, :length])
                drawn += 1
            np.testing.assert_array_equal(played[row], left[episode].pop(0))
        clocks[episodes] += 1
    assert drawn > 6


def test_a_chunk_goes_on_at_the_next_step_alone(rng: np.random.Generator) -> None:
    player, asked = ChunkPlayer(3), []

    def draw(rows: np.ndarray) -> np.ndarray:
        asked.append(rows.tolist())
        return np.zeros((len(rows), 3, 1), np.float32)

    one = np.zeros(1, np.int64)
    for step, expected in ((0, 1), (1, 1), (1, 2), (2, 2), (5, 3), (0, 4), (1, 4), (2, 4), (3, 5)):
        player.play(one, one + step, draw)
        assert len(asked) == expected, step
    player.reset()
    player.play(one, one + 4, draw)
    assert len(asked) == 6
    player.play(one + 9, one + 5, draw)
    assert len(asked) == 7, "another episode has nothing of it"


def test_a_draw_that_fails_leaves_the_others_as_they_were() -> None:
    player = ChunkPlayer(2)
    chunk = np.arange(2, dtype=np.float32).reshape(1, 2, 1)
    player.play(np.array([0]), np.array([0]), lambda rows: chunk)

    def broken(rows: np.ndarray) -> np.ndarray:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        player.play(np.array([0, 1]), np.array([1, 0]), broken)
    assert player.play(np.array([0]), np.array([1]), broken) == chunk[0, 1]


# Policy.act


def by_hand(policy: Policy, state: np.ndarray, step: int, seed: int) -> np.ndarray:
    """The whole chunk [H, A] drawn in one state [S], straight from the sampler."""
    network, prompts = policy.network, policy._prompts
    assert isinstance(network, ConditionalPolicy)
    assert prompts is not None
    with torch.no_grad():
        rows = torch.from_numpy(np.float32(state))[None]
        condition = network.condition(rows, prompts, None, torch.tensor([step]))
        plan = policy.acting.plan(network.config)
        drawn = reverse_diffusion(network.net, *condition, plan, seed=torch.tensor([seed]), backend="reference")
    return drawn.reshape(network.config.chunk, A).numpy()


@pytest.mark.parametrize(("chunk", "replan", "played"), [(4, None, 4), (4, 4, 4), (4, 3, 3), (5, 1, 1), (1, None, 1)])
def test_a_chunk_is_played_then_the_next_is_drawn(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator, chunk: int, replan: int | None, played: int
) -> None:
    policy = make_policy(chunk, replan).prompt("do reach-v3", example)
    assert policy.replan == played
    states, seed = rng.normal(size=(11, S)), int(rng.integers(2**31))
    policy.seed(seed)
    actions = [policy.act(state) for state in states]
    stream = torch.Generator().manual_seed(seed)
    for start in range(0, 11, played):
        key = int(torch.randint(2**63 - 1, (1,), generator=stream))
        whole = by_hand(policy, states[start], start, key)
        for action, expected in zip(actions[start : start + played], whole, strict=False):
            np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-4)


def test_what_is_left_is_dropped_at_reset_seed_and_prompt(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator
) -> None:
    policy, states = make_policy().prompt("do reach-v3", example), rng.normal(size=(6, S))

    def played() -> np.ndarray:
        return np.stack([policy.act(state) for state in states])

    policy.seed(3)
    first = played()  # one chunk and a half
    policy.seed(3)
    policy.reset()
    np.testing.assert_array_equal(played(), first)
    policy.reset()
    again = played()
    assert np.abs(again[0] - first[0]).max() > 1e-3, "new noise, in the same state"
    # seed() governs the very next action, whatever was drawn before it.
    seconds = []
    for _ in range(2):
        policy.reset()
        policy.act(states[0])
        policy.seed(3)
        seconds.append(policy.act(states[1]))
    np.testing.assert_array_equal(*seconds)
    policy.prompt("do push-v3", example).seed(3)
    assert np.abs(policy.act(states[0]) - first[0]).max() > 1e-3


def test_a_clock_that_is_set_looks_again(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy(3).prompt("do reach-v3", example)
    state = np.ones(S)
    draws: list[int] = []
    draw_many = policy.draw_many
    policy.draw_many = lambda *given: draws.append(int(given[3][0])) or draw_many(*given)  # type: ignore[method-assign]
    for step in (None, 1, None, None, 9, None, 9, 10, 11, 12):
        policy.act(state, step=step)
    assert draws == [0, 3, 9, 9, 12]
    policy.reset()
    policy.act(state, step=13)
    assert draws[5:] == [13], "what was left for step 13 was another episode's"


def test_rows_of_one_call_are_episodes_of_their_own(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator
) -> None:
    policy = make_policy(2).prompt("do reach-v3", example)
    states = rng.normal(size=(4, 3, S))
    actions = [policy.act(rows) for rows in states]
    assert len({action.tobytes() for rows in actions for action in rows}) == 12
    assert policy.act(np.zeros((0, S))).shape == (0, A)
    # In step 1 of a chunk nothing is looked at; at its end it is.
    policy.reset()
    policy.seed(1)
    one = [policy.act(rows) for rows in states[:3]]
    policy.reset()
    policy.seed(1)
    other = [policy.act(rows) for rows in (states[0], states[3], states[3])]
    np.testing.assert_array_equal(one[:2], other[:2])
    assert np.abs(one[2] - other[2]).max() > 1e-3


def test_chunks_of_one_are_drawn_as_before_bit_for_bit(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator
) -> None:
    policy, seed = make_policy(1).prompt("do reach-v3", example), int(rng.integers(2**31))
    policy.seed(seed)
    stream = torch.Generator().manual_seed(seed)
    for step, rows in enumerate(rng.normal(size=(3, 8, S)).astype(np.float32)):
        keys = torch.randint(2**63 - 1, (8,), generator=stream)
        with torch.no_grad():
            clock = torch.full((8,), step)
            condition = policy.network.condition(torch.from_numpy(rows), policy._prompts, None, clock)
            expected = reverse_diffusion(policy.network.net, *condition, policy.network.plan, seed=keys)
        np.testing.assert_array_equal(policy.act(rows), expected.numpy())


# Many episodes at once


def pool_act(policy: Policy, example: Any, requests: list[EpisodeRequest]) -> Any:
    observations, actions = (part.astype(np.float32) for part in example)
    shown = Trajectory(observations, actions, np.zeros(20, np.float32), "any")
    prompts = {task: TaskPrompt(f"do {task}", "-", (shown,), "-") for task in TASKS}
    act = policy_act(policy, prompts, requests)
    return lambda observations, index, steps: act(observations, index, steps, np.zeros(len(index), np.float32))


@pytest.mark.parametrize("replan", [None, 2])
def test_an_episode_is_the_same_whatever_runs_beside_it(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator, replan: int | None
) -> None:
    """Six episodes at clocks of their own, any of them at a call, against each of them by itself."""
    policy = make_policy(4, replan)
    requests = [EpisodeRequest(task, seed) for task in TASKS for seed in (5, 6, 7)]
    states = rng.normal(size=(6, 10, S)).astype(np.float32)
    alone = np.empty((6, 10, A), np.float32)
    for number in range(6):
        act = pool_act(policy, example, requests)
        for step in range(10):
            (alone[number, step],) = act(states[number, [step]], np.array([number]), np.array([step]))
    act, clocks = pool_act(policy, example, requests), np.zeros(6, np.int64)
    while (clocks < 10).any():
        index = np.array([n for n in rng.permutation(6) if clocks[n] < 10 and rng.random() < 0.6], np.int64)
        if not len(index):
            continue
        steps = clocks[index]
        together = act(states[index, steps], index, steps)
        np.testing.assert_allclose(together, alone[index, steps], rtol=1e-4, atol=1e-4)
        clocks[index] += 1
    assert len({row.tobytes() for row in alone.reshape(-1, A)}) == 60
    # Begun anew, nothing is left of the time before: the same episodes come out.
    (first,) = act(states[0, [0]], np.array([0]), np.array([0]))
    np.testing.assert_allclose(first, alone[0, 0], rtol=1e-4, atol=1e-4)


def test_noise_hangs_on_the_step_of_the_draw(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy = make_policy(3)
    keys: list[int] = []
    draw_many = policy.draw_many
    policy.draw_many = lambda *given: keys.extend(given[4].tolist()) or draw_many(*given)  # type: ignore[method-assign]
    requests = [EpisodeRequest("reach-v3", 5)]
    for _ in range(2):
        act = pool_act(policy, example, requests)
        for step in range(7):
            act(rng.normal(size=(1, S)).astype(np.float32), np.zeros(1, np.int64), np.array([step]))
    every = make_policy(1)
    draw_one = every.draw_many
    every.draw_many = lambda *given: keys.extend(given[4].tolist()) or draw_one(*given)  # type: ignore[method-assign]
    act = pool_act(every, example, requests)
    for step in (0, 3, 6):
        act(rng.normal(size=(1, S)).astype(np.float32), np.zeros(1, np.int64), np.array([step]))
    assert keys[:3] == keys[3:6] == keys[6:]
    assert len(set(keys)) == 3


def test_a_chunk_is_its_own_rows_alone(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy = make_policy(4)
    prompts = policy.encode_prompts([f"do {task}" for task in TASKS], [example, example])
    states, seeds = rng.normal(size=(13, S)).astype(np.float32), rng.integers(0, 2**62, 13)
    index, steps = rng.integers(0, 2, 13), rng.integers(0, 50, 13)
    whole = policy.draw_many(states, prompts, index, steps, seeds)
    assert whole.shape == (13, 4, A)
    np.testing.assert_array_equal(policy.act_many(states, prompts, index, steps, seeds), whole[:, 0])
    some = rng.permutation(13)[: int(rng.integers(1, 13))]
    fewer = policy.draw_many(states[some], prompts, index[some], steps[some], seeds[some])
    np.testing.assert_allclose(fewer, whole[some], rtol=1e-4, atol=1e-4)


# On disk


def test_a_folder_holds_the_chunk(make_policy: MakePolicy, example: Any, tmp_path: Path) -> None:
    policy = make_policy(4, 3)
    policy.save(tmp_path / "p")
    description = json.loads((tmp_path / "p" / "policy.json").read_text())
    assert (description["policy"]["chunk"], description["acting"]["replan"]) == (4, 3)
    loaded = Policy.load(tmp_path / "p")
    assert loaded.replan == 3
    for each in (policy, loaded):
        each.prompt("do reach-v3", example)
    for step in range(5):
        np.testing.assert_array_equal(loaded.act(np.full(S, step)), policy.act(np.full(S, step)))


def test_an_older_folder_has_chunks_of_one(make_policy: MakePolicy, example: Any, tmp_path: Path) -> None:
    policy = make_policy(1)
    policy.save(tmp_path / "p")
    file = tmp_path / "p" / "policy.json"
    description = json.loads(file.read_text())
    del description["policy"]["chunk"], description["acting"]["replan"]
    file.write_text(json.dumps(description))
    loaded = Policy.load(tmp_path / "p")
    assert loaded.network.config.chunk == loaded.replan == 1
    for each in (policy, loaded):
        each.prompt("do reach-v3", example)
    for _ in range(3):
        np.testing.assert_array_equal(loaded.act(np.ones((5, S))), policy.act(np.ones((5, S))))


@pytest.mark.parametrize(
    ("part", "name", "value", "field"),
    [
        ("policy", "chunk", 0, "policy.chunk"),
        ("policy", "chunk", 2.5, "policy.chunk"),
        ("policy", "chunk", 1001, "policy.chunk"),
        ("policy", "chunk", 3, "net.layers.0.weight"),
        ("acting", "replan", 5, "acting.replan"),
        ("acting", "replan", 0, "acting.replan"),
    ],
)
def test_a_folder_with_wrong_chunks(
    make_policy: MakePolicy, tmp_path: Path, part: str, name: str, value: object, field: str
) -> None:
    make_policy(4).save(tmp_path / "p")
    file = tmp_path / "p" / "policy.json"
    description = json.loads(file.read_text())
    description[part][name] = value
    file.write_text(json.dumps(description))
    with pytest.raises(InputError) as error:
        Policy.load(tmp_path / "p")
    assert error.value.field == field
    assert str(error.value.path).startswith(str(tmp_path / "p"))


# What is refused


def test_more_is_played_than_there_is(make_policy: MakePolicy) -> None:
    with pytest.raises(InputError, match="more actions") as error:
        make_policy(4).with_acting(replan=5)
    assert error.value.field == "acting.replan"
    assert error.value.found == 5
    assert error.value.expected == "1 to 4 (policy.chunk)"
    with pytest.raises(InputError) as error:
        make_policy(1, 2)
    assert error.value.field == "acting.replan"


def test_critics_have_no_say_over_chunks(make_policy: MakePolicy) -> None:
    network = make_policy(2).network
    critic = DoubleQ(network.context.state_dim, A, network.context.prompt_dim, 8)
    with pytest.raises(InputError, match="single actions") as error:
        Policy(network, critic, ActingConfig(samples=1))
    assert error.value.field == "policy.chunk"


def test_trajectory_diffusion_has_no_chunks() -> None:
    with pytest.raises(InputError, match="plans have no chunks") as error:
        make_network("trajectory-diffusion", S, A, D, PolicyConfig(chunk=2, context=CONTEXT))
    assert (error.value.field, error.value.found) == ("policy.chunk", 2)


def test_the_samplers_take_what_is_allowed_and_no_more_is(rng: np.random.Generator) -> None:
    most = ACTION_NUMBERS[1]
    with pytest.raises(InputError, match="samplers take") as error:
        ConditionalPolicy(S, int(most) // 1000 + 1, D, PolicyConfig(chunk=1000, context=CONTEXT))
    assert error.value.field == "policy.chunk"
    assert "1000 actions of 66 numbers: 66000" in str(error.value.found)
    net = NoiseMLP(2, int(most), 1, 8, 4).requires_grad_(False)
    state, prompt, seeds = torch.randn(2, 2), torch.randn(1), torch.from_numpy(rng.integers(0, 2**62, 2))
    plan = sampler_plan("ddpm", 2, "vp", 1.0)
    drawn = reverse_diffusion(net, state, prompt, plan, seed=seeds)
    expected = reverse_diffusion(net, state, prompt, plan, seed=seeds, backend="reference")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
