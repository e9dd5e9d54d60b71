from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from llmdpd.prompts.cache import EmbeddingCache, EmbeddingKey, default_cache_folder

KEY = EmbeddingKey("minilm", "sha256:0", "mean", "Do.", "Task: ä", None, "float32")


@pytest.fixture
def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=384).astype(np.float32)


def test_what_was_put_is_got(cache_dir: Path, vector: np.ndarray) -> None:
    cache = EmbeddingCache(cache_dir)
    assert cache.get(KEY) is None
    cache.put(KEY, vector)
    found = EmbeddingCache(cache_dir).get(KEY)
    assert found is not None
    assert found.dtype == np.float32
    assert np.array_equal(found, vector)
    assert [file.name for file in cache_dir.iterdir()] == [f"{KEY.digest()}.safetensors"]


@pytest.mark.parametrize("field", [field.name for field in fields(EmbeddingKey)])
def test_every_part_of_the_key_counts(cache_dir: Path, vector: np.ndarray, field: str) -> None:
    cache = EmbeddingCache(cache_dir)
    cache.put(KEY, vector)
    value = 5 if field == "max_tokens" else getattr(KEY, field) + " "
    other = replace(KEY, **{field: value})
    assert cache.get(other) is None
    cache.path(KEY).rename(cache.path(other))
    assert cache.get(other) is None, "the file of another key"
    assert replace(KEY, instruction="ab", text="c").digest() != replace(KEY, instruction="a", text="bc").digest()


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, vector: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = EmbeddingCache(tmp_path / "file" / "embeddings")
    with caplog.at_level(logging.WARNING):
        cache.put(KEY, vector)
    assert "cannot keep" in caplog.text
    assert cache.get(KEY) is None


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "llmdpd" / "embeddings"
    assert EmbeddingCache().folder == default_cache_folder()
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert default_cache_folder() == tmp_path / "home" / ".cache" / "llmdpd" / "embeddings"


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "altered"),
        *[(lambda data, keep=keep: data[:keep], "cannot be read") for keep in (0, 3, 8, 100, -1)],
        (lambda data: save({"embedding": load(data)["embedding"]}), "another key"),  # without the header
        (lambda data: save({"other": load(data)["embedding"]}), "cannot be read"),
    ],
)
def test_a_damaged_or_foreign_file_is_noticed_and_replaced(
    cache_dir: Path, vector: np.ndarray, damage: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EmbeddingCache(cache_dir)
    cache.put(KEY, vector)
    path = cache.path(KEY)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get(KEY) is None
    assert message in caplog.text
    assert str(path) in caplog.text
    cache.put(KEY, vector)
    assert np.array_equal(cache.get(KEY), vector)


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where neither HOME nor the users' list has one
    assert default_cache_folder().is_absolute()


def test_a_cache_that_cannot_be_looked_into_is_empty(
    tmp_path: Path, vector: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EmbeddingCache(tmp_path / ("a" * 300))
    assert cache.get(KEY) is None
    cache.put(KEY, vector)
    assert "cannot keep an embedding" in caplog.text
