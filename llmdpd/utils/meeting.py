"""How the processes of one start find each other in a store that may hold what those of an earlier start left there."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

_FIRST = "llmdpd/first"
_PAUSE = 0.02  # seconds from one look into the store to the next


def fresh_store(store: Store, rank: int, count: int, patience: timedelta) -> Store:
    """The part of a store that belongs to the processes of this start alone.

    Where one of them failed, `torchrun` (PyTorch 2.13) starts all of them again on the same store. The addresses of
    those before still stand in it, and gloo would try to reach them. So the first process names a part of the store
    that nobody had, and the others follow a name only where the first confirms it to them: an old name still stands
    there until the first has written the new one.

    Args:
        store: one that all processes share. rank: the number of this process. count: how many there are.
        patience: how long the others are waited for.

    Raises:
        RuntimeError: they did not come, or the store is gone.
    """
    mine = uuid.uuid4().hex
    name = _call(store, mine, count, patience) if rank == 0 else _follow(store, mine, rank, patience)
    return PrefixStore(name, store)


def _call(store: Store, mine: str, count: int, patience: timedelta) -> str:
    answers = [f"{mine}/{rank}" for rank in range(1, count)]
    store.set(_FIRST, mine)
    store.wait(answers, patience)
    store.set(f"{mine}/all", ",".join(store.get(answer).decode() for answer in answers))
    return mine


def _follow(store: Store, mine: str, rank: int, patience: timedelta) -> str:
    end = time.monotonic() + patience.total_seconds()
    store.wait([_FIRST], patience)
    while time.monotonic() < end:
        first = store.get(_FIRST).decode()
        store.set(f"{first}/{rank}", mine)
        if store.check([f"{first}/all"]) and mine in store.get(f"{first}/all").decode().split(","):
            return first
        time.sleep(_PAUSE)
    raise RuntimeError(f"the first process did not confirm within {patience} that all are there")
