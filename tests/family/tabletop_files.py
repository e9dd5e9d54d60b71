"""What a user of the family has in a folder: the module, recorded data, and a `tasks.toml`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import tabletop

LAYOUT = """[suite.layout]
points = { hand = [0, 1, 2], object = [4, 5, 6], box = [7, 8, 9], goal = [10, 11, 12] }
gripper = [3]
action = { move = [0, 1, 2], gripper = [3] }
up = "z"
"""
OBSERVATION = '["observation", "desired_goal"]'


def write_family(
    folder: Path,
    tasks: Sequence[str] = tuple(tabletop.TASKS),
    *,
    unseen: Sequence[str] = tabletop.UNSEEN,
    episodes: int = 6,
    keyed: bool = False,
    layout: bool = True,
    env: bool = True,
    suite: str = 'success = "is_success"',
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write the module, the data and the task file into a folder; the task file's path.

    suite: lines of [suite]; extra: further lines of tasks, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "demos", ignore_errors=True)
    shutil.copy(tabletop.__file__, folder / "tabletop.py")
    lines = ["[suite]", suite, *([f"observation = {OBSERVATION}"] if keyed else []), LAYOUT if layout else ""]
    for number, task in enumerate(tasks):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari asks for an author and more
            data = tabletop.record(folder / "demos", task, episodes, keyed, first_seed=1000 * number)
        made = [
            'env = "tabletop:make"',
            f'env_kwargs = {{ task = "{task}", keyed = {str(keyed).lower()} }}',
        ]
        lines += [f"[tasks.{task}]", *(made if env else [])]
        lines += [f'data = "{data.relative_to(folder)}"', f'text = "Task: {tabletop.TASKS[task][0]}"']
        lines += [f'split = "{"unseen" if task in unseen else "seen"}"', (extra or {}).get(task, "")]
    path = folder / "tasks.toml"
    path.write_text("\n".join(lines) + "\n")
    return path
