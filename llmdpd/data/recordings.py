"""What the readers of robots' recordings have in common: names from instructions, success flags, unknown last steps."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmdpd.data.notes import say_once
from llmdpd.data.trajectories import EpisodeRecord
from llmdpd.errors import InputError

_LONGEST_NAME = 60
_log = logging.getLogger(__name__)


def task_name(text: str) -> str:
    """A task's name from its instruction: lower-case words joined by "-", cut after a word; "" where it has no word.

    Letters of any script are kept: "Push the T-block." gives "push-the-t-block".
    """
    words = re.findall(r"[^\W_]+", text.lower())
    name = "-".join(words)[: _LONGEST_NAME + 1]
    return name if len(name) <= _LONGEST_NAME else name.rpartition("-")[0] or name[:_LONGEST_NAME]


def known_steps(episodes: Iterable[EpisodeRecord], path: Path) -> Iterator[EpisodeRecord]:
    """The episodes of T steps each, `observations` [T, S], without the steps whose next observation is not known.

    That is the last one of each episode, unless it has `next_observations`; an episode of one such step is left out,
    which is logged. Success stays what the whole episode's is. Raises InputError where nothing is left.
    """
    kept = dropped = 0
    for episode in episodes:
        if episode.next_observations is None:
            actions, rewards = np.asarray(episode.actions)[:-1], np.asarray(episode.rewards)[:-1]
            if not len(actions):
                dropped += 1
                continue
            step = episode.success_step if episode.success_step < len(actions) else -1
            episode = dataclasses.replace(episode, actions=actions, rewards=rewards, success_step=step)
        kept += 1
        yield episode
    if dropped:
        say_once(_log, "%s: %d episodes of one step are left out: what follows it is not known", path, dropped)
    if not kept:
        found = f"{dropped} episodes of one step" if dropped else "no episode"
        expected = "an episode of two steps or more"
        raise InputError("no step with a next observation", path=path, found=found, expected=expected)


def list_fields(fields: Iterable[tuple[str, Any]]) -> str:
    """Names and shapes a step, for messages: "qpos [7], image [84, 84, 3]"."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in fields) or "none"
