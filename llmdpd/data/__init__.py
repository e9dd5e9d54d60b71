"""Trajectory data: in memory (`trajectories`), and one module for each file format."""

from __future__ import annotations

from llmdpd.data.trajectories import Batch, EpisodeRecord, Trajectory, TrajectoryDataset

__all__ = ["Batch", "EpisodeRecord", "Trajectory", "TrajectoryDataset"]
