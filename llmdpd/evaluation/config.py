"""How much is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from llmdpd.utils.bounds import Bounds, Count, Episodes, OptionalEpisodes


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation at the end of a run."""

    episodes: Episodes = 50
    """Episodes a task, for the last and for the best checkpoint each."""
    seen_episodes: OptionalEpisodes = None
    """Episodes a task that was trained on, where they are to be fewer (or more); by default as many."""
    max_steps: Annotated[int | None, Bounds(1)] = None
    """Steps an episode at most; success at any of them counts. By default the tasks' own limit."""
    videos: bool = True
    """Record a video of one episode a task where an off-screen renderer exists."""
    video_tasks: Count = 8
    """Tasks of which a video is recorded at most: the unseen ones first."""

    mode: Literal["auto", "rollout", "offline", "none"] = "auto"
    """`rollout`: episodes in the environments. `offline`: how near actions come to those of recorded episodes, a tenth,
    held out of training. `auto`: rollout where every task has an environment, else offline. `none`: nothing."""

    def episodes_of(self, split: str) -> int:
        """Episodes of a task that is "seen" or "unseen"."""
        return self.seen_episodes if split == "seen" and self.seen_episodes is not None else self.episodes
