"""Which prompts an evaluation is under: from which data, by whom made, and whose."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError, nearest_names
from llmdpd.evaluation.prompts import TaskPrompt, behaviour_prompts, read_text, swap_names, swap_prompts, task_prompts
from llmdpd.nn.context.base import check_left_out
from llmdpd.runs.data import behaviour_examples
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks.metaworld.behaviours import BEHAVIOURS
from llmdpd.utils.progress import console

_BEHAVIOUR_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class PromptChoice:
    """The options of `llmdpd.evaluate` that are about prompts.

    `data` None: the run's own examples; `text` None: the built-in texts. `behaviours`: examples by each of them in
    turn, in place of data. `examples` None: 5 a task for behaviours, else 1.
    """

    tasks: tuple[str, ...]
    data: str | None = None
    text: Path | None = None
    which: Literal["own", "swapped", "no-trajectory", "no-text"] = "own"
    behaviours: tuple[str, ...] = ()
    examples: int | None = None
    data_root: Path | None = None
    workers: int | None = None
    for_control: bool = False


def prompt_sets(
    choice: PromptChoice, run: RunFolder | None, trained: TrainConfig, check: Callable[[], None] = lambda: None
) -> list[dict[str, TaskPrompt]]:
    """The prompts of every task to evaluate: one set a behaviour, or one alone.

    `check` is called as examples are collected and may raise to stop.

    Raises:
        InputError: prompts that the policy was trained without; options that contradict each other; an unknown
            behaviour; a task without an example.
    """
    check_choice(choice, None if run is None else run.path, trained)
    tasks = choice.tasks
    text = None if choice.text is None else read_text(choice.text)
    source = "built in" if choice.text is None else str(choice.text)
    sets = []
    if choice.behaviours:
        root = os.path.abspath(choice.data_root or trained.data.root)
        config = dataclasses.replace(trained, data=dataclasses.replace(trained.data, root=root, workers=choice.workers))
        count = choice.examples or _BEHAVIOUR_EXAMPLES
        for behaviour in choice.behaviours:
            dataset = behaviour_examples(config, tasks, behaviour, count, check)
            prompts = behaviour_prompts(tasks, behaviour, dataset, count, text, source)
            for task, prompt in prompts.items():
                if len(prompt.examples) < count:
                    console.print(f"{task}, {behaviour}: {len(prompt.examples)} examples succeeded, not {count}")
            sets.append(prompts)
    else:
        data = _data(choice, run, trained)
        sets.append(task_prompts(tasks, data, trained.tasks.goal_visible, text, source, choice.examples or 1))
    return [_changed(prompts, choice.which, trained.tasks.seen) for prompts in sets]


def _changed(prompts: dict[str, TaskPrompt], which: str, seen: tuple[str, ...]) -> dict[str, TaskPrompt]:
    if which == "swapped":
        return swap_prompts(prompts, seen)
    if which == "no-trajectory":
        return {task: dataclasses.replace(prompt, examples=()) for task, prompt in prompts.items()}
    if which == "no-text":
        return {task: dataclasses.replace(prompt, text=None) for task, prompt in prompts.items()}
    return prompts


def check_choice(choice: PromptChoice, path: Path | None, trained: TrainConfig) -> None:
    """Refuse prompts that the policy was trained without, and options that contradict each other.

    Raises:
        InputError: as `prompt_sets`, but for examples that turn out not to be there.
    """
    context = trained.policy.context
    for behaviour in choice.behaviours:
        if behaviour not in BEHAVIOURS:
            hint = "nearest: " + nearest_names(behaviour, tuple(BEHAVIOURS))
            expected = ", ".join(BEHAVIOURS)
            raise InputError(
                "unknown behaviour", field="--prompt-behaviours", found=behaviour, expected=expected, hint=hint
            )
    asked = {
        "--prompt-data": choice.data,
        "--prompt-behaviours": ", ".join(choice.behaviours),
        "--examples": choice.examples,
    }
    given = {option: value for option, value in asked.items() if value}
    if choice.data and choice.behaviours:
        raise InputError(
            "examples from two places", field="--prompt-data", found=f"{choice.data} and --prompt-behaviours",
            expected="one of the two",
        )  # fmt: skip
    if choice.which == "no-trajectory" and given:
        raise InputError(
            "without examples there is no choice of them", field="--prompts no-trajectory", found=", ".join(given),
        )  # fmt: skip
    needs = [] if context.trajectory or choice.for_control else list(given)
    needs += [] if context.text else ["--prompt-text"] if choice.text else []
    if not (context.trajectory or choice.for_control) and choice.which == "no-text":
        needs.append("--prompts no-text")
    if not context.text and choice.which == "no-trajectory" and not (context.trajectory and context.trajectory_dropout):
        needs.append("--prompts no-trajectory")
    if not (context.text or context.trajectory or choice.for_control) and choice.which == "swapped":
        needs.append("--prompts swapped")
    if needs:
        raise InputError("this run's policy was trained without such prompts", path=path, field=needs[0])
    if choice.which == "swapped":
        swap_names(choice.tasks, trained.tasks.seen)
    if choice.which == "no-text" and context.text:
        check_left_out(context, "text")
    if choice.which == "no-trajectory" and context.trajectory:
        check_left_out(context, "trajectory")


def _data(choice: PromptChoice, run: RunFolder | None, trained: TrainConfig) -> str | Path | None:
    """Where the examples are, None where the policy takes none."""
    if not (trained.policy.context.trajectory or choice.for_control):
        return None
    if choice.data is not None or run is None:
        return choice.data
    known = (*trained.tasks.seen, *trained.tasks.unseen) if run.prompts.exists() else ()
    foreign = [task for task in choice.tasks if task not in known]
    if foreign:
        raise InputError(
            "the run has no example of this task",
            path=run.prompts,
            field="--tasks",
            found=", ".join(foreign),
            hint="give a data set that has one with --prompt-data, or collect some with --prompt-behaviours clean",
        )
    return run.prompts
