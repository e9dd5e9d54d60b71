"""Processes that start again on a store find those of their own start, whatever the earlier ones left there."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
from torch._C._distributed_c10d import HashStore, Store

from llmdpd.utils.meeting import fresh_store

PATIENCE = timedelta(seconds=60)


def met(store: Store, delays: list[float]) -> list[Store]:
    def start(rank: int) -> Store:
        time.sleep(delays[rank])
        return fresh_store(store, rank, len(delays), PATIENCE)

    with ThreadPoolExecutor(len(delays)) as threads:
        return list(threads.map(start, range(len(delays))))


def test_each_start_has_a_part_of_its_own(rng: np.random.Generator) -> None:
    store = HashStore()
    for attempt in range(12):
        # Every second time the first process comes last: the others find what an earlier start left.
        delays = (rng.uniform(0, 0.05, 3) + np.array([0.1 * (attempt % 2), 0, 0])).tolist()
        own = met(store, delays)
        assert not own[1].check(["address"]), "what an earlier start left there"
        own[0].set("address", str(attempt))
        assert [each.get("address").decode() for each in own] == [str(attempt)] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_patience_ends(rank: int) -> None:
    store = HashStore()
    met(store, [0, 0])  # of which the names still stand there
    with pytest.raises(RuntimeError):
        fresh_store(store, rank, 2, timedelta(seconds=0.3))
