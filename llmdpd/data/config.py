"""Where a run's trajectories come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llmdpd.utils.bounds import Bounds, Episodes, Seed, WholeNumber, Workers


@dataclass(frozen=True)
class DataConfig:
    """Where the trajectories come from."""

    path: str | None = None
    """Data set to train on: a Minari folder, HDF5 of D4RL's layout, MTDiff files, minari:ID, d4rl:NAME. By default it
    is collected: by the suite's scripted experts, or in locomotion by SAC (see `llmdpd collect --policy sac`)."""
    demonstrations: str | None = None
    """Data set of the demonstrations for evaluation; by default collected, by the clean expert, or in locomotion the
    training data, of which the episode of the highest return is taken."""
    root: str = "data"
    """Folder under which collected data is kept, and found again."""
    episodes: Episodes = 200
    """Collected episodes a seen task."""
    demonstration_episodes: Episodes = 3
    """Collected episodes a task, seen and unseen, that demonstrations are taken from; never trained on."""
    noise: str = "clean:0.5,gaussian:0.3,bursts:0.2"
    """Mixture of demonstrators with their shares: clean, gaussian, bursts, random, slow … (see `llmdpd collect`)."""
    post_success_steps: WholeNumber = 20
    """Steps that a collected episode, of the training data or a demonstration, goes on after its first success."""
    seed: Seed = 0
    """Seed of the collection."""
    keep_failed: bool = False
    """Learn from episodes that failed, too."""
    fraction: Annotated[float, Bounds(1e-6, 1)] = 1.0
    """Share of each task's episodes that is learned from, at least one of each, drawn by `data.seed`; a smaller
    share is part of a greater one."""
    sac_steps: Annotated[int, Bounds(1, 100_000_000)] = 1_000_000
    """Steps of SAC at most, where it collects; it stops earlier where it reaches the medium level."""
    workers: Workers = None
    """Processes for collection and evaluation; one a core by default."""

    def check(self) -> None:
        """Raise `InputError` for a mixture that names an unknown demonstrator, or has a wrong share."""
        from llmdpd.data.collecting.scripted import parse_noise

        parse_noise(self.noise)
