"""The names of the Meta-World tasks, known without importing metaworld."""

from __future__ import annotations

import re

from llmdpd.errors import InputError, nearest_names

TASKS: tuple[str, ...] = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "dial-turn-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-close-v3",
    "faucet-open-v3",
    "hammer-v3",
    "hand-insert-v3",
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "peg-insert-side-v3",
    "peg-unplug-side-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "pick-place-wall-v3",
    "plate-slide-back-side-v3",
    "plate-slide-back-v3",
    "plate-slide-side-v3",
    "plate-slide-v3",
    "push-back-v3",
    "push-v3",
    "push-wall-v3",
    "reach-v3",
    "reach-wall-v3",
    "shelf-place-v3",
    "soccer-v3",
    "stick-pull-v3",
    "stick-push-v3",
    "sweep-into-v3",
    "sweep-v3",
    "window-close-v3",
    "window-open-v3",
)
"""All 50 Meta-World tasks (MT50), in alphabetical order."""

ML45_TEST: tuple[str, ...] = ("bin-picking-v3", "box-close-v3", "hand-insert-v3", "door-lock-v3", "door-unlock-v3")
"""The five tasks that the ML45 benchmark holds out."""

ML45_TRAIN: tuple[str, ...] = tuple(task for task in TASKS if task not in ML45_TEST)
"""The 45 training tasks of ML45."""

_VERSION = re.compile(r"-v[123]$")


def _canonical(name: str) -> str:
    return _VERSION.sub("", name.strip()) + "-v3"


def base_name(task: str) -> str:
    """Any task's name without its version: "push" of "push-v3", "hopper-medium-replay" of "hopper-medium-replay-v2"."""
    return re.sub(r"-v\d+$", "", task)


def is_metaworld(name: str) -> bool:
    """Whether `name` is a Meta-World task, in any of the spellings that `check_task` accepts."""
    return _canonical(name) in TASKS


def check_task(name: str) -> str:
    """The canonical name ("sweep-into-v3") of a Meta-World task given as "sweep-into", "sweep-into-v2" or "-v3".

    The tasks of version 2 and 3 are the same; only the Python package around them changed.

    Raises:
        InputError: the task is unknown; the nearest names are offered.
    """
    canonical = _canonical(name)
    if canonical not in TASKS:
        raise InputError(
            f"unknown Meta-World task {name!r}",
            field="task",
            found=name,
            expected="one of the 50 Meta-World tasks",
            hint="nearest: " + nearest_names(canonical, TASKS),
        )
    return canonical
