"""The names of the Meta-World tasks, known without importing metaworld."""

from __future__ import annotations

import re

from llmdpd.errors import InputError, nearest_names

_NAMES = """
    assembly basketball bin-picking box-close button-press-topdown button-press-topdown-wall button-press
    button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open
    door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press-side handle-press
    handle-pull-side handle-pull lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place
    pick-place-wall plate-slide-back-side plate-slide-back plate-slide-side plate-slide push-back push push-wall
    reach reach-wall shelf-place soccer stick-pull stick-push sweep-into sweep window-close window-open
"""
TASKS: tuple[str, ...] = tuple(f"{name}-v3" for name in _NAMES.split())
"""All 50 Meta-World tasks (MT50), in alphabetical order."""

ML45_TEST: tuple[str, ...] = ("bin-picking-v3", "box-close-v3", "hand-insert-v3", "door-lock-v3", "door-unlock-v3")
"""The five tasks that the ML45 benchmark holds out."""

ML45_TRAIN: tuple[str, ...] = tuple(task for task in TASKS if task not in ML45_TEST)
"""The 45 training tasks of ML45."""

_VERSION = re.compile(r"(?:-v[123])?(?:-goal-(?:observable|hidden))?$")
_NAMESPACE = re.compile(r"meta-?world[/-]")


def _canonical(name: str) -> str:
    plain = name.strip().lower().replace("_", "-")
    task, *_ = _NAMESPACE.sub("", plain, count=1).split("/") if _NAMESPACE.match(plain) else [plain]
    return _VERSION.sub("", task) + "-v3"


def is_metaworld(name: str) -> bool:
    """Whether `name` is a Meta-World task, in any of the spellings that `check_task` accepts."""
    return _canonical(name) in TASKS


def check_task(name: str) -> str:
    """The canonical name ("sweep-into-v3") of a Meta-World task given as "sweep-into", "Sweep_Into-v2" or "-v3".

    Ids of data sets are understood too: "metaworld/sweep-into/expert-v0". The tasks of version 2 and 3 are the same;
    only the Python package around them changed. Raises InputError where the task is unknown; the nearest names are
    offered.
    """
    canonical, problem = _canonical(name), f"unknown Meta-World task {name!r}"
    if canonical not in TASKS:
        hint, expected = "nearest: " + nearest_names(canonical, TASKS), "one of the 50 Meta-World tasks"
        raise InputError(problem, field="task", found=name, expected=expected, hint=hint)
    return canonical
