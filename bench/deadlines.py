"""Actions in time: the default policy in a control loop, alone and beside busy processes, with nothing set up for it.

    python bench/deadlines.py --json bench/results/deadlines-NAME.json

At every tick of the loop the policy is asked for an action; it is late where the action is there only after the next
tick. Two processes that count keep both cores of a small machine busy. The columns: docs/research-log/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import retrieval
import torch
from machine import describe
from timing import Call

LOOPS = ((50, 250), (500, 2500))
"""Ticks a second, and how many."""


def count_for_ever() -> None:
    """Keep a core busy."""
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside so many processes that count."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=count_for_ever, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    if started:
        time.sleep(2.0)  # until they do
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def play(act: Call, rate: int, ticks: int) -> dict[str, Any]:
    """Latencies in a loop of `rate` ticks a second: from the tick, and from the call, to the action."""
    period, start = 1 / rate, time.perf_counter() + 0.05
    since_tick, since_call = np.empty(ticks), np.empty(ticks)
    for tick in range(ticks):
        due = start + tick * period
        left = due - time.perf_counter()
        if left > 0:
            time.sleep(left)
        called = time.perf_counter()
        act()
        done = time.perf_counter()
        since_tick[tick], since_call[tick] = done - due, done - called
    share = {f"p{q}": float(np.percentile(since_call, q)) for q in (50, 99)} | {"most": float(since_call.max())}
    return {"rate": rate, "ticks": ticks, "late": int((since_tick > period).sum()), **share}


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(words)
    device = torch.device("cpu")
    policy = retrieval.policy(options.quick, device)
    observation = np.random.default_rng(1).normal(0, 0.3, retrieval.STATE).astype(np.float32)
    act = retrieval.our_action(policy, observation)
    for _ in range(20):
        act()
    rows = []
    print("| beside | ticks a second | late | median | p99 | most |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for others in (0, 2):
        with busy(others):
            for rate, ticks in LOOPS:
                row = {"busy": others, **play(act, rate, ticks // (10 if options.quick else 1))}
                rows.append(row)
                times = " | ".join(f"{1e6 * row[name]:.0f} µs" for name in ("p50", "p99", "most"))
                beside = f"{others} busy processes" if others else "nothing"
                print(f"| {beside} | {rate} | {row['late']} of {row['ticks']} | {times} |", flush=True)
    if options.json:
        report = {
            "benchmark": "deadlines",
            "device": describe(device),
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
