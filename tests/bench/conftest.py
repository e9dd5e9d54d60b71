"""bench/ is a folder of scripts that import each other by name, and no package: it has to be on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))


@pytest.fixture(scope="session")
def bench_folder() -> Path:
    """Where the scripts lie."""
    return BENCH


@pytest.fixture
def double() -> Iterator[None]:
    """Everything that is made in the test is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
