"""Training by several processes against one that uses all cores: the default preset, batches of a data set and all.

    python bench/scale.py --processes 2 --json bench/results/scale-NAME.json

One process with a thread a core, and N processes by gloo that share its batches and the cores, take turns of some
iterations on made-up episodes of Meta-World's sizes; while one side runs the other one waits. Reported are the medians
of the turns' rates, and the median of the ratios of turns that follow each other; the weights of both in the end are
compared. All processes are copies of one, so that only the number of them differs.

On a machine that has other work, take turns of one iteration with a pause before each (--iterations 1 --pause 0.2):
who has waited is served at once. "Least disturbed" are then the fastest tenth of each side's turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import resource
import socket
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import retrieval
import seeds
import torch
from machine import Others, describe
from report import format_table, write_report

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.ops import native
from llmdpd.training.batches import BatchSampler
from llmdpd.training.sharing import SharedUpdate, own_share
from llmdpd.utils import ranks
from llmdpd.utils.cores import usable_cores

CPU = torch.device("cpu")
TASKS, EPISODES, STEPS = 45, 8, 80


def made_up(tasks: int, rng: np.random.Generator) -> TrajectoryDataset:
    """Episodes of random numbers, of Meta-World's sizes."""
    records = []
    for task in range(tasks):
        for _ in range(EPISODES):
            observations = 0.3 * rng.normal(size=(STEPS + 1, retrieval.STATE))
            actions = rng.uniform(-1, 1, (STEPS, retrieval.ACTION))
            rewards = rng.uniform(0, 1, STEPS)
            records.append(
                EpisodeRecord(observations, actions, rewards, f"task-{task}", expert_actions=actions, success=1)
            )
    return join_episodes(records, source="made up")


class Side:
    """One side of the comparison: processes that train together, started and waiting.

    Args:
        count: of processes. threads: of each. quick: tiny networks.
    """

    def __init__(self, count: int, threads: int, quick: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        copies = multiprocessing.get_context("fork")
        self.iterations = 0
        self._ends = [copies.Pipe() for _ in range(count)]
        self._processes = [
            copies.Process(target=_train, args=(end, rank, count, port, threads, quick), daemon=True)
            for rank, (_, end) in enumerate(self._ends)
        ]
        for process in self._processes:
            process.start()
        for _, end in self._ends:  # so that a process that dies ends the waiting for it
            end.close()

    def turn(self, iterations: int, pause: float = 0.0) -> tuple[float, float]:
        """Seconds on the clock that so many iterations take, and of CPU time over all processes."""
        time.sleep(pause)
        begin = time.perf_counter()
        spent = sum(self._ask(iterations))
        self.iterations += iterations
        return time.perf_counter() - begin, spent

    def weights(self) -> torch.Tensor:
        """The policy's, in one row."""
        return torch.from_numpy(self._ask(0)[0])

    def close(self) -> None:
        """End the processes."""
        for end, _ in self._ends:
            end.send(None)
        for process in self._processes:
            process.join()

    def _ask(self, iterations: int) -> list[Any]:
        for end, _ in self._ends:
            end.send(iterations)
        return [end.recv() for end, _ in self._ends]


def _train(end: Connection, rank: int, count: int, port: int, threads: int, quick: bool) -> None:
    """A process of a side: trains as it is told, and answers with the CPU time, or with the weights."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    native.use_threads(threads)
    torch.manual_seed(0)
    config = dataclasses.replace(retrieval.method(quick), lr_warmup=0)
    dataset = made_up(6 if quick else TASKS, np.random.default_rng(0))
    learner = LLMDPD(retrieval.network_of(config, CPU), config, retrieval.ITERATIONS)
    with ranks.joined():
        share = own_share(LLMDPD, config)
        batches = _batches(dataset, config, share)
        trained = learner if share is None else SharedUpdate(learner, share)
        done = 0
        while (iterations := end.recv()) is not None:
            if iterations == 0:
                end.send(torch.cat([weight.detach().flatten() for weight in learner.policy.parameters()]).numpy())
                continue
            before = _cpu_seconds()
            for _ in range(iterations):
                trained.update(batches.next(), done)
                ranks.greatest(0)  # as the training loop asks for a stop
                done += 1
            end.send(_cpu_seconds() - before)


def _batches(dataset: TrajectoryDataset, config: LLMDPDConfig, share: Any) -> BatchSampler:
    context = config.network.context
    return BatchSampler(
        dataset,
        torch.randn(len(dataset.tasks), retrieval.TEXT),
        context.encoder,
        config.batch_size,
        config.prompts_per_batch,
        seed=0,
        device=CPU,
        augmentation=(config.augmentation, retrieval.LAYOUT),
        dropout=(context.text_dropout, context.trajectory_dropout),
        layout=retrieval.LAYOUT,
        self_prompted=config.self_prompted,
        share=share,
    )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=0, help="instead, so many seeds in one process: bench/seeds.py")
    parser.add_argument("--batch", type=int, default=64, help="of each seed")
    parser.add_argument("--turns", type=int, default=30, help="of each side")
    parser.add_argument("--iterations", type=int, default=20, help="a turn")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each turn")
    parser.add_argument("--quick", action="store_true", help="tiny networks: whether it runs")
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    options = parser.parse_args(words)
    if options.seeds:
        return seeds.compare(options, made_up(6 if options.quick else TASKS, np.random.default_rng(0)))
    cores, others = usable_cores(), Others()
    sides = {"one": Side(1, cores, options.quick)}
    sides["several"] = Side(options.processes, max(1, cores // options.processes), options.quick)
    for side in sides.values():
        side.turn(3)
    turns: list[dict[str, tuple[float, float]]] = []
    for number in range(options.turns):
        order = list(sides) if number % 2 else list(sides)[::-1]
        turns.append({name: sides[name].turn(options.iterations, options.pause) for name in order})
    one, several = (side.weights() for side in sides.values())
    for side in sides.values():
        side.close()
    tenths = {name: float(np.quantile([turn[name][0] for turn in turns], 0.1)) for name in sides}
    report: dict[str, Any] = {
        "benchmark": "scale",
        "machine": describe(CPU),
        "others": others.share(),
        "settings": {
            **{k: v for k, v in vars(options).items() if k != "json"},
            "config": repr(retrieval.method(options.quick)),
        },
        "rates": {name: options.iterations / statistics.median(turn[name][0] for turn in turns) for name in sides},
        "ratio": _quantiles([turn["one"][0] / turn["several"][0] for turn in turns]),
        "least_disturbed": {
            **{name: options.iterations / tenth for name, tenth in tenths.items()},
            "ratio": tenths["one"] / tenths["several"],
        },
        "cpu_seconds_an_iteration": {
            name: statistics.median(turn[name][1] for turn in turns) / options.iterations for name in sides
        },
        "same_result": {
            "iterations": sides["one"].iterations,
            "root_mean_square_weight": float(one.square().mean().sqrt()),
            "root_mean_square_difference": float((one - several).square().mean().sqrt()),
        },
        "turns": turns,
    }
    names = {"one": f"1 process, {cores} threads", "several": f"{options.processes} processes"}
    cpu = report["cpu_seconds_an_iteration"]
    rows = [[names[name], f"{report['rates'][name]:.1f}", f"{1e3 * cpu[name]:.1f} ms"] for name in sides]
    print(format_table(["", "iterations/s", "CPU an iteration"], rows))
    print(f"ratio: {report['ratio']}; least disturbed: {report['least_disturbed']}")
    print(f"others took {report['others']:.0%} of the CPU; {report['same_result']}")
    if options.json:
        write_report(options.json, report)
    return 0


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = (float(value) for value in np.quantile(values, (0.2, 0.5, 0.8)))
    return {"p20": low, "median": median, "p80": high}


if __name__ == "__main__":
    raise SystemExit(main())
