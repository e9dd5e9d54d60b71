"""How much is evaluated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation at the end of a run."""

    episodes: int = 50
    """Episodes a task, for the last and for the best checkpoint each."""
    seen_episodes: int | None = None
    """Episodes a task that was trained on, where they are to be fewer (or more); by default as many."""
    max_steps: int = 500
    """Steps an episode at most; success at any of them counts. Meta-World ends at 500, locomotion at 1000."""
    videos: bool = True
    """Record a video of one episode a task where an off-screen renderer exists."""
    video_tasks: int = 8
    """Tasks of which a video is recorded at most: the unseen ones first."""

    def episodes_of(self, split: str) -> int:
        """Episodes of a task that is "seen" or "unseen"."""
        return self.seen_episodes if split == "seen" and self.seen_episodes is not None else self.episodes
