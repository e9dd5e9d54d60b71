"""Episodes rolled out in worker processes, in lockstep with one central, batched policy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmdpd.tasks.base import FloatArray, Frame
from llmdpd.tasks.simulation.processes import (
    MAX_DEATHS,
    POLL_SECONDS,
    Death,
    Worker,
    WorkerDiedError,
    WorkerError,
    answered,
    time_limits,
)
from llmdpd.tasks.simulation.render import require_backend
from llmdpd.tasks.simulation.worker import EpisodeRequest, Outcome
from llmdpd.tasks.specs import suite_of
from llmdpd.utils.cores import usable_cores

__all__ = ["Act", "EnvPool", "EpisodeRequest", "EpisodeResult"]

Act = Callable[[FloatArray, npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray], npt.ArrayLike]
"""(observations f32 [B, S], request index int64 [B], step within its episode int64 [B], rewards f32 [B] of the last
steps, 0 at the first) → actions [B, A]."""

MAKE_ENVIRONMENT = "llmdpd.tasks.specs:make_environment"
_HOST = "llmdpd.tasks.simulation.worker:EpisodeHost"
_GROUPS = 2
_SPARE_ENVIRONMENTS = 8


@dataclass(frozen=True)
class EpisodeResult:
    """The result of an `EpisodeRequest`.

    `length` counts steps, `episode_return` sums their rewards; `redone` counts the worker deaths during the episode.
    `tracked`: whether a policy had handed over to its demonstration's tracker when it ended.
    `frames` are pictures uint8 [H, W, 3] if they were requested.
    """

    request: EpisodeRequest
    success: bool
    episode_return: float
    length: int
    final_observation: FloatArray
    redone: int = 0
    frames: list[Frame] | None = None
    tracked: bool = False


class LostEpisodesError(WorkerError):
    """Episodes that three workers died of; `results` are those of all requests, in their order, None where lost."""

    def __init__(self, message: str, results: list[EpisodeResult | None]) -> None:
        super().__init__(message)
        self.results = results


@dataclass
class _Running:
    """An episode under way, as the parent knows it."""

    index: int
    request: EpisodeRequest
    slot: int
    worker: Worker
    observation: FloatArray | None = None
    reward: float = 0.0
    actions: list[FloatArray] = field(default_factory=list)
    episode_return: float = 0.0
    success: bool = False
    redone: int = 0
    deaths: int = 0
    waiting: bool = True


class EnvPool:
    """Processes that each host several environments; a context manager that keeps both alive between calls of `run`.

    The running episodes form two groups: while the policy acts for one, the workers step the other. Which episodes
    share a batch, and in which order, depends only on `parallel` and on the requests, never on timing or on the
    number of workers, so results are the same for any number of workers, bit for bit, even where a matrix product
    rounds differently for another batch size.

    A worker that dies, or takes longer than `time_limits` allow, is replaced, and its unfinished episodes are redone
    from their start with the actions that they had been given: the policy does not notice, and the results are those of
    an undisturbed run.

    Args:
        workers: processes, one a core by default.
        goal_visible: whether observations hold the goal, where the suite can hide it.
        parallel: episodes running at once over all workers; each holds an environment of 25 to 55 MB.
        render: prepare the workers for requests with `record=True`.
        make: name ("module:function") of the factory of environments; called with (task, goal_visible, render).

    Attributes:
        deaths: the workers that died so far.
    """

    def __init__(
        self,
        workers: int | None = None,
        goal_visible: bool = True,
        parallel: int = 32,
        *,
        render: bool = False,
        make: str = MAKE_ENVIRONMENT,
    ) -> None:
        if parallel < 1 or (workers is not None and workers < 1):
            raise ValueError(f"workers and parallel must be positive, got {workers} and {parallel}")
        self.deaths: list[Death] = []
        self.goal_visible, self.parallel = goal_visible, parallel
        self._count = min(workers or usable_cores(), parallel)
        limit = -(-parallel // self._count) + _SPARE_ENVIRONMENTS
        self._arguments = (make, goal_visible, limit)
        self._environment = {"MUJOCO_GL": require_backend()} if render else {}
        self._checks_names = make == MAKE_ENVIRONMENT
        self._render = render
        self._workers: list[Worker] = []

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; a later `run` starts new ones."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in self._workers]

    def run(
        self, requests: Sequence[EpisodeRequest], act: Act, progress: Callable[[int], None] | None = None
    ) -> list[EpisodeResult]:
        """Roll out `requests`; results in their order.

        Args:
            requests: episodes; tasks may be mixed as long as their observations have one width.
            act: the policy, called with any subset of the active episodes at a time.
            progress: called with the number of finished episodes so far, as each ends and about every second; may raise
                to stop.

        Raises:
            InputError: an unknown task.
            ValueError: `act` returned another shape than [B, A], or NaN.
            LostEpisodesError: three workers died of one episode; the others have been run, but for those that were left
                when a third episode was lost.
            WorkerError: a worker raised an exception.
        """
        self._check(requests)
        if not requests:
            return []
        for number in range(len(self._workers), self._count):
            self._workers.append(Worker(number, _HOST, self._arguments, self._environment))
        try:
            return _Run(self, self._workers, requests, act, progress).results()
        except BaseException:
            # Pending answers would be taken for those of the next call.
            self.close()
            raise

    def _check(self, requests: Sequence[EpisodeRequest]) -> None:
        for request in requests:
            if self._checks_names:
                suite_of(request.task)
            if request.max_steps < 1 or request.record_every < 1:
                raise ValueError(f"max_steps and record_every must be positive: {request}")
            if request.record and not self._render:
                raise ValueError("requests with record=True need EnvPool(render=True)")


class _Queue:
    """Waiting requests, taken from their tasks in turn, or from a given task.

    So each task is run a few episodes at a time, in a few environments, instead of `parallel` for every task. The
    order depends only on the requests and on the given tasks.
    """

    def __init__(self, requests: Sequence[EpisodeRequest]) -> None:
        self._by_task: dict[str, deque[int]] = {}
        for index, request in enumerate(requests):
            self._by_task.setdefault(request.task, deque()).append(index)
        self._turns = deque(self._by_task)

    def take(self, task: str | None) -> int | None:
        """The index of the next request, of `task` if one is left; None if no request is left."""
        if task is not None and self._by_task.get(task):
            return self._by_task[task].popleft()
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            waiting = self._by_task[self._turns[-1]]
            if waiting:
                return waiting.popleft()
        return None


class _Run:
    """One call of `EnvPool.run`."""

    def __init__(
        self,
        pool: EnvPool,
        workers: list[Worker],
        requests: Sequence[EpisodeRequest],
        act: Act,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._pool, self._workers, self._requests = pool, workers, requests
        self._act, self._progress = act, progress
        self._queue = _Queue(requests)
        self._finished: dict[int, EpisodeResult] = {}
        self._lost: dict[int, str] = {}
        self._groups: list[list[_Running]] = [[] for _ in range(_GROUPS)]
        self._by_slot: dict[int, _Running] = {}
        self._next_slot = 0
        self._step_seconds, self._episode_seconds = time_limits()
        self._told = time.monotonic()

    def results(self) -> list[EpisodeResult]:
        """Run to the end."""
        capacity = self._pool.parallel
        sizes = [capacity - capacity // _GROUPS, capacity // _GROUPS]
        # Few requests are spread over both groups, so that neither side idles.
        share = -(-len(self._requests) // _GROUPS)
        for group, size in enumerate(sizes):
            self._send(group, [], self._fill(group, [None] * min(size, share)))
        turn = 0
        while len(self._finished) + len(self._lost) < len(self._requests):
            if self._groups[turn]:
                self._turn(turn)
            turn = (turn + 1) % _GROUPS
        if self._lost:
            raise self._lost_episodes()
        return [self._finished[index] for index in range(len(self._requests))]

    def _turn(self, group: int) -> None:
        """Wait for a group's answers, refill it, let the policy act for it, and send the actions."""
        self._gather(self._groups[group])
        active = [running for running in self._groups[group] if running.slot in self._by_slot]
        # An episode's successor is of its task where possible: its environment is free.
        ended = [running.request.task for running in self._groups[group] if running.slot not in self._by_slot]
        self._groups[group] = list(active)
        starts = self._fill(group, ended)
        if active:
            for running, action in zip(active, self._actions(active), strict=True):
                running.actions.append(action)
                running.waiting = True
        self._send(group, active, starts)

    def _fill(self, group: int, preferred: Sequence[str | None]) -> list[_Running]:
        """Start a waiting request for each preferred task in `group`, with the least busy worker."""
        started = []
        for task in preferred:
            index = self._queue.take(task)
            if index is None:
                break
            load = [sum(running.worker is worker for running in self._groups[group]) for worker in self._workers]
            # Groups begin at opposite ends, so that uneven groups even each other out.
            order = range(len(load)) if group == 0 else range(len(load) - 1, -1, -1)
            worker = self._workers[min(order, key=lambda number: load[number])]
            running = _Running(index, self._requests[index], self._next_slot, worker)
            self._next_slot += 1
            self._by_slot[running.slot] = running
            self._groups[group].append(running)
            started.append(running)
        return started

    def _actions(self, active: list[_Running]) -> FloatArray:
        """The policy's actions f32 [B, A] for the episodes in `active`."""
        observations = np.stack([running.observation for running in active])  # type: ignore[misc]
        indices = np.array([running.index for running in active], np.int64)
        steps = np.array([len(running.actions) for running in active], np.int64)
        rewards = np.array([running.reward for running in active], np.float32)
        actions = np.asarray(self._act(observations, indices, steps, rewards), np.float32)
        if actions.ndim != 2 or len(actions) != len(active):
            raise ValueError(f"act returned actions of shape {actions.shape}, expected ({len(active)}, action_dim)")
        if not np.isfinite(actions).all():
            row = int(np.flatnonzero(~np.isfinite(actions).all(1))[0])
            raise ValueError(f"act returned NaN or Inf for {active[row].request} at step {steps[row]}")
        return actions

    def _send(self, group: int, active: list[_Running], starts: list[_Running]) -> None:
        for worker in self._workers:
            steps = [running for running in active if running.worker is worker]
            begins = [running for running in starts if running.worker is worker]
            if steps or begins:
                worker.call(
                    [running.slot for running in steps + begins],
                    "advance",
                    [(running.slot, running.request) for running in begins],
                    [running.slot for running in steps],
                    np.stack([running.actions[-1] for running in steps]) if steps else None,
                    seconds=self._episode_seconds if begins else self._step_seconds,
                )

    def _gather(self, group: list[_Running]) -> None:
        """Read answers until every episode of `group` has one; answers of the other group are stored as well."""
        while True:
            if time.monotonic() - self._told > 2 * POLL_SECONDS:
                self._tell()
            owing = dict.fromkeys(running.worker for running in group if running.waiting)
            if not owing:
                return
            for worker in answered(owing):
                try:
                    _, outcomes = worker.receive()
                except WorkerDiedError:
                    self._redo(worker)
                    continue
                for outcome in outcomes:
                    self._note(outcome)

    def _note(self, outcome: Outcome) -> None:
        running = self._by_slot.get(outcome.slot)
        if running is None or not running.waiting:
            return  # redone to be ready for its next action; this step's outcome was stored before the death
        running.waiting = False
        running.observation, running.reward = outcome.observation, outcome.reward
        running.episode_return += outcome.reward
        running.success = running.success or outcome.success
        if not outcome.over:
            return
        del self._by_slot[outcome.slot]
        self._finished[running.index] = EpisodeResult(
            request=running.request,
            success=running.success,
            episode_return=running.episode_return,
            length=len(running.actions),
            final_observation=outcome.observation,
            redone=running.redone,
            frames=outcome.frames,
        )
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._progress is not None:
            self._progress(len(self._finished))

    def _redo(self, worker: Worker) -> None:
        """Replace a dead worker and bring its episodes back to where they were."""
        # Calls are worked off in order, so the oldest unanswered one is what the worker died of. Episodes are redone
        # one a call: the second death identifies the culprit.
        suspects: list[Any] = worker.pending[0] if worker.pending else []
        death = worker.replace()
        self._pool.deaths.append(death)
        for running in [running for running in self._by_slot.values() if running.worker is worker]:
            running.redone += 1
            running.deaths += running.slot in suspects
            if running.deaths >= MAX_DEATHS:
                episode = f"the episode of task {running.request.task}, seed {running.request.seed}"
                self._lost[running.index] = f"{MAX_DEATHS} workers died in {episode}; {death}{death.hint}"
                running.waiting = False
                del self._by_slot[running.slot]
                if len(self._lost) >= MAX_DEATHS:  # where all are deadly, each costs three starts of workers
                    raise self._lost_episodes()
                continue
            actions = np.stack(running.actions) if running.actions else None
            worker.call([running.slot], "replay", running.slot, running.request, actions)

    def _lost_episodes(self) -> LostEpisodesError:
        found = [self._finished.get(index) for index in range(len(self._requests))]
        return LostEpisodesError("\n".join(self._lost.values()), found)
