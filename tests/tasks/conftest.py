"""Fixtures for the environments' tests: a fresh seed, and toy environments that worker processes can import."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOY = '''
import ctypes
import os
import signal
import sys
import time

import numpy as np


class Toy:
    """A chaotic toy: every number depends on all actions before. Its task says how it misbehaves: NAME[@FILE]."""

    def __init__(self, task, goal_visible, render):
        self.name, _, self.file = task.partition("@")
        self.goal_visible = goal_visible

    def reset(self, seed):
        self.state = np.random.default_rng(seed).uniform(-1, 1, 6).astype(np.float32)
        self.steps = 0
        return self.state.copy()

    def step(self, action):
        self.steps += 1
        if self.name == "sleep":
            time.sleep(0.002)
        if self.steps == 7:
            self.misbehave()
        self.state = np.sin(3 * self.state + np.resize(action, 6)).astype(np.float32)
        reward = float(self.state.sum())
        over = self.name == "short" and self.steps == 5
        success = bool(self.state[0] > 0.99) and self.name in ("plain", "other", "short")
        return self.state.copy(), reward, success, over

    def misbehave(self):
        if self.name == "die-always":
            os._exit(3)
        lives = {"die-once": 1, "die-twice": 2}.get(self.name, 0)
        if lives and (not os.path.exists(self.file) or os.path.getsize(self.file) < lives):
            with open(self.file, "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        if self.name == "stop-always" or (self.name == "stop-once" and not os.path.exists(self.file)):
            if self.file:
                open(self.file, "w").close()
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.name == "hang-once" and not os.path.exists(self.file):
            open(self.file, "w").close()
            ctypes.PyDLL(None).sleep(3600)  # in C, which lets no other thread and no signal handler run
        if self.name == "raise":
            raise ArithmeticError("the toy broke")


def make(task, goal_visible, render):
    return Toy(task, goal_visible, render)


class Probe:
    """Answers questions about the worker process."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def square(self, number):
        return self.arguments, number * number

    def modules(self, prefix):
        return sorted(name for name in sys.modules if name.split(".")[0] == prefix)

    def environment(self, name):
        return os.environ.get(name)

    def pid(self):
        return os.getpid()

    def interrupt_self(self):
        os.kill(os.getpid(), signal.SIGINT)
        return "alive"

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def once(self, file, value):
        if not os.path.exists(file):
            open(file, "w").close()
            os._exit(7)
        return value

    def always(self):
        os._exit(9)

    def stop(self, file, value):
        if not os.path.exists(file):
            open(file, "w").close()
            os.kill(os.getpid(), signal.SIGSTOP)
        return value

    def hang(self):
        while True:
            pass

    def fail(self, kind):
        from llmdpd.errors import InputError

        raise InputError("wrong", field="x") if kind == "input" else ArithmeticError("broken probe")


class Stillborn(Probe):
    """Its process dies while it is made, the first time or always."""

    def __init__(self, file):
        if not os.path.exists(file):
            if not file.endswith("always"):
                open(file, "w").close()
            os._exit(5)
'''


@pytest.fixture
def is_running() -> Callable[[int], bool]:
    """Whether a process exists and is no zombie."""

    def check(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return check


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with the toys."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "llmdpd_toys.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("llmdpd_toys", None)
    return "llmdpd_toys"
