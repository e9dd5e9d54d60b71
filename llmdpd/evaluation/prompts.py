"""The prompts of an evaluation: for each task a text and demonstrations, its own or another task's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmdpd.data import Trajectory, TrajectoryDataset
from llmdpd.data.task_data import load_tasks
from llmdpd.errors import InputError
from llmdpd.prompts import task_prompt
from llmdpd.tasks import COLLECTION_SEED_END
from llmdpd.tasks.specs import shown_by, shown_tasks, suite_of

OWN_DATA = "the tasks' own data"
"""Where demonstrations are from that lie where the tasks' suite says."""


@dataclass(frozen=True)
class TaskPrompt:
    """What the policy is prompted with for a task, and where each part came from.

    Of several demonstrations, each episode of an evaluation takes one, in turn, or where they are one prompt `together`
    all of them. No text (None) or no demonstrations: the policy is prompted without.
    """

    text: str | None
    text_source: str
    demonstrations: tuple[Trajectory, ...]
    demonstration_source: str
    together: bool = False

    @property
    def trajectories(self) -> list[Trajectory | list[Trajectory] | None]:
        """The trajectory prompts that an evaluation's episodes take in turn."""
        if self.together and self.demonstrations:
            return [list(self.demonstrations)]
        return [*self.demonstrations] or [None]

    @property
    def demonstration(self) -> Trajectory | None:
        """The first of the demonstrations, if there is one."""
        return self.demonstrations[0] if self.demonstrations else None


def choose_demonstrations(dataset: TrajectoryDataset, task: str, count: int = 1) -> list[int]:
    """Up to `count` episodes that serve as the task's demonstrations, never one whose seed is evaluated.

    Of those known to have succeeded the least noisy, the first of them. Where success is not recorded, of the least
    noisy those of highest return: a replay buffer begins with the worst.

    Raises:
        InputError: the task is not in the data, every episode failed, or all have seeds of evaluation.
    """
    episodes = dataset.episodes_of(task)
    free = episodes[dataset.seeds[episodes] < COLLECTION_SEED_END]
    good = free[dataset.successes[free] != 0]
    if not len(good):
        raise InputError(
            "no episode of the task can serve as a demonstration",
            path=dataset.source,
            field=task,
            found=f"{len(free)} of {len(episodes)} episodes on seeds that are not evaluated, all of them failed",
            expected="at least 1 that succeeded",
        )
    succeeded = good[dataset.successes[good] == 1]
    noise = np.nan_to_num(dataset.noise_levels, nan=0.0)
    if len(succeeded):
        ranked = succeeded[np.argsort(noise[succeeded], kind="stable")]
    else:
        ranked = good[np.lexsort((-dataset.returns()[good], noise[good]))]
    return [int(episode) for episode in ranked[:count]]


def task_prompts(
    tasks: Sequence[str],
    data: str | Path | None,
    goal_visible: bool,
    text: str | None = None,
    text_source: str | None = None,
    count: int = 1,
    *,
    stored: bool = False,
) -> dict[str, TaskPrompt]:
    """Each task's prompts: `count` demonstrations from `data`, the built-in texts or one given for all.

    The demonstrations are of the task that shows it (`TaskSuite.shown_by`). `data` is a data set as `load_tasks` takes
    it, `OWN_DATA`, or None: no demonstrations; `stored`, where a run has put it there.

    Raises:
        InputError: data with fewer demonstrations; and as `load_tasks` and `choose_demonstrations`.
    """
    demonstrations: dict[str, tuple[Trajectory, ...]] = dict.fromkeys(tasks, ())
    if data is not None:
        dataset = load_tasks(None if data == OWN_DATA else data, shown_tasks(tasks), goal_visible, stored=stored)
        for task in tasks:
            chosen = choose_demonstrations(dataset, shown_by(task), count)
            if len(chosen) < count:
                raise InputError(
                    "not as many demonstrations of a task",
                    path=dataset.source,
                    field=task,
                    found=f"{len(chosen)} that can serve",
                    expected=f"--demonstrations {count}",
                    hint="ask for fewer, or name data that have more, by --prompt-data",
                )
            demonstrations[task] = tuple(dataset.episode(episode) for episode in chosen)
    source = "none" if data is None else str(data) if count == 1 else f"{count} demonstrations from {data}"
    return {task: TaskPrompt(*_text(task, text, text_source), demonstrations[task], source) for task in tasks}


def behaviour_prompts(
    tasks: Sequence[str],
    behaviour: str,
    dataset: TrajectoryDataset,
    count: int,
    text: str | None = None,
    text_source: str | None = None,
) -> dict[str, TaskPrompt]:
    """Each task's prompts with demonstrations by one behaviour policy: the first `count` of `dataset` that succeeded.

    They are of the task that shows it (`TaskSuite.shown_by`). A task with fewer successes has fewer demonstrations, and
    its prompt's source says how many.

    Raises:
        InputError: a task of which none succeeded.
    """
    # A behaviour is measured as it comes, not by the least noisy of its episodes.
    level = dataclasses.replace(dataset, noise_levels=np.zeros_like(dataset.noise_levels))
    prompts = {}
    for task in tasks:
        chosen = tuple(dataset.episode(episode) for episode in choose_demonstrations(level, shown_by(task), count))
        source = f"{behaviour}: {len(chosen)} demonstration{'s' * (len(chosen) > 1)} from {dataset.source}"
        prompts[task] = TaskPrompt(*_text(task, text, text_source), chosen, source)
    return prompts


def as_one_prompt(prompts: Mapping[str, TaskPrompt]) -> dict[str, TaskPrompt]:
    """Each task's demonstrations as one prompt together."""
    return {
        task: dataclasses.replace(
            prompt, together=True, demonstration_source=f"{prompt.demonstration_source}, as one prompt"
        )
        for task, prompt in prompts.items()
    }


def swap_prompts(prompts: Mapping[str, TaskPrompt], seen: Sequence[str]) -> dict[str, TaskPrompt]:
    """Each task with another one's prompts: a policy that succeeds all the same has not read them.

    Raises:
        InputError: as `swap_names`.
    """
    others, swapped = swap_names(list(prompts), seen), {}
    for task in prompts:
        other, words = prompts[others[task]], f"swapped ({others[task]}'s):"
        texts, shown = f"{words} {other.text_source}", f"{words} {other.demonstration_source}"
        swapped[task] = dataclasses.replace(other, text_source=texts, demonstration_source=shown)
    return swapped


def swap_names(tasks: Sequence[str], seen: Sequence[str]) -> dict[str, str]:
    """Whose prompts each task gets in `swap_prompts`.

    Seen tasks get those of seen ones, unseen tasks those of unseen ones: in alphabetical order the one half the list
    further on, so that neighbours with similar names (door-lock, door-unlock) do not meet. Where tasks share their
    demonstrations, it is the next such place at which no task meets one that shares its own, if there is one.

    Raises:
        InputError: a task that is alone in its split.
    """
    others: dict[str, str] = {}
    for split in (True, False):
        names = sorted(task for task in tasks if (task in seen) is split)
        if len(names) == 1:
            raise InputError(
                "no other task to swap prompts with",
                field="--prompts swapped",
                found=f"{names[0]} alone among the {'seen' if split else 'unseen'} tasks to evaluate",
                expected="two or more tasks of a split, or none",
                hint="name them with --tasks",
            )
        further = _further(names)
        others |= {name: names[(n + further) % len(names)] for n, name in enumerate(names)}
    return others


def _further(names: Sequence[str]) -> int:
    """How far down the sorted list each task's other one is; see `swap_names`."""
    half, count = len(names) // 2, len(names)
    shown = [shown_by(name) for name in names]
    places = [(half + extra) % count for extra in range(count)]
    apart = (place for place in places if all(shown[n] != shown[(n + place) % count] for n in range(count)))
    return next(apart, half)


def other_texts(prompts: Mapping[str, TaskPrompt]) -> dict[str, TaskPrompt]:
    """Each task with its own demonstrations under the text of a task that shares them.

    A policy that does what the task asks for all the same has not read the text.

    Raises:
        InputError: as `other_text_names`.
    """
    changed = {}
    for task, other in other_text_names(list(prompts)).items():
        text, source = _text(other, None, None)
        words = f"other text ({other}'s): {source}"
        changed[task] = dataclasses.replace(prompts[task], text=text, text_source=words)
    return changed


def other_text_names(tasks: Sequence[str]) -> dict[str, str]:
    """Whose text each task gets in `other_texts`: the next of its suite's tasks that share its demonstrations.

    Raises:
        InputError: a task that shares its demonstrations with none.
    """
    others = {}
    for task in tasks:
        suite, shown = suite_of(task), shown_by(task)
        alike = [name for name in suite.tasks if suite.shown_by(name) == shown]
        if len(alike) < 2 or task not in alike:
            raise InputError(
                "no other task shares this one's demonstrations",
                field="--prompts other-text",
                found=task,
                expected="tasks that their texts alone tell apart, such as those of --protocol text",
                hint="--prompts swapped takes another task's text and demonstration",
            )
        others[task] = alike[(alike.index(task) + 1) % len(alike)]
    return others


def _text(task: str, text: str | None, source: str | None) -> tuple[str, str]:
    """The text that was given for every task, else the task's own; and where it is from."""
    if text is None:
        return task_prompt(task).render(), suite_of(task).text_source(task)
    return text, source or "given"
