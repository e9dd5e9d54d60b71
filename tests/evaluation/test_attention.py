from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.evaluation.attention import save_attention


def test_a_rising_line_is_drawn_where_it_is(tmp_path: Path) -> None:
    steps, times = 60, np.linspace(0, 118, 60, dtype=np.float32)
    following = np.eye(steps, dtype=np.float32)[:, None]
    save_attention(tmp_path / "a.png", following, times, "follows")
    picture = imageio.imread(tmp_path / "a.png")[..., :3].astype(int)
    dark = np.argwhere((picture[..., 2] - picture[..., 0] > 60) & (picture[..., 0] < 60))
    rows, columns = dark[:, 0], dark[:, 1]
    assert len(dark) > 50
    assert np.corrcoef(rows, columns)[0, 1] < -0.95, "upwards to the right: rows of a picture count downwards"


def test_arrays_that_do_not_fit_and_the_smallest_that_do(tmp_path: Path) -> None:
    for shape, times in (((5, 2, 7), 6), ((0, 2, 7), 7), ((5, 7), 7)):
        with pytest.raises(InputError, match="attention"):
            save_attention(tmp_path / "a.png", np.zeros(shape, np.float32), np.arange(times, dtype=np.float32), "x")
    assert not list(tmp_path.iterdir())
    save_attention(tmp_path / "a.png", np.ones((1, 4, 1), np.float32), np.zeros(1, np.float32), "short")
    assert imageio.imread(tmp_path / "a.png").shape[1] == 1000
