"""The prompts of an evaluation: a text and an example trajectory a task, its own, another task's, or one alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmdpd.data import Trajectory, TrajectoryDataset, save_minari
from llmdpd.data.task_data import load_tasks
from llmdpd.errors import InputError
from llmdpd.prompts import TextPrompt, task_prompt
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks import COLLECTION_SEED_END
from llmdpd.utils.files import atomic_write_json


@dataclass(frozen=True)
class TaskPrompt:
    """What the policy is told of a task; where each part came from stands beside it.

    Of several examples, each episode of an evaluation is under one, in turn. No text, or no examples: told without.
    """

    text: str | None
    text_source: str
    examples: tuple[Trajectory, ...]
    example_source: str

    @property
    def example(self) -> Trajectory | None:
        """The first of the examples, or the only one."""
        return self.examples[0] if self.examples else None


def choose_example(dataset: TrajectoryDataset, task: str) -> int:
    """The episode that is the task's example: the first of `choose_examples`."""
    return choose_examples(dataset, task, 1)[0]


def choose_examples(dataset: TrajectoryDataset, task: str, count: int) -> list[int]:
    """The episodes that are the task's examples, never one whose seed is evaluated: `count`, or as many as there are.

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
            "no episode of the task can serve as an example",
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


def read_text(path: Path) -> str:
    """A text prompt from a file: a structured one is rendered anew, any other text is taken as it is."""
    return TextPrompt.from_file(path).render()


def task_prompts(
    tasks: Sequence[str],
    data: str | Path | None,
    goal_visible: bool,
    text: str | None = None,
    text_source: str = "built in",
    count: int = 1,
) -> dict[str, TaskPrompt]:
    """Each task's prompts: `count` examples from `data` (None: none), the built-in texts or one given for all.

    Raises:
        InputError: data with fewer examples; and as `load_tasks` and `choose_examples`.
    """
    examples: dict[str, tuple[Trajectory, ...]] = dict.fromkeys(tasks, ())
    if data is not None:
        dataset = load_tasks(data, tasks, goal_visible)
        for task in tasks:
            chosen = choose_examples(dataset, task, count)
            if len(chosen) < count:
                raise InputError(
                    "not as many examples of a task",
                    path=dataset.source,
                    field=task,
                    found=f"{len(chosen)} that can serve",
                    expected=f"--examples {count}",
                    hint="ask for fewer, or for --prompt-behaviours, which collects them",
                )
            examples[task] = tuple(dataset.episode(episode) for episode in chosen)
    source = "none" if data is None else str(data) if count == 1 else f"{count} examples from {data}"
    return {task: TaskPrompt(_text(task, text), text_source, examples[task], source) for task in tasks}


def behaviour_prompts(
    tasks: Sequence[str],
    behaviour: str,
    dataset: TrajectoryDataset,
    count: int,
    text: str | None = None,
    text_source: str = "built in",
) -> dict[str, TaskPrompt]:
    """Each task's prompts with examples by one behaviour: the first `count` of `dataset` that succeeded, mild or not.

    A task with fewer has fewer, and its prompt's source tells how many.

    Raises:
        InputError: a task of which none succeeded.
    """
    # A behaviour is measured as it comes, not by the mildest of its episodes.
    level = dataclasses.replace(dataset, noise_levels=np.zeros_like(dataset.noise_levels))
    prompts = {}
    for task in tasks:
        examples = tuple(dataset.episode(episode) for episode in choose_examples(level, task, count))
        source = f"{behaviour}: {len(examples)} example{'s' * (len(examples) > 1)} from {dataset.source}"
        prompts[task] = TaskPrompt(_text(task, text), text_source, examples, source)
    return prompts


def swap_prompts(prompts: Mapping[str, TaskPrompt], seen: Sequence[str]) -> dict[str, TaskPrompt]:
    """Each task under another one's prompts: a policy that succeeds all the same has not read them.

    Seen tasks get those of seen ones, unseen those of unseen ones: of the split's tasks in alphabetical order, the one
    half the list further on, so that neighbours of like name (door-lock, door-unlock) don't meet.

    Raises:
        InputError: a task that is alone in its split.
    """
    others = swap_names(list(prompts), seen)
    return {
        task: dataclasses.replace(
            prompts[others[task]],
            text_source=f"swapped ({others[task]}'s): {prompts[others[task]].text_source}",
            example_source=f"swapped ({others[task]}'s): {prompts[others[task]].example_source}",
        )
        for task in prompts
    }


def swap_names(tasks: Sequence[str], seen: Sequence[str]) -> dict[str, str]:
    """Whose prompts each task is under in `swap_prompts`.

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
        others |= {name: names[(n + len(names) // 2) % len(names)] for n, name in enumerate(names)}
    return others


def _text(task: str, text: str | None) -> str:
    return task_prompt(task).render() if text is None else text


def keep_prompts(
    run: RunFolder, examples: TrajectoryDataset | None, tasks: Sequence[str], goal_visible: bool
) -> dict[str, TaskPrompt]:
    """Put an evaluation's prompts into the run, so that it can be repeated without the data that they came from.

    Returns them as they are read back from the run. `examples` is None where trajectory prompts are off.
    """
    if examples is not None:
        chosen = examples.select([choose_example(examples, task) for task in tasks])
        save_minari(chosen, run.prompts, namespace="prompts", name="example-v0")
    prompts = task_prompts(tasks, None if examples is None else run.prompts, goal_visible)
    origin = "none" if examples is None else examples.source
    told = {task: describe(dataclasses.replace(p, example_source=origin)) for task, p in prompts.items()}
    atomic_write_json(run.path / "prompts.json", told)
    return prompts


def describe(prompt: TaskPrompt) -> dict[str, Any]:
    """A prompt as the report shows it."""
    example = prompt.example
    trajectory = None
    if example is not None:
        trajectory = {"source": prompt.example_source, "seed": example.seed, "steps": len(example)}
    return {"text": prompt.text, "text_source": prompt.text_source, "trajectory": trajectory}
