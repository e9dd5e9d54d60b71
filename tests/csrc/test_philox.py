"""The native noise against published vectors, a numpy copy of its definition, and the Python oracle."""

from __future__ import annotations

import numpy as np
import pytest

from llmdpd.ops import native
from llmdpd.ops.philox import philox_normal as oracle_normal

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = 0x299F31D0_A4093822
# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Counters uint64 [..., 4] holding 32-bit words -> the same shape."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    key0, key1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key0), product1 & mask
        c2, c3 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1), product0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def normals(key: int, rows: int, draws: int, action_dim: int) -> np.ndarray:
    """[draws, rows, action_dim] in float64."""
    blocks = -(-action_dim // 4)
    draw, row, block = np.meshgrid(np.arange(draws), np.arange(rows), np.arange(blocks), indexing="ij")
    words = philox4x32(np.stack([row, draw, block, np.zeros_like(row)], axis=-1), key) >> np.uint64(8)
    radius = np.sqrt(-2.0 * np.log((words[..., 0::2] + np.uint64(1)) * 2.0**-24))
    angle = 2.0 * np.pi * (words[..., 1::2] * 2.0**-24)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(draws, rows, blocks * 4)[..., :action_dim]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: int, expected: tuple[int, ...]) -> None:
    assert tuple(philox4x32(np.array(counter), key)) == expected


@pytest.mark.parametrize("action_dim", range(1, 10))
def test_normals_agree_with_float64(rng: np.random.Generator, isa: str, action_dim: int) -> None:
    key = int(rng.integers(2**64, dtype=np.uint64))
    ours = native.module().philox_normal(key, 311, 16, action_dim)
    assert ours.shape == (16, 311, action_dim)
    assert np.abs(ours - normals(key, 311, 16, action_dim)).max() <= 2e-6


def test_normals_agree_with_the_python_oracle(rng: np.random.Generator) -> None:
    for seed in [0, 1, 2**63 - 1, int(rng.integers(2**62))]:
        ours = native.module().philox_normal(seed, 5 * 7, 6, 9)
        theirs = oracle_normal(seed, 5, 7, 6, 9).numpy().reshape(6, 35, 9)
        assert np.abs(ours - theirs).max() <= 2e-6


def test_normals_are_standard_normal(rng: np.random.Generator) -> None:
    draws = native.module().philox_normal(int(rng.integers(2**63)), 50_000, 2, 4).reshape(-1, 4).astype(np.float64)
    # Six standard errors of each estimate.
    count = len(draws)
    assert np.abs(draws.mean(axis=0)).max() < 6 / np.sqrt(count)
    covariance = draws.T @ draws / count
    assert np.abs(covariance - np.eye(4)).max() < 6 * np.sqrt(2 / count)
    assert abs((draws**4).mean() - 3) < 6 * np.sqrt(96 / draws.size)
