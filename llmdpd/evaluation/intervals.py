"""Intervals of confidence: Wilson's for a success probability, the bootstrap's for a mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from llmdpd.errors import InputError

BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 0
_Z2 = NormalDist().inv_cdf(0.975) ** 2


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success probability (E. B. Wilson, 1927), without continuity correction.

    Returns (low, high) as fractions within [0, 1]. Unlike mean ± 1.96 standard errors it stays inside [0, 1] and is
    not empty at 0 or all successes. Raises `InputError` unless 0 <= successes <= episodes and episodes >= 1.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise InputError(
            "no such count of successes", found=f"{successes} of {episodes}", expected="0 <= k <= n, n >= 1"
        )
    rate = successes / episodes
    centre = (rate + _Z2 / (2 * episodes)) / (1 + _Z2 / episodes)
    half = math.sqrt(_Z2 * (rate * (1 - rate) + _Z2 / (4 * episodes)) / episodes) / (1 + _Z2 / episodes)
    # At the ends the bound is exact in real numbers; rounding would put it a hair beside 0 or 1.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == episodes else centre + half
    return low, high


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean; None for fewer than two values.

    The resamples are the same at every call. Of three values there are ten different resamples, so the interval lies
    between the least and the greatest value and says little more than the three do.
    """
    if len(values) < 2:
        return None
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    chosen = generator.integers(0, len(values), (BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values, float)[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)
