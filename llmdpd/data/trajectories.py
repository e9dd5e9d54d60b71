"""Trajectories: flat arrays with episode offsets, in memory or on the disk, independent of the file format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmdpd.data import columns
from llmdpd.data.columns import StoredColumn
from llmdpd.data.task_names import resolve_task, unknown_task
from llmdpd.errors import InputError, abridged

_ROWS_PER_CHECK = 1 << 16
_PER_EPISODE = ("task_ids", "noise_levels", "successes", "seeds", "success_steps")


class Batch(NamedTuple):
    """Transitions picked by index, as new arrays: `dataset.gather(index)`. B is the number of indices."""

    observations: NDArray[np.float32]  # [B, S]
    actions: NDArray[np.float32]  # [B, A], as executed
    rewards: NDArray[np.float32]  # [B]
    next_observations: NDArray[np.float32]  # [B, S]
    terminals: NDArray[np.float32]  # [B], 1 where the episode truly ended; a time limit is none
    expert_actions: NDArray[np.float32] | None  # [B, A]
    timesteps: NDArray[np.int64]  # [B], step within the episode, from 0


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode of T steps: what a trajectory prompt is made from. The arrays are views into the data set."""

    observations: NDArray[np.float32]  # [T, S]
    actions: NDArray[np.float32]  # [T, A], as executed
    rewards: NDArray[np.float32]  # [T]
    task: str
    seed: int = -1  # of the environment at reset; -1 where unknown
    success: int = -1  # 1, 0, or -1 where unknown
    noise_level: float = float("nan")  # of the collecting policy; NaN where unknown
    behaviour: str = ""  # its behaviour policy (see `TaskSuite.behaviours`); empty where unknown
    success_step: int = -1  # the step, from 0, after which the success flag was first up; -1: none, or unknown

    def __len__(self) -> int:
        return len(self.observations)


@dataclass(frozen=True, eq=False)
class EpisodeRecord:
    """One episode of T steps on its way into a data set (see `TrajectoryDataset.from_episodes`)."""

    observations: ArrayLike  # [T + 1, S], the one after the last action included; [T, S] with next_observations
    actions: ArrayLike  # [T, A]
    rewards: ArrayLike  # [T] or [T, 1]
    task: str
    next_observations: ArrayLike | None = None  # [T, S]; by default the observation of the next step
    terminated: bool = False  # a true terminal at the last step; False for a time limit
    expert_actions: ArrayLike | None = None  # [T, A]
    noise_level: float = float("nan")
    success: int = -1
    seed: int = -1
    behaviour: str = ""
    success_step: int = -1  # the step, from 0, after which the success flag was first up; -1: none, or unknown


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TrajectoryDataset:
    """Trajectories of tasks with common widths: N transitions in E episodes, S state numbers and A action numbers.

    Episode e is the rows `offsets[e]:offsets[e + 1]`; no episode is empty. The arrays are shared, not copied: don't
    write to them. Everything is checked at construction. Of data in shards (`llmdpd.data.shards`) the arrays of numbers
    [N, …] are `StoredColumn`s, of which rows are read when they are indexed.

    Raises:
        InputError: an array of a wrong shape, type or length, NaN or Inf, offsets that don't fit, an empty data set,
            a terminal that is not the last step of its episode.
    """

    observations: NDArray[np.float32]  # [N, S]
    actions: NDArray[np.float32]  # [N, A], as executed
    rewards: NDArray[np.float32]  # [N]
    next_observations: NDArray[np.float32]  # [N, S]
    terminals: NDArray[np.bool_]  # [N], true terminals only: a time limit is none
    offsets: NDArray[np.int64]  # [E + 1]
    task_ids: NDArray[np.int32]  # [E], into `tasks`
    tasks: tuple[str, ...]
    texts: tuple[str, ...]  # the text prompt of each task, "" where unknown
    expert_actions: NDArray[np.float32] | None = None  # [N, A], the expert's clean action in the visited state
    noise_levels: NDArray[np.float32]  # [E], NaN where unknown
    successes: NDArray[np.int8]  # [E], 1, 0, or -1 where unknown
    seeds: NDArray[np.int64]  # [E], -1 where unknown
    success_steps: NDArray[np.int64]  # [E], the step after which success was first up; -1: none, or unknown
    goal_visible: bool | None = None  # whether the observations show the goal; None where unknown or mixed
    source: str  # path or id, for messages
    behaviours: tuple[str, ...] = ()  # [E], the behaviour policy of each episode, "" where unknown; empty: all unknown
    environments: tuple[str, ...] = ()  # of each task, the id under which it was recorded, "" where unknown; or empty
    success_from: str = ""  # the key that success was read from, such as "infos/success"; "" where nothing names it

    @classmethod
    def from_episodes(
        cls, episodes: Iterable[EpisodeRecord], *, texts: Mapping[str, str] | None = None
    ) -> TrajectoryDataset:
        """A data set of episodes in memory, of one task or several, such as a robot's logs.

        Args:
            episodes: in any order; numbers of any real type become float32.
            texts: text prompts by task, as far as there are any.

        Raises:
            InputError: naming the episode and the array that does not fit, or holds NaN or Inf; no episode.
        """
        from llmdpd.data.assemble import join_episodes  # which is built on this module

        return join_episodes(episodes, texts=texts)

    def __post_init__(self) -> None:
        self._check_offsets()
        n, e = self.num_transitions, self.num_episodes
        for name in ("observations", "actions"):
            self._check_array(name, np.float32, (n, None))
        self._check_array("next_observations", np.float32, (n, self.state_dim))
        self._check_array("rewards", np.float32, (n,))
        self._check_array("terminals", np.bool_, (n,))
        if self.expert_actions is not None:
            self._check_array("expert_actions", np.float32, (n, self.action_dim))
        self._check_array("noise_levels", np.float32, (e,), finite=False)
        whole = (("task_ids", np.int32), ("successes", np.int8), ("seeds", np.int64), ("success_steps", np.int64))
        for name, dtype in whole:
            self._check_array(name, dtype, (e,))
        self._check_success_steps()
        if self.behaviours and len(self.behaviours) != e:
            raise self._error("one behaviour an episode", "behaviours", f"{len(self.behaviours)} names", f"{e} or none")
        self._check_tasks()
        if np.count_nonzero(self.terminals) > np.count_nonzero(self.terminals[self.offsets[1:] - 1]):
            inner = self.terminals.copy()
            inner[self.offsets[1:] - 1] = False
            found, expected = f"True at row {np.argmax(inner)}", "True at last steps of episodes only"
            raise self._error("a terminal inside an episode", "terminals", found, expected)

    def _error(self, problem: str, field: str | None, found: object, expected: object) -> InputError:
        return InputError(problem, path=self.source or None, field=field, found=found, expected=expected)

    def _check_offsets(self) -> None:
        offsets = self.offsets
        if not isinstance(offsets, np.ndarray) or offsets.dtype != np.int64 or offsets.ndim != 1:
            raise self._error("wrong episode offsets", "offsets", describe(offsets), "int64 [episodes + 1]")
        if len(offsets) < 2:
            raise self._error("the data set is empty", "offsets", "no episode", "at least one episode")
        lengths = np.diff(offsets)
        if offsets[0] != 0 or lengths.min() < 0:
            raise self._error("wrong episode offsets", "offsets", offsets[:8].tolist(), "increasing from 0")
        if lengths.min() == 0:
            found = f"0 steps in episode {int(np.argmin(lengths))}"
            raise self._error("an episode without steps", "offsets", found, "1 step or more")
        # Rows are counted against the offsets, so the array that all others are compared with comes first.
        if len(self.observations) != offsets[-1]:
            found, expected = f"{len(self.observations)} rows", f"{offsets[-1]} rows as in `offsets`"
            raise self._error("unequal lengths", "observations", found, expected)

    def _check_array(self, name: str, dtype: type, shape: tuple[int | None, ...], *, finite: bool = True) -> None:
        array = getattr(self, name)
        letters = [str(size) if size is not None else "any width" for size in shape]
        expected = f"{np.dtype(dtype).name} [{', '.join(letters)}]"
        stored = isinstance(array, StoredColumn)  # finite since it was written, and its file unchanged
        if not (stored or isinstance(array, np.ndarray)) or array.dtype != dtype or array.ndim != len(shape):
            raise self._error("wrong array", name, describe(array), expected)
        if any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
            raise self._error("wrong shape", name, describe(array), expected)
        if 0 in array.shape:
            raise self._error("an array without numbers", name, describe(array), expected)
        if finite and array.dtype.kind == "f" and not stored:
            check_finite(array, name, self.source or None)

    def _check_success_steps(self) -> None:
        steps = self.success_steps
        wrong = (steps < -1) | (steps >= self.lengths) | ((steps >= 0) & (self.successes != 1))
        if wrong.any():
            e = int(np.argmax(wrong))
            found = f"{steps[e]} in episode {e} of {self.lengths[e]} steps, whose success is {self.successes[e]}"
            expected = "a step of an episode that succeeds, or -1"
            raise self._error("wrong step of success", "success_steps", found, expected)

    def _check_tasks(self) -> None:
        for field in ("tasks", "texts", "environments", "behaviours"):
            for text in set(getattr(self, field)):
                try:
                    text.encode()
                except UnicodeError:
                    raise self._error("text that is no Unicode", field, repr(text)[:80], "Unicode") from None
        if self.environments and len(self.environments) != len(self.tasks):
            found = f"{len(self.environments)} environments"
            raise self._error("one environment a task", "environments", found, f"{len(self.tasks)} or none")
        if len(self.texts) != len(self.tasks):
            raise self._error("one text a task", "texts", f"{len(self.texts)} texts", f"{len(self.tasks)}")
        if len(set(self.tasks)) != len(self.tasks):
            raise self._error("a task listed twice", "tasks", self.tasks, "unique names")
        if self.task_ids.min() < 0 or self.task_ids.max() >= len(self.tasks):
            found = f"{self.task_ids.min()} … {self.task_ids.max()}"
            raise self._error("a task id out of range", "task_ids", found, f"0 … {len(self.tasks) - 1}")
        if not np.isin(self.successes, (-1, 0, 1)).all():
            raise self._error("wrong success flag", "successes", np.unique(self.successes).tolist(), "1, 0 or -1")

    def __repr__(self) -> str:
        return (
            f"<TrajectoryDataset of {abridged(self.tasks, 3)}: {self.num_episodes} episodes, "
            f"{self.num_transitions} transitions, {self.state_dim} state and {self.action_dim} action numbers; "
            f"{self.source or 'no file'}>"
        )

    @property
    def stored(self) -> bool:
        """Whether the arrays of numbers stay on the disk."""
        return isinstance(self.observations, StoredColumn)

    @property
    def num_transitions(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_episodes(self) -> int:
        return len(self.offsets) - 1

    @property
    def state_dim(self) -> int:
        return int(self.observations.shape[1])

    @property
    def action_dim(self) -> int:
        return int(self.actions.shape[1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each episode, [E]."""
        return np.diff(self.offsets)

    def episode_ids(self, index: ArrayLike) -> NDArray[np.int64]:
        """The episode of each transition in `index` [B]. Raises IndexError outside 0 … N - 1."""
        rows = self._rows(index)
        return np.searchsorted(self.offsets, rows, side="right").astype(np.int64) - 1

    def gather(self, index: ArrayLike) -> Batch:
        """The transitions of `index` [B], as new arrays. Raises IndexError outside 0 … N - 1."""
        rows = self._rows(index)
        episodes = np.searchsorted(self.offsets, rows, side="right") - 1
        return Batch(
            **columns.take(self.numbers(), rows, episodes),
            terminals=self.terminals[rows].astype(np.float32),
            timesteps=rows - self.offsets[episodes],
        )

    def numbers(self) -> dict[str, Any]:
        """The arrays of numbers [N, …] by name."""
        return {name: getattr(self, name) for name in columns.STORED}

    def windows(self, index: ArrayLike, horizon: int, before: int = 0) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The rows [B, before + H] of the steps before each transition of `index` [B], and of H from it on.

        Outside the episode its first or last row is repeated; the mask [B, before + H] is False there. Raises
        IndexError outside 0 … N - 1.
        """
        rows = self._rows(index)
        episodes = self.episode_ids(rows)
        first, last = self.offsets[episodes][:, None], self.offsets[episodes + 1][:, None] - 1
        wanted = rows[:, None] + np.arange(-before, horizon)
        return wanted.clip(first, last), (first <= wanted) & (wanted <= last)

    def _rows(self, index: ArrayLike) -> NDArray[np.int64]:
        # Negative indices are refused: an array would take them, the search for their episode would not.
        rows = np.asarray(index)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise IndexError(f"transition indices must be whole numbers [B], not {describe(rows)}")
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_transitions):
            raise IndexError(f"transition index outside 0 … {self.num_transitions - 1}")
        return rows.astype(np.int64, copy=False)

    def episode(self, e: int) -> Trajectory:
        """Episode `e` as views, of data on the disk as new arrays. Raises IndexError outside 0 … E - 1."""
        if not 0 <= e < self.num_episodes:
            raise IndexError(f"episode {e} outside 0 … {self.num_episodes - 1}")
        rows: Any = slice(int(self.offsets[e]), int(self.offsets[e + 1]))
        parts = {name: getattr(self, name) for name in ("observations", "actions", "rewards")}
        if self.stored:
            rows = np.arange(rows.start, rows.stop)
            parts = columns.read(parts, rows, np.full(len(rows), e))
        else:
            parts = {name: part[rows] for name, part in parts.items()}
        return Trajectory(
            **parts,
            task=self.tasks[self.task_ids[e]],
            seed=int(self.seeds[e]),
            success=int(self.successes[e]),
            noise_level=float(self.noise_levels[e]),
            behaviour=self.behaviours[e] if self.behaviours else "",
            success_step=int(self.success_steps[e]),
        )

    def returns(self) -> NDArray[np.float32]:
        """The undiscounted return of each episode, [E]; summed in float64."""
        return self._returns

    @cached_property
    def _returns(self) -> NDArray[np.float32]:
        sums = np.empty(self.num_episodes, np.float32)
        for first, last in columns.episode_blocks(self.offsets):
            start, end = int(self.offsets[first]), int(self.offsets[last])
            rewards = self.rewards[start:end].astype(np.float64)
            sums[first:last] = np.add.reduceat(rewards, self.offsets[first:last] - start)
        return sums

    def target_returns(self, share: float = 0.1) -> dict[str, float]:
        """Task → mean return of the best `share` of its episodes, the target return of history-conditioned policies.

        The best are those with the highest returns; where success is recorded, the shortest successful ones: episodes
        last until they succeed, so that the highest returns are those of the slowest.
        """
        returns, lengths = self.returns().astype(np.float64), self.lengths
        best = {}
        for task in self.tasks:
            own = self.episodes_of(task)
            done = own[self.successes[own] == 1]
            ranked = done[np.argsort(lengths[done], kind="stable")] if len(done) else own[np.argsort(-returns[own])]
            best[task] = float(returns[ranked[: math.ceil(share * len(ranked))]].mean())
        return best

    def returns_to_go(self) -> NDArray[np.float32]:
        """The undiscounted sum of rewards from each transition to the end of its episode, [N]; summed in float64."""
        left, carried, lengths = np.empty(self.num_transitions, np.float32), np.zeros(1), self.lengths
        for first, last in columns.episode_blocks(self.offsets):
            start, end = int(self.offsets[first]), int(self.offsets[last])
            rewards = self.rewards[start:end]
            summed = np.cumsum(np.concatenate([carried, rewards]))[1:]
            ends = summed[self.offsets[first + 1 : last + 1] - start - 1]
            left[start:end] = np.repeat(ends, lengths[first:last]) - (summed - rewards)
            carried = summed[-1:]
        return left

    def task_index(self, task: str) -> int:
        """Position of `task` in `tasks`. Raises InputError with the nearest names where it is not there."""
        if task not in self._places:
            raise unknown_task(task, self.tasks, self.source or None)
        return self._places[task]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {task: place for place, task in enumerate(self.tasks)}

    def episodes_of(self, task: str) -> NDArray[np.int64]:
        """Episodes of `task`, ascending. Raises InputError where the task is not in `tasks`."""
        return self._by_task[self.task_index(task)]

    @cached_property
    def _by_task(self) -> list[NDArray[np.int64]]:
        """The episodes of each task: of 100,000 tasks, all looked for one by one take hours."""
        ordered = np.argsort(self.task_ids, kind="stable").astype(np.int64)
        counts = np.bincount(self.task_ids, minlength=len(self.tasks))
        return np.split(ordered, np.cumsum(counts)[:-1])

    def transitions_of(self, task: str) -> NDArray[np.int64]:
        """Transitions of `task`, ascending. Raises InputError where the task is not in `tasks`."""
        return self._transitions(self.episodes_of(task))

    def _transitions(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths = self.offsets[episodes + 1] - self.offsets[episodes]
        ends = np.cumsum(lengths)
        shift = self.offsets[episodes] - (ends - lengths)
        return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(shift, lengths)

    def select(self, episodes: ArrayLike) -> TrajectoryDataset:
        """These episodes (indices or a mask [E]) in the given order, with their metadata; `tasks` is unchanged.

        Neighbouring episodes in ascending order stay views. Raises InputError where nothing is selected, IndexError
        outside 0 … E - 1.
        """
        chosen = np.asarray(episodes)
        if chosen.dtype == np.bool_:
            if chosen.shape != (self.num_episodes,):
                raise IndexError(f"a mask of episodes must have shape ({self.num_episodes},), not {chosen.shape}")
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64).reshape(-1)
        if chosen.size == 0:
            raise self._error("no episode selected", None, "0 episodes", "at least one")
        if chosen.min() < 0 or chosen.max() >= self.num_episodes:
            raise IndexError(f"episode outside 0 … {self.num_episodes - 1}")
        return self._selected(chosen, {})

    def _selected(self, chosen: NDArray[np.int64], changes: dict[str, Any]) -> TrajectoryDataset:
        """These episodes, with changes to what they are of."""
        ends = self.offsets[chosen + 1]
        offsets = offsets_of(ends - self.offsets[chosen])
        terminals = np.zeros(offsets[-1], np.bool_)
        terminals[offsets[1:] - 1] = self.terminals[ends - 1]
        parts = {name: getattr(self, name)[chosen] for name in _PER_EPISODE} | self._numbers_of(chosen)
        parts["behaviours"] = tuple(self.behaviours[e] for e in chosen) if self.behaviours else ()
        return dataclasses.replace(self, offsets=offsets, terminals=terminals, **{**parts, **changes})

    def _numbers_of(self, chosen: NDArray[np.int64]) -> dict[str, Any]:
        """The arrays of numbers of these episodes."""
        if isinstance(self.observations, StoredColumn):
            return columns.selected(self.numbers(), self.observations.selection.select(chosen))
        rows: slice | NDArray[np.int64]
        if (np.diff(chosen) == 1).all():
            rows = slice(int(self.offsets[chosen[0]]), int(self.offsets[chosen[-1] + 1]))
        else:
            rows = self._transitions(chosen)
        return {name: a if a is None else a[rows] for name, a in self.numbers().items()}

    def select_tasks(self, names: Sequence[str]) -> TrajectoryDataset:
        """Only these tasks, in this order. A name without version, or of another one, matches the task of that name.

        Raises InputError where a name is unknown (with the nearest ones), or where a task has no episode.
        """
        path = self.source or None
        found = [name if name in self._places else resolve_task(name, self.tasks, path) for name in names]
        tasks = tuple(dict.fromkeys(found))
        if not tasks:
            raise self._error("no task requested", "tasks", "none", f"some of {', '.join(self.tasks)}")
        empty = [task for task in tasks if not self.episodes_of(task).size]
        if empty:
            raise self._error("a task without episodes", "tasks", ", ".join(empty), "at least one episode each")
        places = [self._places[task] for task in tasks]
        chosen = np.concatenate([self._by_task[place] for place in places])
        ids, order = np.repeat(np.arange(len(tasks)), [len(self._by_task[place]) for place in places]), chosen.argsort()
        changes: dict[str, Any] = {"tasks": tasks, "task_ids": ids[order].astype(np.int32)}
        changes["texts"] = tuple(self.texts[place] for place in places)
        changes["environments"] = tuple(self.environments[place] for place in places) if self.environments else ()
        return self._selected(chosen[order], changes)

    def with_actions(
        self, change: Callable[[NDArray[np.float32]], NDArray[np.float32]], label: str
    ) -> TrajectoryDataset:
        """The same data with changed actions, [N, A] → [N, A], the executed and the expert's alike.

        Each row is changed by itself, of data on the disk as it is read; `label` tells the change from others.
        """
        if isinstance(self.actions, StoredColumn):
            lazily = columns.Change(lambda rows, _: change(rows), label)
            changed = {name: a and a.changed(lazily) for name, a in self.numbers().items() if "actions" in name}
            return dataclasses.replace(self, **changed)
        expert = None if self.expert_actions is None else change(self.expert_actions)
        actions = change(self.actions)
        if actions is self.actions and expert is self.expert_actions:
            return self
        return dataclasses.replace(self, actions=actions, expert_actions=expert)

    def with_remembered(self, indices: Sequence[int]) -> TrajectoryDataset:
        """The same data with these numbers of the observation one step before appended to each observation.

        At an episode's first step they are that step's own.
        """
        if not indices:
            return self
        if self.stored:
            pair = {name: getattr(self, name).remembering(indices) for name in ("observations", "next_observations")}
            return dataclasses.replace(self, **pair)
        chosen = list(indices)
        before = np.concatenate([self.observations[:1], self.observations[:-1]])[:, chosen]
        before[self.offsets[:-1]] = self.observations[self.offsets[:-1]][:, chosen]
        return dataclasses.replace(
            self,
            observations=np.concatenate([self.observations, before], axis=1),
            next_observations=np.concatenate([self.next_observations, self.observations[:, chosen]], axis=1),
        )

    def check_matches(self, state_dim: int, action_dim: int, name: str) -> None:
        """Raise InputError unless the widths are those of the environment (or policy) called `name`."""
        problem = f"the data set does not match {name}"
        widths = (("observations", self.state_dim, state_dim), ("actions", self.action_dim, action_dim))
        for field, have, want in widths:
            if have != want:
                raise self._error(problem, field, f"{have} numbers a step", f"{want} numbers a step")


def check_finite(array: NDArray[Any], field: str, path: str | None) -> None:
    """Raise InputError naming the first row of `array` [N, ...] that holds NaN or Inf. Needs no N-long copy."""
    for start in range(0, len(array), _ROWS_PER_CHECK):
        good = np.isfinite(array[start : start + _ROWS_PER_CHECK])
        if not good.all():
            place = np.argwhere(~good)[0]
            place[0] += start
            found = f"{array[tuple(place)]} at {place.tolist()}"
            raise InputError("NaN or Inf in the data", path=path, field=field, found=found, expected="finite numbers")


def offsets_of(lengths: ArrayLike) -> NDArray[np.int64]:
    """The offsets [E + 1] of episodes of `lengths` [E]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def describe(value: object) -> str:
    """The type and shape of an array, the type of anything else."""
    if isinstance(value, (np.ndarray, StoredColumn)):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
