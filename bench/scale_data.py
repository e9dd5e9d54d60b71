"""Batches of data on the disk (shards) against the same data in memory; and the memory that a large data set takes.

    python bench/scale_data.py --transitions 10_000_000 --compare --json bench/results/scale-data-NAME.json

Made-up episodes of Meta-World's sizes (39 + 4 numbers, the expert's action beside) are written as shards into --folder,
which is removed at the end. With --compare, what is read from the disk, its page cache warm, and what lies in memory
take turns in one process; reported are the medians of the turns' rates and of the ratios of turns that follow each
other. Then a fresh process opens the data as a run does, takes its statistics and draws batches: the most anonymous
memory that it had is reported, and the pages of files beside it, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import retrieval
import torch
from machine import Others, describe
from report import format_table, write_report

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_datasets, join_episodes, load_dataset, save_shards
from llmdpd.nn.features import StateFeatures
from llmdpd.nn.statistics import ColumnBlocks
from llmdpd.training.batches import BatchSampler

CPU = torch.device("cpu")
TASKS, STEPS, AT_ONCE = 45, 100, 1_000_000
BATCH, PROMPTS, WINDOW = 480, 12, 20
STAGES = ("imported", "opened", "statistics", "batches")


def made_up(transitions: int) -> Iterator[TrajectoryDataset]:
    """Episodes of random numbers, in parts of at most a million transitions."""
    for part, start in enumerate(range(0, transitions, AT_ONCE)):
        rng = np.random.default_rng(part)
        episodes = max(TASKS, min(AT_ONCE, transitions - start) // STEPS)
        observations = rng.random((episodes, STEPS + 1, retrieval.STATE), np.float32)
        actions = rng.random((episodes, STEPS, retrieval.ACTION), np.float32)
        rewards = rng.random((episodes, STEPS), np.float32)
        yield join_episodes(
            EpisodeRecord(
                *(observations[e], actions[e], rewards[e], f"task-{e % TASKS}"), expert_actions=actions[e], success=1
            )
            for e in range(episodes)
        )


def sampler_of(dataset: TrajectoryDataset, horizon: int = 0) -> BatchSampler:
    """The default preset's batches, or those of a method that learns from windows."""
    context = retrieval.METHOD.network.context
    return BatchSampler(
        dataset,
        torch.zeros(len(dataset.tasks), retrieval.TEXT),
        context.encoder if not horizon else None,
        BATCH,
        PROMPTS,
        seed=0,
        device=CPU,
        horizon=horizon,
        layout=retrieval.LAYOUT,
        self_prompted=0.0 if horizon else retrieval.METHOD.self_prompted,
    )


def compare(folder: Path, transitions: int, turns: int, seconds: float) -> dict[str, Any]:
    """Rates of both sides, by what is read."""
    sides = {"memory": join_datasets(list(made_up(transitions))), "shards": load_dataset(folder)}
    rng = np.random.default_rng(0)

    def transitions_of(dataset: TrajectoryDataset) -> Callable[[], Any]:
        return lambda: dataset.gather(rng.integers(dataset.num_transitions, size=BATCH))

    kinds: dict[str, Callable[[TrajectoryDataset], Callable[[], Any]]] = {
        f"{BATCH} transitions": transitions_of,
        "a batch of the default preset": lambda dataset: sampler_of(dataset).next,
        f"a batch of windows of {WINDOW} steps": lambda dataset: sampler_of(dataset, WINDOW).next,
    }
    found: dict[str, Any] = {}
    for kind, make in kinds.items():
        calls = {name: make(dataset) for name, dataset in sides.items()}
        others = Others()
        rates = [{name: _rate(call, seconds) for name, call in _in_turn(calls, number)} for number in range(turns + 1)]
        ratios = [turn["shards"] / turn["memory"] for turn in rates[1:]]  # the first one warms up
        found[kind] = {
            **{name: statistics.median(turn[name] for turn in rates[1:]) for name in sides},
            "ratio": {name: float(np.quantile(ratios, q)) for name, q in (("p20", 0.2), ("median", 0.5), ("p80", 0.8))},
            "others": others.share(),
        }
    return found


def _in_turn(calls: dict[str, Callable[[], Any]], number: int) -> list[tuple[str, Callable[[], Any]]]:
    return list(calls.items()) if number % 2 else list(calls.items())[::-1]


def _rate(call: Callable[[], Any], seconds: float) -> float:
    """Calls a second of this process's processor time: other programs then do not count."""
    count, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < seconds:
        call()
        count += 1
    return count / spent


def resident(folder: Path, batches: int) -> dict[str, Any]:
    """Megabytes of this process and seconds, by what was done up to then, as a run that reads the data does it."""
    most, done = {"anonymous": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most["anonymous"] = max(most["anonymous"], _memory()["RssAnon"])

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    begin, found = time.perf_counter(), dict[str, Any]()

    def note(stage: str) -> None:
        memory = _memory()
        found[stage] = {"anonymous": memory["RssAnon"], "files": memory["RssFile"]}
        found[stage]["seconds"] = round(time.perf_counter() - begin, 1)
        print(f"{stage}: {found[stage]}", file=sys.stderr, flush=True)

    note(STAGES[0])
    dataset = load_dataset(folder)
    note(STAGES[1])
    StateFeatures(dataset.state_dim).fit(ColumnBlocks(dataset.observations))
    note(STAGES[2])
    for sampler in (sampler_of(dataset), sampler_of(dataset, WINDOW)):
        for _ in range(batches):
            sampler.next()
    note(STAGES[3])
    done.set()
    watching.join()
    return {"transitions": dataset.num_transitions, "stages": found, "most_anonymous": most["anonymous"]}


def _memory() -> dict[str, float]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines}


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the shards are written; by default a temporary folder")
    parser.add_argument("--compare", action="store_true", help="with the same data in memory, twice as large there")
    parser.add_argument("--turns", type=int, default=20, help="of each side")
    parser.add_argument("--seconds", type=float, default=0.5, help="of processor time a turn")
    parser.add_argument("--batches", type=int, default=500, help="that the fresh process draws of each kind")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    if options.open:
        print(json.dumps(resident(options.open, options.batches)))
        return 0
    settings = {name: getattr(options, name) for name in ("transitions", "turns", "seconds", "batches")}
    report: dict[str, Any] = {"benchmark": "scale-data", "machine": describe(CPU), "settings": settings}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, begin = Path(temporary) / "shards", time.perf_counter()
        save_shards(made_up(options.transitions), folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        report["written"] = {"gigabytes": size / 1e9, "seconds": round(time.perf_counter() - begin, 1)}
        if options.compare:
            report["rates"] = compare(folder, options.transitions, options.turns, options.seconds)
        command = [sys.executable, __file__, "--open", str(folder), "--batches", str(options.batches)]
        others = Others()
        report["resident"] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        report["resident"]["others"] = others.share()
        shutil.rmtree(folder)
    rows = [
        [kind, f"{row['memory']:.0f}", f"{row['shards']:.0f}", f"{row['ratio']['median']:.2f}"]
        for kind, row in report.get("rates", {}).items()
    ]
    if rows:
        print(format_table(["", "memory, a second", "shards", "ratio"], rows))
    stages = [
        [stage, *(f"{row[name]:.0f}" for name in ("anonymous", "files", "seconds"))]
        for stage, row in report["resident"]["stages"].items()
    ]
    print(f"{options.transitions:,} transitions, {report['written']['gigabytes']:.1f} GB of shards")
    print(format_table(["a fresh process, after", "MB", "MB of files' pages", "seconds"], stages))
    print(f"at most {report['resident']['most_anonymous']:.0f} MB besides files' pages")
    if options.json:
        write_report(options.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
