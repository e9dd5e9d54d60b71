"""Fixtures of the prompts' tests."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest


@pytest.fixture
def seed() -> int:
    """A fresh seed; pytest shows the printed line where a test fails."""
    value = secrets.randbits(31)
    print(f"seed {value}")
    return value


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was used: {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(f"socket.socket.{name}", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "embeddings"
