"""Names of tasks, of any suite."""

from __future__ import annotations

import re


def file_stem(task: str) -> str:
    """A task's name as the stem of a file's name: "my-robot_pour" of "my-robot/pour"."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", task)


def base_name(task: str) -> str:
    """A task's name without its version: "push" of "push-v3", "hopper-medium-replay" of "hopper-medium-replay-v2"."""
    return re.sub(r"-v\d+$", "", task)


def up_to_version(name: str) -> str | None:
    """What of a file's or folder's name ends in version 2 or 3: "push-v2" of "push-v2_near"; None without one."""
    found = re.match(r"(.*?[-_]v[23])(?![0-9a-z])", name)
    return None if found is None else found[1]
