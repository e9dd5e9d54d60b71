"""Which prompts an evaluation uses: from which data, by which demonstrator, and of which task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llmdpd.config.schema import TrainConfig
from llmdpd.data import TrajectoryDataset, save_minari
from llmdpd.errors import InputError
from llmdpd.evaluation.prompts import (
    OWN_DATA,
    TaskPrompt,
    as_one_prompt,
    behaviour_prompts,
    choose_demonstrations,
    other_texts,
    swap_prompts,
    task_prompts,
)
from llmdpd.prompts import TextPrompt
from llmdpd.runs.data import behaviour_demonstrations
from llmdpd.runs.evaluate_options import EvaluateConfig
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks.specs import shown_by, shown_tasks, suite_of
from llmdpd.utils.files import atomic_write_json
from llmdpd.utils.progress import console

_SEVERAL_DEMONSTRATIONS = 5


def prompt_sets(
    config: EvaluateConfig, run: RunFolder | None, trained: TrainConfig, check: Callable[[], None] = lambda: None
) -> list[dict[str, TaskPrompt]]:
    """The prompts of every task to evaluate: one set a behaviour, or one alone; the options were checked before.

    `check` is called as demonstrations are collected and may raise to stop.

    Raises:
        InputError: a task without a demonstration.
    """
    tasks, seen = config.tasks_of(trained), trained.tasks.seen
    text = None if config.prompt_text is None else TextPrompt.from_file(config.prompt_text).render()
    source = None if config.prompt_text is None else str(config.prompt_text)
    if not config.prompt_behaviours:
        data = _data(config, run, trained)
        count = config.demonstrations or (_SEVERAL_DEMONSTRATIONS if config.together else 1)
        stored = run is not None and data == run.prompts
        prompts = task_prompts(tasks, data, trained.tasks.goal_visible, text, source, count, stored=stored)
        return [_changed(as_one_prompt(prompts) if config.together else prompts, config.prompts, seen)]
    sets = []
    root = os.path.abspath(config.data_root or trained.data.root)
    collected = dataclasses.replace(trained.data, root=root, workers=config.workers)
    count = config.demonstrations or _SEVERAL_DEMONSTRATIONS
    for behaviour in dict.fromkeys(config.prompt_behaviours):
        dataset = behaviour_demonstrations(collected, trained.tasks, shown_tasks(tasks), behaviour, count, check)
        prompts = behaviour_prompts(tasks, behaviour, dataset, count, text, source)
        for task, prompt in prompts.items():
            found = len(prompt.demonstrations)
            if found < count:
                console.print(f"{task}, {behaviour}: {found} demonstrations succeeded, not {count}")
        sets.append(_changed(as_one_prompt(prompts) if config.together else prompts, config.prompts, seen))
    return sets


def _changed(prompts: dict[str, TaskPrompt], which: str, seen: tuple[str, ...]) -> dict[str, TaskPrompt]:
    if which == "swapped":
        return swap_prompts(prompts, seen)
    if which == "other-text":
        return other_texts(prompts)
    if which == "no-trajectory":
        return {task: dataclasses.replace(prompt, demonstrations=()) for task, prompt in prompts.items()}
    if which == "no-text":
        return {task: dataclasses.replace(prompt, text=None) for task, prompt in prompts.items()}
    return prompts


def _data(config: EvaluateConfig, run: RunFolder | None, trained: TrainConfig) -> str | Path | None:
    """Where the demonstrations are, None where the policy takes none; `OWN_DATA` for the tasks' own data."""
    if not (trained.method.network.context_config().trajectory or config.baseline):
        return None
    if config.prompt_data is not None:
        return config.prompt_data
    if config.tasks_file is not None or run is None:
        return OWN_DATA
    known = shown_tasks(trained.tasks.all) if run.prompts.exists() else ()
    foreign = [task for task in config.tasks_of(trained) if shown_by(task) not in known]
    if foreign:
        found = ", ".join(foreign)
        hint = "name a data set that has one with --prompt-data, or collect some with --prompt-behaviours clean"
        raise InputError(
            "the run has no demonstration of this task", path=run.prompts, field="--tasks", found=found, hint=hint
        )
    return run.prompts


def keep_prompts(
    run: RunFolder,
    demonstrations: TrajectoryDataset | None,
    tasks: Sequence[str],
    goal_visible: bool,
    given: str | None = None,
) -> dict[str, TaskPrompt]:
    """Put an evaluation's prompts into the run, so that it can be repeated without the data that they came from.

    Returns them as they are read back from the run. `demonstrations` is None where trajectory prompts are off. One that
    shows several tasks is kept once. given: the data set that the run names for them (`data.demonstrations`), if any.
    """
    if demonstrations is not None:
        showing = shown_tasks(tasks)
        chosen = demonstrations.select([choose_demonstrations(demonstrations, task)[0] for task in showing])
        save_minari(chosen, run.prompts, namespace="prompts", name="example-v0")
    prompts = kept_prompts(run, demonstrations, tasks, goal_visible)
    described = {}
    # Of many files only the first stands in a data set's source; where they are the tasks' own, say which.
    places = {task: suite_of(task).data(shown_by(task)) for task in tasks}
    own_data = given is None and all(places.values())
    for task, prompt in prompts.items():
        own = prompt.demonstration
        trajectory = None
        if own is not None and demonstrations is not None:
            source = ", ".join(places[task]) if own_data else demonstrations.source
            seed = own.seed if own.seed >= 0 else None  # which recordings do not tell
            trajectory = {"source": source, "seed": seed, "steps": len(own)}
        described[task] = {"text": prompt.text, "text_source": prompt.text_source, "trajectory": trajectory}
    atomic_write_json(run.path / "prompts.json", described)
    return prompts


def kept_prompts(
    run: RunFolder, demonstrations: TrajectoryDataset | None, tasks: Sequence[str], goal_visible: bool
) -> dict[str, TaskPrompt]:
    """The prompts that `keep_prompts` has put into the run."""
    return task_prompts(tasks, None if demonstrations is None else run.prompts, goal_visible, stored=True)
