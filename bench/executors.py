"""Cells of the smoke preset by processes of our own and by a local Ray whose workers are killed: all done, none twice?

    python bench/executors.py --folder FOLDER --json bench/results/executors-NAME.json

Half of the cells run by `--executor local`, all of them by `--executor ray`, where one worker is killed every minute,
and then the other half by `local`: what else the machine does falls on both. As many run at once on either side, with
one thread each, as far as there are cores. Data and text embeddings are made before. Held against each other are the
results of every cell, the time on the clock, Ray's start and end included, and the processor time of the processes.
--options are of llmdpd train.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import describe
from report import format_table, write_report

from llmdpd.experiments.cell import Cell
from llmdpd.experiments.executors import Resources, make_executor
from llmdpd.experiments.grids import Compared, Grid
from llmdpd.experiments.plan import Settings, make_plan
from llmdpd.experiments.scheduler import Outcome, Scheduler
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.files import read_json

GRID = Grid("Cells", "The smoke preset.", (Compared("smoke", "smoke", "smoke"),), protocols=("custom",), episodes=2)
_TICKS = os.sysconf("SC_CLK_TCK")


class Processes(threading.Thread):
    """Looks every half second at the processes that descend from this one.

    What one of them uses between the last look at it and its end is missed.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ticks: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()
        self.titles: dict[int, str] = {}

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.5)

    def look(self) -> None:
        with self._lock:
            found: dict[int, tuple[int, str, int]] = {}
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    try:
                        words = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                    except OSError:  # it has ended
                        continue
                    found[int(entry)] = (int(words[1]), words[19], int(words[11]) + int(words[12]))
            known = {pid for pid, start in self._ticks if pid in found and found[pid][1] == start} | {os.getpid()}
            grown = True
            while grown:
                more = {pid for pid, (parent, _, _) in found.items() if parent in known} - known
                known, grown = known | more, bool(more)
            self._ticks |= {(pid, found[pid][1]): found[pid][2] for pid in known}
            self.titles = {pid: _title(pid) for pid in known}

    @property
    def seconds(self) -> float:
        """Of processor time, up to now."""
        self.look()
        return sum(self._ticks.values()) / _TICKS


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


class Killer(threading.Thread):
    """Kills a Ray worker that runs a cell every so many seconds, until it is told to end."""

    def __init__(self, processes: Processes, seconds: float) -> None:
        super().__init__(daemon=True)
        self._processes, self._seconds = processes, seconds
        self._draw, self.over, self.kills = random.Random(0), threading.Event(), 0

    def run(self) -> None:
        while not self.over.wait(self._seconds):
            self._processes.look()
            workers = [pid for pid, title in self._processes.titles.items() if title.startswith("ray::Worker")]
            if workers:
                os.kill(self._draw.choice(sorted(workers)), signal.SIGKILL)
                self.kills += 1


@dataclass
class Side:
    """What became of one executor's cells."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    kills: int = 0
    outcomes: list[Outcome] = field(default_factory=list)


def run_cells(executor: str, cells: Sequence[Cell], options: argparse.Namespace, side: Side, looks: Processes) -> None:
    """Run cells to their end and add to a side what they took."""
    before, begin = looks.seconds, time.monotonic()
    killer = Killer(looks, options.kill_every)
    resources = Resources(options.at_once, threads=1, device="cpu")
    made = make_executor(executor, resources)
    if executor == "ray" and options.kill_every:
        killer.start()
    with StopSignals() as stop:
        side.outcomes += Scheduler(cells, made, cells[0].folder.parent / "logs", stop).execute()
    killer.over.set()
    made.close()
    side.seconds += time.monotonic() - begin
    side.cpu_seconds += looks.seconds - before
    side.kills += killer.kills


def judge(cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many cells are done, lost or done twice, by their outcomes and logs; and how often a worker was lost."""
    ends = collections.Counter(outcome.cell.name for outcome in outcomes if not outcome.failed_step)
    found = {"done": 0, "lost": 0, "twice": 0, "workers_lost": 0}
    for cell in cells:
        lines = (cell.folder.parent / "logs" / f"{cell.name}.log").read_text(errors="replace").splitlines()
        losses = sum(line.startswith("# the worker of this step was lost") for line in lines)
        begun = sum(line.startswith("$ python -m llmdpd.train") for line in lines)
        finished = sum(line.startswith("results: ") for line in lines)
        done = ends[cell.name] == 1 and cell.state == "done"
        found["done"] += done
        found["lost"] += not done
        found["twice"] += finished > 1 or begun > 1 + losses
        found["workers_lost"] += losses
    return found


def different(one: Sequence[Cell], other: Sequence[Cell]) -> list[str]:
    """The cells whose results are not the same in both grids, times and paths aside."""
    return [a.name for a, b in zip(one, other, strict=True) if _records(a) != _records(b)]


def _records(cell: Cell) -> list[dict[str, Any]]:
    records = read_json(cell.run.results)["records"]
    return [{**record, "wall_seconds": None, "prompts": None} for record in records]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where a cell is lost, done twice, or comes to something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds; 0: none is killed")
    parser.add_argument("--folder", type=Path, required=True, help="of all runs; what is in it of an earlier call goes")
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args(words)
    grids = {}
    for name in ("first", "local", "ray"):
        shutil.rmtree(options.folder / name, ignore_errors=True)
        settings = Settings(
            "cells",
            seeds=1 if name == "first" else options.cells,
            out=(options.folder / name).absolute(),
            data_root=options.folder / "data",
            options=tuple(options.options),
        )
        grids[name] = make_plan(settings, {"cells": GRID}).runnable
    looks = Processes()
    looks.start()
    first, sides = Side(), {"local": Side(), "ray": Side()}
    run_cells("local", grids["first"], options, first, looks)
    half, load = options.cells // 2, [os.getloadavg()[0]]
    run_cells("local", grids["local"][:half], options, sides["local"], looks)
    load.append(os.getloadavg()[0])
    run_cells("ray", grids["ray"], options, sides["ray"], looks)
    load.append(os.getloadavg()[0])
    run_cells("local", grids["local"][half:], options, sides["local"], looks)
    found = {name: judge(grids[name], side.outcomes) for name, side in sides.items()}
    unlike = different(grids["local"], grids["ray"])
    report = {
        "benchmark": "executors",
        "machine": describe(torch.device("cpu")),
        "load": [*load, os.getloadavg()[0]],
        "settings": {name: str(value) for name, value in vars(options).items() if name not in ("json", "folder")},
        "sides": {
            name: {"seconds": side.seconds, "cpu_seconds": side.cpu_seconds, "kills": side.kills, **found[name]}
            for name, side in sides.items()
        },
        "different_results": unlike,
        "ratio": sides["ray"].seconds / sides["local"].seconds,
        "cpu_ratio": sides["ray"].cpu_seconds / sides["local"].cpu_seconds,
    }
    rows = [
        [name, f"{side.seconds:.0f} s", f"{side.cpu_seconds:.0f} s", str(side.kills), *map(str, found[name].values())]
        for name, side in sides.items()
    ]
    print(format_table(["", "clock", "processors", "kills", *found["ray"]], rows))
    print(f"ray / local: {report['ratio']:.3f} on the clock, {report['cpu_ratio']:.3f} of processor time")
    print(f"cells with other results: {', '.join(unlike) or 'none'}; load {report['load']}")
    if options.json:
        write_report(options.json, report)
    wrong = bool(unlike) or any(each["lost"] or each["twice"] for each in found.values())
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
