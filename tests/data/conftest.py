"""Small random data sets, and robots' recordings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import robot_files

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes

MakeDataset = Callable[..., TrajectoryDataset]


@pytest.fixture
def make_dataset(rng: np.random.Generator) -> MakeDataset:
    """A data set with one episode for each (task, length)."""

    def make(
        episodes: tuple[tuple[str, int], ...] = (("push-v3", 5), ("reach-v3", 1), ("push-v3", 7), ("sweep-v3", 3)),
        *,
        state_dim: int = 39,
        action_dim: int = 4,
        expert: bool = True,
        **keywords: object,
    ) -> TrajectoryDataset:
        outcomes = [int(rng.integers(-1, 2)) for _ in episodes]
        records = [
            EpisodeRecord(
                observations=rng.normal(size=(length + 1, state_dim)),
                actions=rng.uniform(-1, 1, size=(length, action_dim)),
                rewards=rng.normal(size=length),
                task=task,
                terminated=number % 2 == 1,
                expert_actions=rng.uniform(-1, 1, size=(length, action_dim)) if expert else None,
                noise_level=float(rng.uniform()),
                success=outcomes[number],
                success_step=int(rng.integers(-1, length)) if outcomes[number] == 1 else -1,
                seed=int(rng.integers(0, 2**62)),
            )
            for number, (task, length) in enumerate(episodes)
        ]
        return join_episodes(records, **keywords)  # type: ignore[arg-type]

    return make


@pytest.fixture
def random_demo(rng: np.random.Generator) -> Callable[..., robot_files.Arrays]:
    """See `robot_files.random_demo`, without its generator."""
    return lambda *args, **keywords: robot_files.random_demo(rng, *args, **keywords)


@pytest.fixture
def write_robomimic() -> Callable[..., Path]:
    """See `robot_files.write_robomimic`."""
    return robot_files.write_robomimic


@pytest.fixture
def random_recording(rng: np.random.Generator) -> Callable[..., robot_files.Arrays]:
    """See `robot_files.random_recording`, without its generator."""
    return lambda *args, **keywords: robot_files.random_recording(rng, *args, **keywords)


@pytest.fixture
def write_lerobot() -> Callable[..., Path]:
    """See `robot_files.write_lerobot`."""
    return robot_files.write_lerobot
