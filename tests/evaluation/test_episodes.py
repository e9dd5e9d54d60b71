from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.data import Trajectory
from llmdpd.evaluation.episodes import evaluate_tasks, policy_act, prompt_rows
from llmdpd.evaluation.prompts import TaskPrompt, as_one_prompt
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.ops.acting import FrozenActor
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy
from llmdpd.tasks import EVALUATION_SEED_START, SELECTION_SEED_START
from llmdpd.tasks.metaworld.layout import LAYOUT
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest, EpisodeResult

EPISODES, STEPS = 3, 12
Prompts = dict[str, TaskPrompt]
Results = dict[str, list[EpisodeResult]]


def essence(results: Results) -> dict[str, list[tuple[Any, ...]]]:
    """What must not depend on the circumstances."""
    return {
        task: [(r.request, r.success, r.episode_return, r.length, r.final_observation.tobytes()) for r in episodes]
        for task, episodes in results.items()
    }


@pytest.fixture(scope="module")
def undisturbed(policy: Policy, prompts: Prompts) -> Results:
    with EnvPool(1) as pool:
        return evaluate_tasks(policy, prompts, EPISODES, pool, max_steps=STEPS)


def test_seeds_are_those_of_evaluation(undisturbed: Results, policy: Policy, prompts: Prompts) -> None:
    for task, results in undisturbed.items():
        assert [r.request.task for r in results] == [task] * EPISODES
        assert [r.request.seed for r in results] == [EVALUATION_SEED_START + i for i in range(EPISODES)]
        assert len({r.final_observation.tobytes() for r in results}) == EPISODES
    with EnvPool(1) as pool:
        selection = evaluate_tasks(policy, prompts, 1, pool, first_seed=SELECTION_SEED_START, max_steps=2)
    assert selection["reach-v3"][0].request.seed == SELECTION_SEED_START
    assert all(
        p.demonstration is not None and 0 <= p.demonstration.seed < EVALUATION_SEED_START for p in prompts.values()
    )


def test_two_workers_find_the_same(undisturbed: Results, policy: Policy, prompts: Prompts) -> None:
    done: list[int] = []
    with EnvPool(2) as pool:
        results = evaluate_tasks(policy, prompts, EPISODES, pool, max_steps=STEPS, progress=done.append)
    assert essence(results) == essence(undisturbed)
    # Told while it waits, too, with the same number.
    assert done == sorted(done)
    assert set(done) - {0} == set(range(1, 2 * EPISODES + 1))


def test_more_episodes_begin_with_the_same_ones(undisturbed: Results, policy: Policy, prompts: Prompts) -> None:
    with EnvPool(1) as pool:
        fewer = evaluate_tasks(policy, {"reach-v3": prompts["reach-v3"]}, 2, pool, max_steps=STEPS)
    for one, two in zip(fewer["reach-v3"], undisturbed["reach-v3"], strict=False):
        np.testing.assert_allclose(one.final_observation, two.final_observation, rtol=0, atol=1e-5)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The keys of the noise of each call; an untrained policy's actions are clipped and may coincide."""
    sampled: list[list[int]] = []
    act = FrozenActor.act

    def noted(self: FrozenActor, observations: Any, times: Any, prompt_of: Any, seeds: np.ndarray) -> Any:
        sampled.append(seeds.tolist())
        return act(self, observations, times, prompt_of, seeds)

    monkeypatch.setattr(FrozenActor, "act", noted)
    return sampled


def test_noise_depends_on_task_seed_and_step_alone(
    policy: Policy, prompts: Prompts, rng: np.random.Generator, keys: list[list[int]]
) -> None:
    requests = [EpisodeRequest(task, EVALUATION_SEED_START + i, 500) for task in prompts for i in range(4)]
    observations = rng.normal(size=(8, 39)).astype(np.float32)
    act = policy_act(policy, prompts, requests)
    index, steps = np.arange(8), np.full(8, 3)
    actions = np.asarray(act(observations, index, steps, np.zeros(8)))
    order = rng.permutation(8)[:5]
    some = np.asarray(act(observations[order], index[order], steps[order], np.zeros(5)))
    np.testing.assert_allclose(some, actions[order], rtol=0, atol=1e-5)
    act(observations, index, steps + 1, np.zeros(8))
    backwards = dict(reversed(prompts.items()))
    alone = policy_act(policy, backwards, requests[4:])(observations[4:], np.arange(4), steps[:4], np.zeros(4))
    np.testing.assert_allclose(alone, actions[4:], rtol=0, atol=1e-5)
    first, shuffled, later, others = keys
    assert len({*first, *later}) == 16
    assert shuffled == [first[i] for i in order]
    assert others == first[4:]


@pytest.mark.parametrize("which", ["text", "trajectory"])
def test_an_ablation_is_given_the_prompts_that_it_knows_alone(which: str, prompts: Prompts) -> None:
    context = dataclasses.replace(ContextConfig(), **{which: False})
    network = DiffusionPolicy(Spaces(39, 4, 384, LAYOUT), DiffusionNetworkConfig(hidden_dim=8, context=context))
    texts = {text_key(str(prompt.text)): torch.ones(384) for prompt in prompts.values()}
    policy = Policy("llmdpd", network, None, BestOfN(samples=1), texts=texts)
    act = policy_act(policy, prompts, [EpisodeRequest(task, 0, 500) for task in prompts])
    assert np.shape(act(np.ones((2, 39), np.float32), np.arange(2), np.zeros(2, np.int64), np.zeros(2))) == (2, 4)


def test_the_episodes_of_a_task_take_its_demonstrations_in_turn(rng: np.random.Generator) -> None:
    def some(task: str, count: int) -> TaskPrompt:
        arrays = rng.normal(size=(9, 39)).astype(np.float32), np.zeros((9, 4), np.float32), np.zeros(9, np.float32)
        return TaskPrompt(f"do {task}", "-", tuple(Trajectory(*arrays, task, seed=n) for n in range(count)), "-")

    prompts = {"a": some("a", 3), "b": some("b", 0), "c": some("c", 2)}
    requests = [EpisodeRequest(task, seed, 500) for seed in range(7) for task in "cab"]
    rows = prompt_rows(prompts, requests)
    assert len(rows.texts) == len(rows.demonstrations) == 6
    for request, row in zip(requests, rows.of_request, strict=True):
        assert rows.texts[row] == f"do {request.task}"
        taken = rows.demonstrations[row]
        if request.task == "b":
            assert taken is None
        else:
            assert taken is not None
            assert (taken.task, taken.seed) == (request.task, request.seed % len(prompts[request.task].demonstrations))


def test_demonstrations_together_are_one_prompt(policy: Policy, prompts: Prompts) -> None:
    one, two = (prompt.demonstration for prompt in prompts.values())
    assert one is not None
    assert two is not None
    several = {task: dataclasses.replace(prompt, demonstrations=(one, two)) for task, prompt in prompts.items()}
    together = as_one_prompt(several)
    requests = [EpisodeRequest(task, seed, 500) for seed in range(3) for task in prompts]
    rows = prompt_rows(together, requests)
    assert rows.demonstrations == [[one, two], [one, two]]
    assert rows.of_request.tolist() == [0, 1] * 3
    arrays = np.tile(one.observations[0], (6, 1)), np.arange(6), np.zeros(6, np.int64), np.zeros(6)
    actions = np.asarray(policy_act(policy, together, requests)(*arrays))
    assert actions.shape == (6, 4)
    for task, prompt in several.items():
        assert together[task].demonstration_source == f"{prompt.demonstration_source}, as one prompt"
    first = {task: dataclasses.replace(prompt, demonstrations=(one,)) for task, prompt in prompts.items()}
    alone = as_one_prompt(first)
    same = [np.asarray(policy_act(policy, which, requests)(*arrays)) for which in (alone, first)]
    assert np.array_equal(*same)


def test_a_policy_acts_under_the_demonstration_of_the_episode(policy: Policy, prompts: Prompts) -> None:
    one, two = (prompt.demonstration for prompt in prompts.values())
    assert one is not None
    assert two is not None
    both = dataclasses.replace(prompts["reach-v3"], demonstrations=(one, two))
    requests = [EpisodeRequest("reach-v3", EVALUATION_SEED_START, 500) for _ in range(40)]
    # Pairs of episodes in the same state; of an untrained policy many actions are at their bounds.
    states = np.repeat(one.observations[:20], 2, axis=0)
    rows = states, np.arange(40), np.zeros(40, np.int64), np.zeros(40)
    actions = np.asarray(policy_act(policy, {"reach-v3": both}, requests)(*rows))
    for row, demonstration in enumerate((one, two)):
        single = {"reach-v3": dataclasses.replace(both, demonstrations=(demonstration,))}
        alone = np.asarray(policy_act(policy, single, requests)(*rows))
        np.testing.assert_allclose(alone[row::2], actions[row::2], rtol=0, atol=1e-5)
    assert np.abs(actions[::2] - actions[1::2]).max() > 1e-5
