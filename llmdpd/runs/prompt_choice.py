"""Which prompts an evaluation uses: from which data, by which demonstrator, and of which task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmdpd.config.schema import TrainConfig
from llmdpd.data import TrajectoryDataset, save_minari
from llmdpd.errors import InputError, nearest_names
from llmdpd.evaluation.prompts import (
    TaskPrompt,
    behaviour_prompts,
    choose_demonstrations,
    swap_names,
    swap_prompts,
    task_prompts,
)
from llmdpd.nn.context.base import check_left_out
from llmdpd.prompts import TextPrompt
from llmdpd.runs.data import behaviour_demonstrations
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks.metaworld.behaviours import BEHAVIOURS
from llmdpd.utils.files import atomic_write_json
from llmdpd.utils.progress import console

_BEHAVIOUR_DEMONSTRATIONS = 5


@dataclass(frozen=True, kw_only=True)
class PromptChoice:
    """The options of `llmdpd.evaluate` that are about prompts.

    data            where the demonstrations are from; None: the run's own
    text            a file with the text of every task; None: the built-in texts
    behaviours      demonstrations by each of these behaviour policies in turn, in place of data
    demonstrations  a task; None: 5 for behaviours, else 1
    for_baseline    the prompts are for a non-learned baseline, which reads demonstrations alone
    """

    tasks: tuple[str, ...]
    data: str | None = None
    text: Path | None = None
    which: Literal["own", "swapped", "no-trajectory", "no-text"] = "own"
    behaviours: tuple[str, ...] = ()
    demonstrations: int | None = None
    data_root: Path | None = None
    workers: int | None = None
    for_baseline: bool = False


def prompt_sets(
    choice: PromptChoice, run: RunFolder | None, trained: TrainConfig, check: Callable[[], None] = lambda: None
) -> list[dict[str, TaskPrompt]]:
    """The prompts of every task to evaluate: one set a behaviour, or one alone.

    `check` is called as demonstrations are collected and may raise to stop.

    Raises:
        InputError: prompts that the policy was trained without; options that contradict each other; an unknown
            behaviour; a task without a demonstration.
    """
    check_choice(choice, None if run is None else run.path, trained)
    tasks, seen = choice.tasks, trained.tasks.seen
    text = None if choice.text is None else TextPrompt.from_file(choice.text).render()
    source = "built in" if choice.text is None else str(choice.text)
    if not choice.behaviours:
        data = _data(choice, run, trained)
        count = choice.demonstrations or 1
        prompts = task_prompts(tasks, data, trained.tasks.goal_visible, text, source, count)
        return [_changed(prompts, choice.which, seen)]
    sets = []
    root = os.path.abspath(choice.data_root or trained.data.root)
    collected = dataclasses.replace(trained.data, root=root, workers=choice.workers)
    count = choice.demonstrations or _BEHAVIOUR_DEMONSTRATIONS
    for behaviour in choice.behaviours:
        dataset = behaviour_demonstrations(collected, trained.tasks, tasks, behaviour, count, check)
        prompts = behaviour_prompts(tasks, behaviour, dataset, count, text, source)
        for task, prompt in prompts.items():
            found = len(prompt.demonstrations)
            if found < count:
                console.print(f"{task}, {behaviour}: {found} demonstrations succeeded, not {count}")
        sets.append(_changed(prompts, choice.which, seen))
    return sets


def _changed(prompts: dict[str, TaskPrompt], which: str, seen: tuple[str, ...]) -> dict[str, TaskPrompt]:
    if which == "swapped":
        return swap_prompts(prompts, seen)
    if which == "no-trajectory":
        return {task: dataclasses.replace(prompt, demonstrations=()) for task, prompt in prompts.items()}
    if which == "no-text":
        return {task: dataclasses.replace(prompt, text=None) for task, prompt in prompts.items()}
    return prompts


def check_choice(choice: PromptChoice, path: Path | None, trained: TrainConfig) -> None:
    """Refuse prompts that the policy was trained without, and options that contradict each other.

    Raises:
        InputError: as `prompt_sets`, but for demonstrations that turn out not to be there.
    """
    context = trained.method.network.context_config()
    for behaviour in choice.behaviours:
        if behaviour not in BEHAVIOURS:
            raise InputError(
                "unknown behaviour",
                field="--prompt-behaviours",
                found=behaviour,
                expected=", ".join(BEHAVIOURS),
                hint="nearest: " + nearest_names(behaviour, tuple(BEHAVIOURS)),
            )
    asked = {
        "--prompt-data": choice.data,
        "--prompt-behaviours": ", ".join(choice.behaviours),
        "--demonstrations": choice.demonstrations,
    }
    given = [option for option, value in asked.items() if value]
    if choice.data and choice.behaviours:
        raise InputError(
            "demonstrations from two places",
            field="--prompt-data",
            found=f"{choice.data} and --prompt-behaviours",
            expected="one of the two",
        )
    if choice.which == "no-trajectory" and given:
        raise InputError(
            "without demonstrations there is no choice of them", field="--prompts no-trajectory", found=", ".join(given)
        )
    reads_demonstrations = context.trajectory or choice.for_baseline
    may_lack_them = context.trajectory and context.trajectory_dropout
    option = f"--prompts {choice.which}"
    needs = [] if reads_demonstrations else given
    needs = needs + (["--prompt-text"] if choice.text and not context.text else [])
    if not reads_demonstrations and choice.which == "no-text":
        needs.append(option)
    if not context.text and choice.which == "no-trajectory" and not may_lack_them:
        needs.append(option)
    if not (context.text or reads_demonstrations) and choice.which == "swapped":
        needs.append(option)
    if needs:
        raise InputError("this run's policy was trained without such prompts", path=path, field=needs[0])
    if choice.which == "swapped":
        swap_names(choice.tasks, trained.tasks.seen)
    if choice.which == "no-text" and context.text:
        check_left_out(context, "text")
    if choice.which == "no-trajectory" and context.trajectory:
        check_left_out(context, "trajectory")


def _data(choice: PromptChoice, run: RunFolder | None, trained: TrainConfig) -> str | Path | None:
    """Where the demonstrations are, None where the policy takes none."""
    if not (trained.method.network.context_config().trajectory or choice.for_baseline):
        return None
    if choice.data is not None or run is None:
        return choice.data
    known = (*trained.tasks.seen, *trained.tasks.unseen) if run.prompts.exists() else ()
    foreign = [task for task in choice.tasks if task not in known]
    if foreign:
        raise InputError(
            "the run has no demonstration of this task",
            path=run.prompts,
            field="--tasks",
            found=", ".join(foreign),
            hint="name a data set that has one with --prompt-data, or collect some with --prompt-behaviours clean",
        )
    return run.prompts


def keep_prompts(
    run: RunFolder, demonstrations: TrajectoryDataset | None, tasks: Sequence[str], goal_visible: bool
) -> dict[str, TaskPrompt]:
    """Put an evaluation's prompts into the run, so that it can be repeated without the data that they came from.

    Returns them as they are read back from the run. `demonstrations` is None where trajectory prompts are off.
    """
    if demonstrations is not None:
        chosen = demonstrations.select([choose_demonstrations(demonstrations, task)[0] for task in tasks])
        save_minari(chosen, run.prompts, namespace="prompts", name="example-v0")
    prompts = task_prompts(tasks, None if demonstrations is None else run.prompts, goal_visible)
    described = {}
    for task, prompt in prompts.items():
        own = prompt.demonstration
        trajectory = None
        if own is not None and demonstrations is not None:
            trajectory = {"source": demonstrations.source, "seed": own.seed, "steps": len(own)}
        described[task] = {"text": prompt.text, "text_source": prompt.text_source, "trajectory": trajectory}
    atomic_write_json(run.path / "prompts.json", described)
    return prompts
