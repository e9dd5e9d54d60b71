"""Handing over: episodes in which a policy does not get on are acted by the tracker of its demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmdpd.policy.tracker import Follower, Scene, Track, nearest

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

_EARLIEST = 0.5  # lengths of the demonstration before which nothing is handed over
_STILL = 30  # steps for which a body stands still that does not get on, at least
_LONGER = 1.5  # times as long as it ever does in the demonstration, of which pauses are read as 20 steps
_WITHIN = 0.02  # metres, along each axis, within which it stands still


@dataclass
class _Course:
    """An episode under way."""

    start: FloatArray  # the first observation [S]
    last: int  # the time step that was acted at last
    place: list[float]  # [D], where the body stands still, or was last seen to move
    since: int  # the time step from which on it is there
    follower: Follower | None = None


class Takeover:
    """Which episodes the tracker has taken over, and what it does there.

    A policy may stand before the goal at another height, or press on where a task that it was trained on would end.
    Where the body has stood still for at least 30 steps, and 1.5 times as long as it ever does in the demonstration
    (which waits for its gripper to close, say), after half of the demonstration's length, or at the latest after
    `after` lengths, the tracker goes on from the moment of the demonstration that is most like the present one. Where
    the task is done already that is the last one, at which it stays.

    Args:
        tracks: [P] prompts, the tracks of each one's demonstrations, of which the longest counts, and the longest stand
            of any; of a prompt without any nothing is taken over, nor where the body does not move in any.
        scene: of their task.
        after: lengths after which it takes over at the latest.
        prompt_of: [episodes], which prompt each is under; None: all under the one.
    """

    def __init__(
        self, tracks: Sequence[Sequence[Track]], scene: Scene, after: float, prompt_of: IntArray | None
    ) -> None:
        self._tracks = [[track for track in prompt if track.gain > 0] for prompt in tracks]
        self._scene, self._prompt_of = scene, prompt_of
        lengths = [max(map(len, prompt), default=np.inf) for prompt in self._tracks]
        self._limits = [(min(_EARLIEST, after) * length, max(after * length, _STILL)) for length in lengths]
        self._within = _WITHIN / scene.metres
        stands = [max((longest_stand(track.body, self._within) for track in one), default=0) for one in self._tracks]
        self._still = [max(_STILL, int(_LONGER * stand)) for stand in stands]
        self._courses: dict[int, _Course] = {}

    def reset(self) -> None:
        """Forget every episode."""
        self._courses.clear()

    def forget(self, episode: int) -> None:
        """Forget one: it begins anew."""
        self._courses.pop(episode, None)

    def has(self, episode: int) -> bool:
        """Whether the tracker acts in an episode."""
        course = self._courses.get(episode)
        return course is not None and course.follower is not None

    def late(self, episodes: IntArray, steps: IntArray, observations: FloatArray) -> list[bool]:
        """Which of B episodes [B], at time steps [B] and in states [B, S], are the tracker's.

        To be called at every step: it looks whether the body moves. An episode whose time step goes back begins anew.
        """
        places = observations[:, self._scene.body].tolist()
        present = zip(episodes.tolist(), steps.tolist(), observations, places, strict=True)
        return [self._is_late(*one) for one in present]

    def _is_late(self, who: int, step: int, now: FloatArray, place: list[float]) -> bool:
        course = self._courses.get(who)
        if course is None or step < course.last or step == 0:
            course = self._courses[who] = _Course(now.copy(), step, place, step)
        else:
            for one, other in zip(place, course.place, strict=True):  # a generator would take twice the time
                if abs(one - other) > self._within:
                    course.place, course.since = place, step
                    break
        course.last = step
        if course.follower is not None:
            return True
        prompt = 0 if self._prompt_of is None else int(self._prompt_of[who])
        earliest, latest = self._limits[prompt]
        return step >= latest or (step >= earliest and step - course.since >= self._still[prompt])

    def act(self, episodes: IntArray, observations: FloatArray) -> FloatArray:
        """The actions [B, A] of episodes that it has taken over, in the environment's own numbers."""
        present = zip(episodes.tolist(), observations, strict=True)
        return np.stack([self._follower(who, now).act(now) for who, now in present])

    def _follower(self, who: int, now: FloatArray) -> Follower:
        course = self._courses[who]
        if course.follower is None:
            prompt = 0 if self._prompt_of is None else int(self._prompt_of[who])
            course.follower = nearest(self._tracks[prompt], self._scene, course.start, now)
        return course.follower


def longest_stand(places: FloatArray, within: float) -> int:
    """The most steps for which a body at places [T, D] stays `within` a distance, along each axis, of where it was."""
    since = longest = 0
    places = places.astype(np.float64)  # as an episode's places are compared
    for step, place in enumerate(places):
        if (np.abs(place - places[since]) > within).any():
            since = step
        longest = max(longest, step - since)
    return longest
