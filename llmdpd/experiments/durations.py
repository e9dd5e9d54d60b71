"""How long cells take, judged by finished ones."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from llmdpd.experiments.cell import Cell


class Durations:
    """Seconds that finished cells took, each read once.

    Args:
        cells: of which those count that have finished.
    """

    def __init__(self, cells: Iterable[Cell] = ()) -> None:
        self._seconds: dict[tuple[str, str], dict[str, list[float]]] = {}
        for cell in cells:
            self.add(cell)

    def add(self, cell: Cell) -> None:
        """Note how long a cell took, if it has results and its time is known."""
        seconds = cell.run.notes().get("times", {}).get("total_seconds") if cell.records() else None
        if seconds is not None:
            self._seconds.setdefault(_kind(cell), {}).setdefault(cell.method, []).append(seconds)

    def left(self, cell: Cell) -> float | None:
        """Seconds until the cell is done, from the mean of finished runs of its method, else of its preset.

        None until such a run has finished. Iterations that the cell has done already are subtracted in proportion.
        """
        by_method = self._seconds.get(_kind(cell), {})
        if not by_method:
            return None
        of_kind = [seconds for group in by_method.values() for seconds in group]
        share_left = 1 - cell.iterations_done / cell.config.training.iterations
        return share_left * fmean(by_method.get(cell.method, of_kind))


def _kind(cell: Cell) -> tuple[str, str]:
    return cell.preset, cell.config.method.name
