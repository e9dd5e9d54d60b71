"""An environment in a process of its own: the same numbers, whatever becomes of that process."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.simulation import isolated
from llmdpd.tasks.simulation.isolated import IsolatedEnvironments
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.tasks.simulation.worker import EnvironmentHost, State, resolve

Host = IsolatedEnvironments | EnvironmentHost


def roll(host: Host, task: str, seed: int, slots: tuple[str, ...] = ("a", "b"), steps: int = 12) -> list[bytes]:
    """Episodes in several slots in turn; all that was answered."""
    states = [host.reset(slot, task, seed + number) for number, slot in enumerate(slots)]
    found = [content(state) for state in states]
    for step in range(steps):
        for number, slot in enumerate(slots):
            states[number] = host.step(slot, np.sin(step + states[number].observation[:4]))
            found.append(content(states[number]))
    return found


def content(state: State) -> bytes:
    return state.observation.tobytes() + repr(tuple(state)[1:]).encode()


def alone(toys: str, seed: int) -> list[bytes]:
    return roll(EnvironmentHost(resolve(f"{toys}:make"), True, 4), "plain", seed)


@pytest.mark.parametrize("misbehaves", ["plain", "die-once", "die-twice", "stop-once", "hang-once"])
def test_the_same_numbers_though_its_process_dies_or_hangs(
    toys: str, tmp_path: Path, fresh_seed: int, misbehaves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMDPD_STEP_SECONDS", "1.5")
    task = misbehaves if misbehaves == "plain" else f"{misbehaves}@{tmp_path / 'flag'}"
    there = roll(IsolatedEnvironments(f"{toys}:make", goal_visible=True, limit=4), task, fresh_seed)
    # The toy's success is that of tasks that do not misbehave.
    assert [part[:24] for part in there] == [part[:24] for part in alone(toys, fresh_seed)]
    if misbehaves == "plain":
        assert there == alone(toys, fresh_seed)


def test_three_deaths_in_an_episode_are_an_error(toys: str) -> None:
    host = IsolatedEnvironments(f"{toys}:make", goal_visible=True, limit=4)
    with pytest.raises(WorkerError, match="3 workers died in the episode of task die-always, seed 5; worker 0"):
        roll(host, "die-always", 5, ("a",))
    assert len(roll(host, "plain", 5)) == 26, "another episode is not held up by it"


def test_errors_come_home(toys: str) -> None:
    host = IsolatedEnvironments(f"{toys}:make", goal_visible=True, limit=4)
    with pytest.raises(WorkerError, match="ArithmeticError: the toy broke"):
        roll(host, "raise", 0)
    with pytest.raises(InputError, match="no-such-task"):
        IsolatedEnvironments("llmdpd.tasks.specs:make_environment", goal_visible=True, limit=4).reset(
            "a", "no-such-task", 0
        )


def test_a_call_that_was_broken_off_is_not_answered_to_the_next(
    toys: str, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = IsolatedEnvironments(f"{toys}:make", goal_visible=True, limit=4)
    host.reset("a", "plain", fresh_seed)

    def interrupted(workers: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(isolated, "answered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            host.step("a", np.ones(4))
    assert roll(host, "plain", fresh_seed) == alone(toys, fresh_seed)


def test_its_process_goes_with_it(toys: str, is_running: Callable[[int], bool]) -> None:
    host = IsolatedEnvironments(f"{toys}:make", goal_visible=True, limit=4)
    roll(host, "plain", 0)
    assert host._worker is not None
    process = host._worker.pid
    os.kill(process, signal.SIGSTOP)
    del host
    gc.collect()
    assert not is_running(process)
