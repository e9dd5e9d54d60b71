"""The prompts of an evaluation: a text and one example trajectory a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmdpd.data import Trajectory, TrajectoryDataset, load_dataset, save_minari
from llmdpd.errors import InputError
from llmdpd.files import atomic_write_json
from llmdpd.prompts import TextPrompt, metaworld_prompt
from llmdpd.runs.folder import RunFolder


@dataclass(frozen=True)
class TaskPrompt:
    """What the policy is told of a task; where each part came from stands beside it."""

    text: str
    text_source: str
    example: Trajectory | None
    example_source: str


def choose_example(dataset: TrajectoryDataset, task: str) -> int:
    """The episode that is the task's example: of those that did not fail the least noisy, the first of them.

    Raises:
        InputError: the task is not in the data, or every episode failed.
    """
    episodes = dataset.episodes_of(task)
    good = episodes[dataset.successes[episodes] != 0]
    if not len(good):
        raise InputError(
            "no episode of the task can serve as an example: all failed",
            path=dataset.source,
            field=task,
            found=f"0 of {len(episodes)} episodes succeeded",
            expected="at least 1",
        )
    noise = np.nan_to_num(dataset.noise_levels[good], nan=0.0)
    return int(good[np.argmin(noise)])


def read_text(path: Path) -> str:
    """A text prompt from a file: a structured one is rendered anew, any other text is taken as it is."""
    return TextPrompt.from_file(path).render()


def task_prompts(
    tasks: Sequence[str], data: str | Path | None, text: str | None = None, text_source: str = "built in"
) -> dict[str, TaskPrompt]:
    """Each task's prompts: examples from `data` (None: no examples), the built-in texts or one given for all."""
    dataset = None if data is None else load_dataset(data, tasks=tasks)
    return {
        task: TaskPrompt(
            metaworld_prompt(task).render() if text is None else text,
            text_source,
            None if dataset is None else dataset.episode(choose_example(dataset, task)),
            "none" if dataset is None else dataset.source,
        )
        for task in tasks
    }


def keep_prompts(run: RunFolder, dataset: TrajectoryDataset, tasks: Sequence[str]) -> None:
    """Put an evaluation's examples into the run, so that it can be repeated without the data that they came from."""
    chosen = [choose_example(dataset, task) for task in tasks]
    described = {}
    for task, episode in zip(tasks, chosen, strict=True):
        prompt = TaskPrompt(metaworld_prompt(task).render(), "built in", dataset.episode(episode), dataset.source)
        described[task] = describe(prompt)
    save_minari(dataset.select(chosen), run.prompts)
    atomic_write_json(run.path / "prompts.json", described)


def describe(prompt: TaskPrompt) -> dict[str, Any]:
    """A prompt as the report shows it."""
    example = prompt.example
    trajectory = None
    if example is not None:
        trajectory = {"source": prompt.example_source, "seed": example.seed, "steps": len(example)}
    return {"text": prompt.text, "text_source": prompt.text_source, "trajectory": trajectory}
