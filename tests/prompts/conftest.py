"""Fixtures of the prompts' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def seed(fresh_seed: int) -> int:
    """A seed of the test's own."""
    return fresh_seed


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
