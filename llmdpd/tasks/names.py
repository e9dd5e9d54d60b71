"""Names of tasks, of any suite."""

from __future__ import annotations

import re


def base_name(task: str) -> str:
    """A task's name without its version: "push" of "push-v3", "hopper-medium-replay" of "hopper-medium-replay-v2"."""
    return re.sub(r"-v\d+$", "", task)
