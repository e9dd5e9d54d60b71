"""The policy of a tiny run, and prompts of two of its tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmdpd.evaluation.prompts import TaskPrompt, task_prompts
from llmdpd.policy.policy import Policy


@pytest.fixture(scope="module")
def policy(straight_run: Path) -> Policy:
    return Policy.load(straight_run)


@pytest.fixture(scope="module")
def prompts(straight_run: Path) -> dict[str, TaskPrompt]:
    return task_prompts(("reach-v3", "door-lock-v3"), straight_run / "prompt_data", True)
