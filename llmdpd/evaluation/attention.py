"""Attention maps: which steps of its demonstration a policy reads at each step of an episode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmdpd.errors import InputError
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_writer

with extra("report"):
    from matplotlib.figure import Figure


def save_attention(path: Path, weights: NDArray[np.float32], times: NDArray[np.float32], title: str) -> None:
    """Write a PNG of the weights f32 [L, heads, T] of an episode of L steps on T steps of a demonstration.

    A panel a head: time in the episode to the right, time in the demonstration (`times` [T]) upwards; larger weights
    are darker. A policy that follows its demonstration gives a rising line, one that waits a level one.

    Raises:
        InputError: arrays that do not fit together.
    """
    if weights.ndim != 3 or weights.shape[2] != len(times) or not weights.size:
        raise InputError(
            "no attention to draw",
            found=f"weights {weights.shape}, {len(times)} times",
            expected="[steps, heads, T] and T, none of them 0",
        )
    heads = weights.shape[1]
    figure = Figure(figsize=(1.2 + 2.2 * heads, 2.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, heads, sharey=True, squeeze=False)[0]
    inner = (times[1:] + times[:-1]) / 2
    edges = np.concatenate([[times[0] - 0.5], inner, [times[-1] + 0.5]])
    for number, axes in enumerate(panels):
        axes.pcolormesh(np.arange(len(weights) + 1), edges, weights[:, number].T, cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set_title(f"head {number + 1}", fontsize=9)
        axes.set_xlabel("step of the episode", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("step of the demonstration", fontsize=8)
    figure.suptitle(title, fontsize=9)
    with atomic_writer(path) as temporary:
        figure.savefig(temporary, format="png")
