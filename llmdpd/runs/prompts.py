"""The prompts of an evaluation: a text and one example trajectory a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmdpd.data import Trajectory, TrajectoryDataset, save_minari
from llmdpd.envs import COLLECTION_SEED_END
from llmdpd.errors import InputError
from llmdpd.files import atomic_write_json
from llmdpd.prompts import TextPrompt, metaworld_prompt
from llmdpd.runs.data import load_tasks
from llmdpd.runs.folder import RunFolder


@dataclass(frozen=True)
class TaskPrompt:
    """What the policy is told of a task; where each part came from stands beside it."""

    text: str
    text_source: str
    example: Trajectory | None
    example_source: str


def choose_example(dataset: TrajectoryDataset, task: str) -> int:
    """The episode that is the task's example, never one whose seed is evaluated.

    Of those known to have succeeded the least noisy, the first of them. Where success is not recorded, of the least
    noisy the one of highest return: a replay buffer begins with the worst.

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
        return int(succeeded[np.argmin(noise[succeeded])])
    return int(good[np.lexsort((-dataset.returns()[good], noise[good]))[0]])


def read_text(path: Path) -> str:
    """A text prompt from a file: a structured one is rendered anew, any other text is taken as it is."""
    return TextPrompt.from_file(path).render()


def task_prompts(
    tasks: Sequence[str],
    data: str | Path | None,
    goal_visible: bool,
    text: str | None = None,
    text_source: str = "built in",
) -> dict[str, TaskPrompt]:
    """Each task's prompts: examples from `data` (None: no examples), the built-in texts or one given for all."""
    dataset = None if data is None else load_tasks(data, tasks, goal_visible)
    return {
        task: TaskPrompt(
            metaworld_prompt(task).render() if text is None else text,
            text_source,
            None if dataset is None else dataset.episode(choose_example(dataset, task)),
            "none" if data is None else str(data),
        )
        for task in tasks
    }


def keep_prompts(
    run: RunFolder, examples: TrajectoryDataset | None, tasks: Sequence[str], goal_visible: bool
) -> dict[str, TaskPrompt]:
    """Put an evaluation's prompts into the run, so that it can be repeated without the data that they came from.

    Returns them as they are read back from the run. `examples` is None where trajectory prompts are off.
    """
    if examples is not None:
        save_minari(examples.select([choose_example(examples, task) for task in tasks]), run.prompts)
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
