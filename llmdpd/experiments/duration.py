"""About how long cells will take, from what finished runs of the experiment recorded."""

from __future__ import annotations

from collections.abc import Iterable

from llmdpd.experiments.cell import Cell
from llmdpd.utils.files import read_json


def seconds_left(cell: Cell, known: Iterable[Cell]) -> float | None:
    """Seconds until the cell is done, from the mean of finished runs of its method, else of its preset.

    None until such a run has finished. Iterations that the cell has done already are subtracted in proportion.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    for other in known:
        if other.preset == cell.preset and other.config.method.name == cell.config.method.name and other.records():
            seconds = read_json(other.run.meta).get("times", {}).get("total_seconds")
            if seconds is not None:
                times[other.method == cell.method].append(seconds)
    found = times[True] or times[False]
    if not found:
        return None
    share_left = 1 - cell.iterations_done / cell.config.training.iterations
    return share_left * sum(found) / len(found)
