from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
import pytest

from llmdpd.diffusion import native


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers each run; the seed is in the output of a test that fails."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled instruction set in turn, the best one again afterwards."""
    module = native.module()
    if request.param not in module.runnable_isas():
        pytest.skip(f"{request.param} can't run on this CPU")
    module.set_isa(request.param)
    yield request.param
    module.set_isa("")
