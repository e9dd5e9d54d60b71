"""Evaluating a policy: episodes of many tasks at once in the environment pool, success counts, films."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmdpd.envs import EVALUATION_SEED_START
from llmdpd.envs.rollout import Act, EnvPool, EpisodeRequest, EpisodeResult
from llmdpd.files import atomic_write_text
from llmdpd.policy import Policy
from llmdpd.reporting.films import save_film
from llmdpd.runs.prompts import TaskPrompt

# A Meta-World step is 12.5 ms: half of real time, since a success may take no second.
FRAMES_PER_SECOND = 10
STEPS_PER_FRAME = 4


def evaluate_tasks(
    policy: Policy,
    prompts: Mapping[str, TaskPrompt],
    episodes: int,
    pool: EnvPool,
    *,
    first_seed: int = EVALUATION_SEED_START,
    max_steps: int = 500,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[EpisodeResult]]:
    """Roll out `episodes` of every task under its prompts, all tasks mixed into the policy's batches.

    Episode i of a task starts from environment seed `first_seed + i`; the policy's noise hangs on the task, that seed
    and the time step, so the episodes are the same whatever else runs beside them.
    """
    requests = [EpisodeRequest(task, first_seed + i, max_steps) for task in prompts for i in range(episodes)]
    results = pool.run(requests, policy_act(policy, prompts, requests), progress)
    return {task: results[n * episodes : (n + 1) * episodes] for n, task in enumerate(prompts)}


def policy_act(policy: Policy, prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """The pool's `act` for a policy under prompts."""
    context = policy.network.config.context
    encoded = policy.encode_prompts(
        [p.text if context.text else None for p in prompts.values()],
        [p.example if context.trajectory else None for p in prompts.values()],
    )
    order = {task: index for index, task in enumerate(prompts)}
    task_index = np.array([order[request.task] for request in requests], np.int64)
    streams = np.array([zlib.crc32(r.task.encode()) << 32 ^ r.seed for r in requests], np.uint64)

    def act(
        observations: NDArray[np.float32], index: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        return policy.act_many(observations, encoded, task_index[index], steps, _mix(streams[index], steps))

    return act


def make_films(
    policy: Policy,
    prompts: Mapping[str, TaskPrompt],
    folder: Path,
    *,
    goal_visible: bool,
    max_steps: int,
    checkpoint: str,
    progress: Callable[[int], None] | None = None,
) -> str | None:
    """Film one episode of every task into `folder`: TASK.mp4, a strip TASK.png, and TASK.json beside them.

    Returns why there are no films, or None: where no off-screen renderer works, the reason and how to get one are
    written to README.txt there.
    """
    from llmdpd.envs.render import rendering_backend

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
        results = pool.run(requests, policy_act(policy, prompts, requests), progress)
    for result in results:
        assert result.frames is not None
        info = {
            "success": result.success,
            "seed": result.request.seed,
            "steps": result.length,
            "checkpoint": checkpoint,
        }
        save_film(folder, result.request.task, result.frames, info, fps=FRAMES_PER_SECOND)
    return None


def _mix(streams: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """One key a (stream, step): splitmix64's finaliser, so that neighbouring steps get unrelated keys."""
    with np.errstate(over="ignore"):
        x = streams + steps.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).astype(np.int64)
