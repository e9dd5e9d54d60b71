"""README's example and commands do what README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmdpd.tasks.metaworld import environment

README = Path(__file__).parents[1] / "README.md"
STEPS = 30


class ShortTask:
    """A task that ends after `STEPS` steps, with success or not, and records what it was given and what it returned."""

    def __init__(self, task: Any, succeeds: bool) -> None:
        self.task, self.succeeds = task, succeeds
        self.observations: list[NDArray[np.float32]] = []
        self.actions: list[NDArray[np.float32]] = []

    def reset(self, seed: int) -> Any:
        first = self.task.reset(seed=seed)
        self.observations.append(first)
        return first

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool]:
        assert len(self.actions) < STEPS, "the example goes on after the episode's end"
        self.actions.append(action)
        observation, reward, _, _ = self.task.step(action)
        self.observations.append(observation)
        last = len(self.actions) == STEPS
        return observation, reward, last and self.succeeds, last and not self.succeeds


@pytest.mark.parametrize("succeeds", [True, False])
def test_the_example_drives_an_environment(
    straight_run: Path, succeeds: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    # The run that tests make knows other tasks, and is somewhere else.
    code = example.replace("runs/NAME", str(straight_run)).replace("box-close", "reach")
    make_task = environment.make_task
    monkeypatch.setattr(environment, "make_task", lambda name: ShortTask(make_task(name), succeeds))
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    env, policy = names["env"], names["policy"]
    assert len(env.actions) == STEPS
    assert capsys.readouterr().out.strip() == ("success" if succeeds else "no success")
    # Every observation reached the policy once, in order: the same ones again give the same actions.
    policy.reset()
    policy.seed(0)
    again = [policy.act(observation) for observation in env.observations[:-1]]
    assert np.array_equal(again, env.actions)
    assert np.abs(env.actions).max() <= 1
    assert np.ptp(env.actions, axis=0).min() > 0


@pytest.mark.parametrize("name", ["main-command", "test-command"])
def test_the_two_commands_are_marked(name: str) -> None:
    # .ci/run takes the test command from between these lines.
    marked = re.search(rf"^<!-- {name} -->\n```bash\n(.+)\n```$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert marked is not None
    assert "-c constraints.txt" in marked[1]
