"""Roll-outs for an evaluation: episodes of many tasks at once in the environment pool."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmdpd.data import Trajectory
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.policy.episodes import Episodes
from llmdpd.policy.policy import Policy
from llmdpd.tasks import EVALUATION_SEED_START
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.tasks.simulation.rollout import Act, EnvPool, EpisodeRequest, EpisodeResult, LostEpisodesError
from llmdpd.tasks.specs import task_spec
from llmdpd.utils import ranks

Index = NDArray[np.int64]
MakeAct = Callable[[Mapping[str, TaskPrompt], Sequence[EpisodeRequest]], Act]
"""(prompts of tasks, requests) → the pool's `act` for these requests: what stands in for a policy."""


class PromptRows(NamedTuple):
    """The P prompts of an evaluation, one after the other, and which of them each request takes.

    A prompt's demonstrations are one, a list of several that it is made of, or none.
    """

    texts: list[str | None]
    demonstrations: list[Trajectory | list[Trajectory] | None]
    of_request: NDArray[np.int64]  # [requests]


def prompt_rows(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> PromptRows:
    """A row for each trajectory prompt of each task; a task's n-th request takes its n-th one, over and over."""
    first: dict[str, int] = {}
    texts: list[str | None] = []
    demonstrations: list[Trajectory | list[Trajectory] | None] = []
    shown = {task: prompt.trajectories for task, prompt in prompts.items()}
    for task, prompt in prompts.items():
        first[task] = len(texts)
        texts += [prompt.text] * len(shown[task])
        demonstrations += shown[task]
    counts = dict.fromkeys(prompts, 0)
    index = np.empty(len(requests), np.int64)
    for row, request in enumerate(requests):
        task = request.task
        index[row] = first[task] + counts[task] % len(shown[task])
        counts[task] += 1
    return PromptRows(texts, demonstrations, index)


class UnfinishedError(WorkerError):
    """An evaluation that could not be finished; `results` are those of the tasks all of whose episodes ended."""

    def __init__(self, message: str, results: dict[str, list[EpisodeResult]]) -> None:
        super().__init__(message)
        self.results = results


def evaluate_tasks(
    policy: Policy | MakeAct,
    prompts: Mapping[str, TaskPrompt],
    episodes: int | Mapping[str, int],
    pool: EnvPool,
    *,
    first_seed: int = EVALUATION_SEED_START,
    max_steps: int | None = None,
    whole: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[EpisodeResult]]:
    """Roll out `episodes` (of each task, or by task) with their prompts, all tasks mixed into the policy's batches.

    Episode i of a task starts from environment seed `first_seed + i`, and takes demonstration i mod N where the task
    has N. The policy's noise depends on the task, that seed and the time step alone, so the episodes are the same
    whatever else runs beside them. With action chunks, it is the time step at which a chunk is sampled, from 0 on.
    An episode has `max_steps` steps at most, by default as many as its task's environment allows; a `whole` one goes on
    after the success. Several processes (`llmdpd.utils.ranks`) run their share of the episodes each.

    Raises:
        UnfinishedError: episodes that workers died of.
    """
    count = dict.fromkeys(prompts, episodes) if isinstance(episodes, int) else episodes
    steps = {task: max_steps or task_spec(task).max_steps for task in prompts}
    requests = [
        EpisodeRequest(task, first_seed + i, steps[task], stop_on_success=not whole)
        for task in prompts
        for i in range(count[task])
    ]
    found, lost = _run(pool, requests, act_maker(policy)(prompts, requests), progress)
    rows = iter(found)
    by_task = {task: list(itertools.islice(rows, count[task])) for task in prompts}
    finished = {task: [result for result in row if result] for task, row in by_task.items() if None not in row}
    if lost:
        raise UnfinishedError(lost, finished)
    return finished


def _run(
    pool: EnvPool, requests: Sequence[EpisodeRequest], act: Act, progress: Callable[[int], None] | None
) -> tuple[list[EpisodeResult | None], str]:
    """The results of all requests, None where workers died of one, and what is to be told of it.

    Each process runs its share of the requests; all of them get all results.
    """
    places = np.array(ranks.own_share(range(len(requests))), np.int64)

    def own_act(
        observations: NDArray[np.float32], index: Index, steps: Index, rewards: NDArray[np.float32]
    ) -> ArrayLike:
        return act(observations, places[index], steps, rewards)

    def own_progress(done: int) -> None:
        if progress is not None:
            progress(min(done * ranks.count(), len(requests)))

    def own_results() -> list[Any]:
        own, words = [requests[place] for place in places], ""
        try:
            results: Sequence[EpisodeResult | None] = pool.run(own, own_act, own_progress)
        except LostEpisodesError as lost:
            results, words = lost.results, str(lost)
        pairs = zip(results, places.tolist(), strict=True)
        return [[_plain(result, isinstance(act, PolicyAct) and act.tracked(place)) for result, place in pairs], words]

    parts, lost = zip(*ranks.together(own_results), strict=True)
    plain = ranks.interleaved(parts)
    results = [None if one is None else _result(request, one) for request, one in zip(requests, plain, strict=True)]
    return results, "\n".join(filter(None, lost))


def _plain(result: EpisodeResult | None, tracked: bool) -> list[Any] | None:
    """A result as JSON, without its request and without pictures, which none of these has."""
    if result is None:
        return None
    counts = [result.success, result.episode_return, result.length, result.redone, tracked]
    return [*counts, result.final_observation.tolist()]


def _result(request: EpisodeRequest, plain: list[Any]) -> EpisodeResult:
    success, episode_return, length, redone, tracked, observation = plain
    last = np.array(observation, np.float32)
    return EpisodeResult(request, success, episode_return, length, last, redone, tracked=tracked)


def act_maker(policy: Policy | MakeAct) -> MakeAct:
    """What makes the pool's `act`: of a policy `policy_act`, else as it is."""
    return partial(policy_act, policy) if isinstance(policy, Policy) else policy


class PolicyAct:
    """The pool's `act` for a policy's episodes, whose noise is that of `streams` [requests]."""

    def __init__(self, episodes: Episodes, streams: NDArray[np.uint64]) -> None:
        self._episodes, self._streams = episodes, streams

    def __call__(
        self, observations: NDArray[np.float32], index: Index, steps: Index, rewards: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        streams = self._streams[index]
        return self._episodes.act(index, steps, observations, rewards, lambda due: _mix(streams[due], steps[due]))

    def tracked(self, request: int) -> bool:
        """Whether the policy has handed over to the tracker in the episode of a request."""
        return self._episodes.taken_over(request)


def policy_act(
    policy: Policy,
    prompts: Mapping[str, TaskPrompt],
    requests: Sequence[EpisodeRequest],
    *,
    hands_over: bool = True,
) -> PolicyAct:
    """The pool's `act` for a policy with prompts; it remembers of each episode what the policy needs of it.

    `hands_over`: whether the tracker takes over where the policy is to hand over.
    """
    reads, rows = policy.network.reads, prompt_rows(prompts, requests)
    encoded = policy.encode_prompts(
        [text if reads.text else None for text in rows.texts],
        [demonstration if reads.trajectory else None for demonstration in rows.demonstrations],
    )
    streams = np.array([zlib.crc32(r.task.encode()) << 32 ^ r.seed for r in requests], np.uint64)
    targets = np.zeros(len(requests), np.float32)
    if policy.network.memory_length:
        own = [rows.demonstrations[row] for row in rows.of_request]
        targets = policy.target_returns([request.task for request in requests], own)
    shown = rows.demonstrations if reads.trajectory and hands_over else ()
    return PolicyAct(policy.episodes(encoded, rows.of_request, targets, shown), streams)


def _mix(streams: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """One key a (stream, step): splitmix64's finaliser, so that neighbouring steps get unrelated keys."""
    with np.errstate(over="ignore"):
        x = streams + steps.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).astype(np.int64)
