"""The native noise against the Python definition, which tests/ops/test_philox.py holds to published vectors."""

from __future__ import annotations

import numpy as np
import pytest

from llmdpd.ops import native
from llmdpd.ops.philox import philox_normal


@pytest.mark.parametrize("action_dim", range(1, 10))
def test_normals_agree_with_the_definition(rng: np.random.Generator, isa: str, action_dim: int) -> None:
    for seed in (0, 1, 2**63 - 1, int(rng.integers(2**63))):
        found = native.module().philox_normal(seed, 311, 16, action_dim)
        expected = philox_normal(seed, 1, 311, 16, action_dim)[:, 0]
        assert found.shape == expected.shape
        assert np.abs(found - expected.numpy()).max() <= 2e-6
