"""Statistics of observations that come in blocks, against those of all at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmdpd.nn import statistics
from llmdpd.nn.statistics import QUANTILE, extent, robust_statistics


class InPieces:
    """Rows as from a disk."""

    def __init__(self, rows: torch.Tensor, size: int) -> None:
        self.rows, self.size, self.passes = rows, size, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.passes += 1
        return iter(self.rows.split(self.size))


@pytest.mark.parametrize("count", [1, 7, 999, 1000, 5003, 30_000])
def test_blocks_give_what_all_at_once_does(
    count: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantiles to the bit; a few glitches count as those, of one number among several."""
    monkeypatch.setattr(statistics, "BLOCK", 512)
    rows = torch.from_numpy(rng.normal([0, 1e4, 3, 0], [1, 1e-2, 1, 5], (count, 4)).astype(np.float32))
    rows[:, 3] = rows[:, 3].round()
    beyond = int(count * QUANTILE)
    if beyond:
        rows[rng.permutation(count)[:beyond], 2] = 1e30
    pieces = InPieces(rows, 512)
    found, again = robust_statistics(pieces), robust_statistics(rows)
    assert pieces.passes == (2 if beyond else 1), "one pass, where no outlier is left out"
    low, high = rows.amin(0), rows.amax(0)
    if beyond:
        low[2], high[2] = rows[:, 2].kthvalue(beyond + 1).values, rows[:, 2].kthvalue(count - beyond).values
    clipped = rows.clamp(low, high).double()
    assert torch.equal(found.low, low)
    assert torch.equal(found.high, high)
    torch.testing.assert_close(found.mean, clipped.mean(0).float(), rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(found.std, clipped.std(0, correction=0).float(), rtol=3e-7, atol=1e-7)
    for name in ("low", "high", "mean", "std"):
        assert torch.equal(getattr(found, name), getattr(again, name))
    assert torch.equal(torch.stack(extent(pieces)), torch.stack([rows.amin(0), rows.amax(0)]))
