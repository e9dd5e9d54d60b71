"""Seeds at once against one after another, in one process: Diffusion-QL's size, batches of a data set and all.

    python bench/scale.py --seeds 8 --json bench/results/seeds-NAME.json

One after another each seed's learner does the turn's iterations alone, with a thread a core; at once all of them do
theirs together (`llmdpd.methods.llmdpd.stack`). The two take turns; in the end the weights of both are compared.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from counting import Sizes
from machine import Others, describe
from report import format_table, write_report
from workloads import diffusion_ql

from llmdpd.data import TrajectoryDataset
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.ops import native
from llmdpd.training.batches import BatchSampler
from llmdpd.training.together import Generators
from llmdpd.utils.cores import usable_cores

CPU = torch.device("cpu")


class _Seed:
    """A learner, its batches and its random numbers."""

    def __init__(self, number: int, sizes: Sizes, batches: BatchSampler, rows: int) -> None:
        torch.manual_seed(number)
        training = diffusion_ql(sizes, CPU, rows)
        self.learner, self.done = training.learner, training.iteration
        self.batches, self.generators = batches.with_seed(number), Generators(CPU)

    def iterate(self, iterations: int) -> None:
        """So many iterations alone."""
        with self.generators.active():
            for _ in range(iterations):
                self.learner.update(self.batches.next(), self.done)
                self.done += 1


def _at_once(seeds: list[_Seed]) -> Callable[[int], None]:
    stack = LLMDPD.stacked([seed.learner for seed in seeds])
    assert stack is not None
    generators = [seed.generators.cpu for seed in seeds]

    def iterate(iterations: int) -> None:
        for _ in range(iterations):
            stack.update([seed.batches.next() for seed in seeds], seeds[0].done, generators)
            for seed in seeds:
                seed.done += 1

    return iterate


def _turn(work: Callable[[], object], pause: float) -> tuple[float, float]:
    """Seconds on the clock, and of CPU time."""
    time.sleep(pause)
    begin, before = time.perf_counter(), _cpu_seconds()
    work()
    return time.perf_counter() - begin, _cpu_seconds() - before


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def compare(options: argparse.Namespace, dataset: TrajectoryDataset) -> int:
    """Measure, print, write; 0. Options: seeds, batch, turns, iterations, pause, quick, json."""
    cores, others = usable_cores(), Others()
    native.use_threads(cores)
    sizes = Sizes(hidden=16) if options.quick else Sizes()
    batches = BatchSampler(dataset, None, None, options.batch, 1, 0, CPU)
    alone, together = ([_Seed(n, sizes, batches, options.batch) for n in range(options.seeds)] for _ in range(2))
    at_once = _at_once(together)

    def one_after_another(iterations: int) -> None:
        for seed in alone:
            seed.iterate(iterations)

    sides: dict[str, Callable[[int], None]] = {"one after another": one_after_another, "at once": at_once}
    for work in sides.values():
        work(3)
    turns: list[dict[str, tuple[float, float]]] = []
    for number in range(options.turns):
        order = list(sides) if number % 2 else list(sides)[::-1]
        turns.append({name: _turn(partial(sides[name], options.iterations), options.pause) for name in order})
    equal = all(
        torch.equal(own, other)
        for one, another in zip(alone, together, strict=True)
        for own, other in zip(_weights(one.learner), _weights(another.learner), strict=True)
    )
    report: dict[str, Any] = {
        "benchmark": "seeds at once",
        "machine": describe(CPU),
        "others": others.share(),
        "settings": {k: v for k, v in vars(options).items() if k != "json"},
        "same_bits": equal,
        "turns": turns,
    }
    rows = []
    for place, kind in enumerate(("seconds", "cpu_seconds")):
        of = {name: [turn[name][place] / options.iterations for turn in turns] for name in sides}
        ratios = [turn["one after another"][place] / turn["at once"][place] for turn in turns]
        low, high = (float(np.quantile(ratios, share)) for share in (0.2, 0.8))
        tenths = {name: float(np.quantile(values, 0.1)) for name, values in of.items()}
        report[kind] = {
            "an_iteration_of_all": {name: statistics.median(values) for name, values in of.items()},
            "ratio": {"p20": low, "median": statistics.median(ratios), "p80": high},
            "least_disturbed": {**tenths, "ratio": tenths["one after another"] / tenths["at once"]},
        }
        found = report[kind]
        rows += [[kind, name, f"{1e3 * seconds:.1f} ms"] for name, seconds in found["an_iteration_of_all"].items()]
        print(f"{kind}, ratio: {found['ratio']}; least disturbed: {found['least_disturbed']}")
    print(format_table(["", f"{options.seeds} seeds", "an iteration of all"], rows))
    print(f"others took {report['others']:.0%} of the CPU; the same bits: {equal}")
    if options.json:
        write_report(options.json, report)
    return 0


def _weights(learner: LLMDPD) -> list[torch.Tensor]:
    return [tensor for module in learner.modules.values() for tensor in module.state_dict().values()]
