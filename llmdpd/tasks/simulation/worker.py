"""What runs inside a worker process: a loop that answers method calls, and the host of several environments.

A worker is a fresh interpreter (see `llmdpd.tasks.simulation.processes`), so this module must not import torch.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmdpd.errors import InputError
from llmdpd.tasks.base import Environment, FloatArray, Frame
from llmdpd.tasks.simulation.channel import Connection, connect_parent
from llmdpd.tasks.user import use_file

PARENT_POLL_SECONDS = 5.0


def resolve(name: str) -> Any:
    """The object called "package.module:attribute"."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def serve(connection: Connection[Any, Any], parent: int) -> None:
    """Build the handler that the first message asks for, then answer method calls until the parent is gone.

    Messages: (factory, args, the task file in use or None), then (method, args); answers: ("ok", value) or ("error",
    exception | None, traceback).
    """
    handler: Any = None
    try:
        while True:
            # The end of the pipe is not enough: a process forked by the parent may hold it open after the parent died.
            while not connection.poll(PARENT_POLL_SECONDS):
                if os.getppid() != parent:
                    return
            name, arguments, *file = connection.recv()
            try:
                if handler is None:
                    if file[0] is not None:
                        use_file(file[0])
                    handler = resolve(name)(*arguments)
                    continue
                answer: tuple[Any, ...] = ("ok", getattr(handler, name)(*arguments))
            except Exception as error:
                # An InputError can be pickled; others may not, so only their text is sent.
                answer = ("error", error if isinstance(error, InputError) else None, traceback.format_exc())
            connection.send(answer)
    except (EOFError, OSError):
        return


def main(descriptor: int, parent: int) -> None:
    """Entry point of a worker process; `descriptor` is its end of a socket pair."""
    serve(connect_parent(descriptor), parent)


@dataclass(frozen=True)
class EpisodeRequest:
    """One episode to roll out.

    Args:
        task: a task in any spelling that its suite knows.
        seed: of the environment's reset; decides start and goal.
        max_steps: the episode ends here at the latest.
        stop_on_success: end at the first step whose success flag is up.
        record: return rendered frames (needs an off-screen renderer, see `llmdpd.tasks.simulation.render`).
        record_every: steps from one frame to the next; the first and the last state are always among them.
    """

    task: str
    seed: int
    max_steps: int
    stop_on_success: bool = True
    record: bool = False
    record_every: int = 4


class EnvironmentCache:
    """Environments kept for reuse: making one costs 0.1 to 0.3 s and up to 55 MB.

    Args:
        make: (task, goal_visible, render) → environment.
        limit: environments alive at once beyond which idle ones are dropped, the longest unused first.
    """

    def __init__(self, make: Callable[[str, bool, bool], Environment], *, goal_visible: bool, limit: int) -> None:
        self._make, self._goal_visible, self._limit = make, goal_visible, limit
        self._idle: list[tuple[tuple[str, bool], Environment]] = []  # the longest unused first
        self._busy = 0

    def acquire(self, task: str, render: bool) -> Environment:
        """An environment of `task` that no other episode uses."""
        self._busy += 1
        for place in reversed(range(len(self._idle))):
            if self._idle[place][0] == (task, render):
                return self._idle.pop(place)[1]
        while self._idle and self._busy + len(self._idle) > self._limit:
            del self._idle[0]
        return self._make(task, self._goal_visible, render)

    def release(self, task: str, render: bool, environment: Environment) -> None:
        """Return an environment to the cache."""
        self._busy -= 1
        self._idle.append(((task, render), environment))


class Outcome(NamedTuple):
    """What the parent receives about one episode after a start or a step."""

    slot: int
    observation: FloatArray
    reward: float
    success: bool
    over: bool
    frames: list[Frame] | None


@dataclass
class _Episode:
    """A running episode: its environment, its step count and its frames."""

    slot: int
    request: EpisodeRequest
    environment: Environment
    steps: int = 0
    frames: list[Frame] = field(default_factory=list)

    def start(self) -> Outcome:
        observation = self.environment.reset(self.request.seed)
        self._record_frame(last=False)
        return Outcome(self.slot, observation, 0.0, False, False, None)

    def step(self, action: FloatArray) -> Outcome:
        observation, reward, success, over = self.environment.step(action)
        self.steps += 1
        over = over or self.steps >= self.request.max_steps or (success and self.request.stop_on_success)
        self._record_frame(last=over)
        return Outcome(
            self.slot, observation, reward, success, over, self.frames if over and self.request.record else None
        )

    def _record_frame(self, last: bool) -> None:
        if self.request.record and (last or self.steps % self.request.record_every == 0):
            self.frames.append(self.environment.render())


class State(NamedTuple):
    """What an environment answers to a step, or to a reset; `terminated`: its episode ended by itself, by no limit."""

    observation: FloatArray
    reward: float = 0.0
    success: bool = False
    over: bool = False
    terminated: bool = False


class EnvironmentHost:
    """Environments that are stepped one at a time, each in an episode of its own; the caller names them.

    Args:
        make: factory of environments, or its name ("module:function"), called with (task, goal_visible, render).
        goal_visible: passed on to it.
        limit: environments kept alive at most, as long as not more than that are in use.
    """

    def __init__(self, make: str | Callable[[str, bool, bool], Environment], goal_visible: bool, limit: int) -> None:
        factory = resolve(make) if isinstance(make, str) else make
        self._cache = EnvironmentCache(factory, goal_visible=goal_visible, limit=limit)
        self._present: dict[str, tuple[str, Environment]] = {}

    def reset(self, slot: str, task: str, seed: int) -> State:
        """Begin an episode in `slot`, which gives up the one before."""
        if slot in self._present:
            before, environment = self._present.pop(slot)
            self._cache.release(before, False, environment)
        self._present[slot] = task, self._cache.acquire(task, False)
        return State(self._present[slot][1].reset(seed))

    def step(self, slot: str, action: FloatArray) -> State:
        """Execute an action [A] in the episode of `slot`."""
        environment = self._present[slot][1]
        observation, reward, success, over = environment.step(action)
        return State(observation, reward, success, over, bool(getattr(environment, "terminated", False)))

    def replay(self, slot: str, task: str, seed: int, actions: list[FloatArray]) -> State:
        """Begin an episode and repeat its actions; the last answer."""
        state = self.reset(slot, task, seed)
        for action in actions:
            state = self.step(slot, action)
        return state


class EpisodeHost:
    """Several environments in one process, stepped together; the parent gives each a slot number.

    Args:
        make: name ("module:function") of the factory of environments, called with (task, goal_visible, render).
        goal_visible: passed on to it.
        limit: environments kept alive at most, as long as not more than that are in use.
    """

    def __init__(self, make: str, goal_visible: bool, limit: int) -> None:
        self._cache = EnvironmentCache(resolve(make), goal_visible=goal_visible, limit=limit)
        self._episodes: dict[int, _Episode] = {}

    def advance(
        self, starts: list[tuple[int, EpisodeRequest]], slots: list[int], actions: FloatArray | None
    ) -> list[Outcome]:
        """Step the episodes in `slots` by `actions` [len(slots), A], then start new ones; one outcome for each."""
        steps = zip(slots, () if actions is None else actions, strict=True)
        outcomes = [self._settle(self._episodes[slot].step(action)) for slot, action in steps]
        return outcomes + [self._begin(slot, request).start() for slot, request in starts]

    def replay(self, slot: int, request: EpisodeRequest, actions: FloatArray | None) -> list[Outcome]:
        """Redo an episode of a worker that died: start it and repeat `actions` [T, A]; only the last outcome counts."""
        episode = self._begin(slot, request)
        outcome = episode.start()
        for action in actions if actions is not None else ():
            outcome = episode.step(action)
        return [self._settle(outcome)]

    def _begin(self, slot: int, request: EpisodeRequest) -> _Episode:
        environment = self._cache.acquire(request.task, request.record)
        self._episodes[slot] = _Episode(slot, request, environment)
        return self._episodes[slot]

    def _settle(self, outcome: Outcome) -> Outcome:
        if outcome.over:
            episode = self._episodes.pop(outcome.slot)
            self._cache.release(episode.request.task, episode.request.record, episode.environment)
        return outcome
