"""A scene seen in several turned and mirrored views at once, and what is done in them brought back to one.

A policy that learned from turned scenes ought to do the same in each, turned. On tasks that it never saw it does not
quite. By the mean over the views it does; what that is worth: docs/generalisation.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.prompts.demonstration import TrajectoryTokens
from llmdpd.tasks.metaworld.scene import turned, turned_actions, view_matrices

_STREAM = 0x9E3779B97F4A7C15  # odd, so that no two views of a seed meet


def tokens_in_views(tokens: TrajectoryTokens, views: int) -> TrajectoryTokens:
    """P examples in V views, one view after the other: tokens of V P examples, without returns."""
    matrices = view_matrices(views)

    def seen(part: Tensor, turn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        each = part.expand(views, *part.shape).flatten(1, 2)
        return turn(each, matrices).unflatten(1, part.shape[:2]).flatten(0, 1)

    def same(part: Tensor) -> Tensor:
        return part.repeat(views, *(1,) * (part.dim() - 1))

    return TrajectoryTokens(
        states=seen(tokens.states, turned),
        actions=seen(tokens.actions, turned_actions),
        phase=same(tokens.phase),
        times=same(tokens.times),
        mask=same(tokens.mask),
        padded=tokens.padded,
    )


def observations_in_views(observations: NDArray[np.float32], views: int) -> NDArray[np.float32]:
    """Observations [B, 39] in V views, one view after the other: [V B, 39]."""
    states = torch.from_numpy(observations).expand(views, *observations.shape)
    return turned(states, view_matrices(views)).flatten(0, 1).numpy()


def seeds_in_views(seeds: NDArray[np.int64], views: int) -> NDArray[np.int64]:
    """Seeds [B] of V views [V B], all their own; the first view's are those given."""
    steps = np.arange(views, dtype=np.uint64)[:, None] * np.uint64(_STREAM)
    return (seeds.view(np.uint64) + steps).view(np.int64).ravel()


def mean_over_views(actions: NDArray[np.float32], views: int) -> NDArray[np.float32]:
    """Actions [V B, H, 4] of V views, one after the other, turned back and averaged: [B, H, 4]."""
    batch, chunk, width = len(actions) // views, *actions.shape[1:]
    drawn = torch.from_numpy(actions).view(views, batch * chunk, width)
    back = turned_actions(drawn, view_matrices(views).transpose(1, 2))
    return back.mean(0).view(batch, chunk, width).numpy()
