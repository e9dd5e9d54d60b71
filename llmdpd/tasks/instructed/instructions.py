"""Two instructions over a task of Meta-World, their names and their texts. Imports no simulator.

Both share the scene and the demonstration, which finishes the task. What is asked for, the text alone tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks.metaworld.names import TASKS as METAWORLD_TASKS
from llmdpd.tasks.metaworld.names import check_task, is_metaworld
from llmdpd.tasks.metaworld.prompts import metaworld_prompt
from llmdpd.tasks.names import base_name

FINISH, WAIT = "finish", "wait"
INSTRUCTIONS = (FINISH, WAIT)
"""finish: do Meta-World's task. wait: go near its object and wait there without touching it."""

TASKS: tuple[str, ...] = tuple(f"{each}-{base_name(task)}" for task in METAWORLD_TASKS for each in INSTRUCTIONS)
"""Both instructions over each of Meta-World's 50 tasks, as in "wait-push"."""

_ASKED: Mapping[str, str] = {
    FINISH: "and carry this through to its end",
    WAIT: "but only go near it and wait there, without touching anything",
}
_DONE: Mapping[str, str] = {
    FINISH: "the task is finished: {own}",
    WAIT: "the hand waits near the object, which has not moved",
}


def canonical(name: str) -> str:
    """The one spelling of a task's name: "wait-push" of "Wait_Push-v3".

    Raises:
        InputError: no such task; the nearest names are offered.
    """
    instruction, _, base = name.strip().lower().replace("_", "-").partition("-")
    if instruction not in INSTRUCTIONS or not is_metaworld(base):
        hint = f"nearest: {nearest_names(name, TASKS)}"
        expected = "finish-TASK or wait-TASK, with a task of Meta-World"
        raise InputError("unknown task under an instruction", field="task", found=name, expected=expected, hint=hint)
    return f"{instruction}-{base_name(check_task(base))}"


def is_instructed(name: str) -> bool:
    """Whether `name` is a task of Meta-World under one of the instructions, in any spelling."""
    instruction, _, base = name.strip().lower().replace("_", "-").partition("-")
    return instruction in INSTRUCTIONS and is_metaworld(base)


def parts(task: str) -> tuple[str, str]:
    """Instruction and Meta-World task, ("wait", "push-v3"), of a task by its canonical name."""
    instruction, _, base = task.partition("-")
    return instruction, check_task(base)


def instructed_prompt(task: str) -> str:
    """The text of a task by its canonical name: the Meta-World task's, with what is asked for, and no more numbers."""
    instruction, base = parts(task)
    own = metaworld_prompt(base)
    objective = f"{own.objective.rstrip('.')}, {_ASKED[instruction]}."
    success = f"{_DONE[instruction].format(own=own.success.rstrip('.'))}."
    # What the two have in common is left out but for the objects: the text is there to tell them apart.
    return dataclasses.replace(
        own, objective=objective, success=success, constraints="", actions="", observations=""
    ).render()
