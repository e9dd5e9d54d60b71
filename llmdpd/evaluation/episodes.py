"""Evaluating a policy, or a control: episodes of many tasks at once in the environment pool, films."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmdpd.data import Trajectory
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.videos import save_film
from llmdpd.policy.action_chunks import ChunkPlayer
from llmdpd.policy.policy import Policy
from llmdpd.tasks import EVALUATION_SEED_START
from llmdpd.tasks.locomotion import is_locomotion
from llmdpd.tasks.simulation.rollout import Act, EnvPool, EpisodeRequest, EpisodeResult
from llmdpd.utils.files import atomic_write_text

# A Meta-World step is 12.5 ms: half of real time, since a success may take no second.
FRAMES_PER_SECOND = 10
STEPS_PER_FRAME = 4
# Steps of 8 ms (walker2d, hopper) and 50 ms (halfcheetah): about real time for the first two.
LOCOMOTION_FRAMES_PER_SECOND = 30

MakeAct = Callable[[Mapping[str, TaskPrompt], Sequence[EpisodeRequest]], Act]
"""(prompts of tasks, requests) → the pool's `act` for these requests: what stands in for a policy."""


class PromptRows(NamedTuple):
    """The P prompts of an evaluation, one after the other, and which of them each request is under."""

    texts: list[str | None]
    examples: list[Trajectory | None]
    of_request: NDArray[np.int64]  # [requests]


def prompt_rows(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> PromptRows:
    """A row for each example of each task; the n-th request of a task is under its n-th example, over and over."""
    first: dict[str, int] = {}
    texts: list[str | None] = []
    examples: list[Trajectory | None] = []
    for task, prompt in prompts.items():
        first[task] = len(texts)
        texts += [prompt.text] * max(len(prompt.examples), 1)
        examples += prompt.examples or (None,)
    counts = dict.fromkeys(prompts, 0)
    index = np.empty(len(requests), np.int64)
    for row, request in enumerate(requests):
        task = request.task
        index[row] = first[task] + counts[task] % max(len(prompts[task].examples), 1)
        counts[task] += 1
    return PromptRows(texts, examples, index)


def evaluate_tasks(
    policy: Policy | MakeAct,
    prompts: Mapping[str, TaskPrompt],
    episodes: int | Mapping[str, int],
    pool: EnvPool,
    *,
    first_seed: int = EVALUATION_SEED_START,
    max_steps: int = 500,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[EpisodeResult]]:
    """Roll out `episodes` (by task, or of each) under their prompts, all tasks mixed into the policy's batches.

    Episode i of a task starts from environment seed `first_seed + i`, and is under example i mod N where the task has
    N; the policy's noise hangs on the task, that seed and the time step, so the episodes are the same whatever else
    runs beside them. With chunks, it is the time step at which a chunk is drawn, from 0 on.
    """
    count = dict.fromkeys(prompts, episodes) if isinstance(episodes, int) else episodes
    requests = [EpisodeRequest(task, first_seed + i, max_steps) for task in prompts for i in range(count[task])]
    results = iter(pool.run(requests, _make_act(policy)(prompts, requests), progress))
    return {task: list(itertools.islice(results, count[task])) for task in prompts}


def policy_act(policy: Policy, prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """The pool's `act` for a policy under prompts; it remembers of each episode what the policy needs of it."""
    context = policy.network.config.context
    rows = prompt_rows(prompts, requests)
    encoded = policy.encode_prompts(
        [text if context.text else None for text in rows.texts],
        [example if context.trajectory else None for example in rows.examples],
    )
    streams = np.array([zlib.crc32(r.task.encode()) << 32 ^ r.seed for r in requests], np.uint64)
    chunks, memory = ChunkPlayer(policy.replan), policy.memory()
    targets = np.zeros(len(requests), np.float32)
    if memory is not None:
        told = [rows.examples[row] for row in rows.of_request]
        targets = policy.target_returns([request.task for request in requests], told)

    def act(
        observations: NDArray[np.float32],
        index: NDArray[np.int64],
        steps: NDArray[np.int64],
        rewards: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        def draw(due: NDArray[np.int64]) -> NDArray[np.float32]:
            who, when, states = index[due], steps[due], observations[due]
            history = None if memory is None else memory.recall(who, when, states, rewards[due], targets[who])
            keys = _mix(streams[who], when)
            drawn = policy.draw_many(states, encoded, rows.of_request[who], when, keys, history)
            if memory is not None:
                memory.note(who, drawn[:, 0])
            return drawn

        return chunks.play(index, steps, draw)

    return act


def _make_act(policy: Policy | MakeAct) -> MakeAct:
    return partial(policy_act, policy) if isinstance(policy, Policy) else policy


def make_films(
    policy: Policy | MakeAct,
    prompts: Mapping[str, TaskPrompt],
    folder: Path,
    *,
    goal_visible: bool,
    max_steps: int,
    checkpoint: str,
    progress: Callable[[int], None] | None = None,
) -> str | None:
    """Film one episode of every task into `folder`: TASK.mp4, a strip TASK.png, and TASK.json beside them.

    Of a policy that retrieves, attention/TASK.png shows where in its example the filmed episode looked (with chunks,
    also where it would have looked at the steps in between).

    Returns why there are no films, or None: where no off-screen renderer works, the reason and how to get one are
    written to README.txt there.
    """
    from llmdpd.tasks.simulation.render import rendering_backend

    folder.mkdir(parents=True, exist_ok=True)
    backend, reason = rendering_backend()
    if backend is None:
        atomic_write_text(folder / "README.txt", reason + "\n")
        return reason
    requests = [
        EpisodeRequest(task, EVALUATION_SEED_START, max_steps, record=True, record_every=STEPS_PER_FRAME)
        for task in prompts
    ]
    with EnvPool(goal_visible=goal_visible, parallel=len(requests), render=True) as pool:
        watched = _Watched(_make_act(policy)(prompts, requests), len(requests))
        results = pool.run(requests, watched, progress)
    if isinstance(policy, Policy) and policy.retrieves:
        for request, states in zip(requests, watched.states, strict=True):
            _draw_attention(policy, prompts[request.task], states, folder / "attention" / f"{request.task}.png")
    for result in results:
        assert result.frames is not None
        task = result.request.task
        came = {"return": round(result.episode_return, 1)} if is_locomotion(task) else {"success": result.success}
        info = {**came, "seed": result.request.seed, "steps": result.length, "checkpoint": checkpoint}
        fps = LOCOMOTION_FRAMES_PER_SECOND if is_locomotion(task) else FRAMES_PER_SECOND
        save_film(folder, task, result.frames, info, fps=fps)
    return None


class _Watched:
    """An `act` that keeps what each request's episode observed, by time step."""

    def __init__(self, act: Act, requests: int) -> None:
        self._act = act
        self.states: list[dict[int, NDArray[np.float32]]] = [{} for _ in range(requests)]

    def __call__(
        self,
        observations: NDArray[np.float32],
        index: NDArray[np.int64],
        steps: NDArray[np.int64],
        rewards: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        for observation, request, step in zip(observations, index, steps, strict=True):
            self.states[request][int(step)] = observation.copy()
        actions: NDArray[np.float32] = np.asarray(self._act(observations, index, steps, rewards), np.float32)
        return actions


def _draw_attention(policy: Policy, prompt: TaskPrompt, states: Mapping[int, NDArray[np.float32]], path: Path) -> None:
    if not prompt.examples or prompt.text is None:
        return  # an example alone: `looks` needs both
    from llmdpd.evaluation.attention import save_attention

    observations = np.stack([states[step] for step in sorted(states)])
    weights, times = policy.looks(prompt.text, prompt.examples[0], observations)
    path.parent.mkdir(exist_ok=True)
    save_attention(path, weights, times, f"{path.stem}: where in its example the policy looks")


def _mix(streams: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """One key a (stream, step): splitmix64's finaliser, so that neighbouring steps get unrelated keys."""
    with np.errstate(over="ignore"):
        x = streams + steps.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).astype(np.int64)
