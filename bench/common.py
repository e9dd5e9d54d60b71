"""What the benchmarks share: settings from the command line, groups of calls that are measured together, the report."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from counting import Sizes
from machine import Limits, Others, describe
from report import plot_report, print_report, write_report
from timing import QUICK, Budget, Call, Clock, clock_for, time_alternating

from llmdpd.diffusion import BackendUnavailableError
from llmdpd.ops import native
from llmdpd.utils.cores import usable_cores

FORMAT = 1
PEERS = ("eager", "compile")
Make = Callable[[], Call]


class NotHere(Exception):  # noqa: N818 — not an error: the row says why
    """An implementation that can't run a case; the message says why."""


class Deadline:
    """When to stop starting things."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long can still be started."""
        return self.left() >= seconds


class Bench:
    """Collects the rows of one benchmark.

    Args:
        name: of the benchmark. device: where it runs. budget: seconds for each call and so on.
        settings: kept in the report. deadline: groups that would not end before it are left out, and named.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        budget: Budget,
        settings: Mapping[str, Any],
        deadline: Deadline | None = None,
    ) -> None:
        self.name, self.device, self.budget = name, device, budget
        self.settings, self.deadline = dict(settings), deadline or Deadline()
        self.threads = torch.get_num_threads()
        self.limits = Limits(device)
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def group(
        self,
        case: Mapping[str, Any],
        flops: float,
        makers: Mapping[str, Make],
        *,
        clock: Clock | None = None,
        prepare: Mapping[str, Call] | None = None,
        notes: Mapping[str, str] | None = None,
        estimate: float = 0.0,
    ) -> None:
        """Measure one case by all its implementations, in turns.

        Args:
            case: what is measured, column by column; `precision` says which limit it is held to.
            flops: operations that one call needs (see `counting`).
            makers: make each implementation's call. One that raises `BackendUnavailableError` or `NotHere` gets a dash
                and its message, one that fails otherwise a dash, its error, and the exit status 1.
            clock: how calls are timed; by default as fits the device.
            prepare: what is done before each turn of an implementation, untimed; torch's threads are put back.
            notes: what must be said of an implementation beside its figures.
            estimate: seconds that the group may take, for the deadline.
        """
        if not self.deadline.allows(estimate):
            self.left_out.append(f"{self.name}: " + ", ".join(f"{key} {value}" for key, value in case.items()))
            return
        clock = clock or clock_for(self.device)
        calls: dict[str, Call] = {}
        rows = {name: self._row(case, name, flops, (notes or {}).get(name)) for name in makers}
        for name, make in makers.items():
            (prepare or {}).get(name, lambda: None)()
            started = time.perf_counter()
            call = _first_call(make, clock, rows[name])
            if call is not None:
                calls[name] = call
                if name.startswith("compile"):
                    rows[name]["compile_seconds"] = time.perf_counter() - started
        others = Others()
        for name, timing in time_alternating(calls, self.budget, clock, prepare).items() if calls else ():
            rows[name]["seconds"] = timing.summary()
            rows[name]["others"] = others.share()
        self.rows += rows.values()
        print(f"{self.name}: " + ", ".join(f"{k} {v}" for k, v in case.items()), file=sys.stderr, flush=True)
        calls.clear()
        self._clean()
        if self.device.type == "cpu":
            self.limits.measure(windows=1)

    def _row(self, case: Mapping[str, Any], backend: str, flops: float, note: str | None) -> dict[str, Any]:
        return {
            "case": dict(case),
            "backend": backend,
            "seconds": None,
            "flops": flops,
            "compile_seconds": None,
            "others": None,
            "reason": None,
            "failed": False,
            "note": note,
        }

    def _clean(self) -> None:
        torch.set_num_threads(self.threads)
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def report(self) -> dict[str, Any]:
        """Everything measured so far, with ratios and shares, as JSON values."""
        self.limits.measure()
        limits = self.limits.report()
        return {
            "format": FORMAT,
            "bench": self.name,
            "settings": self.settings,
            "machine": describe(self.device),
            "limits": limits,
            "rows": [_completed(row, self.rows, limits) for row in self.rows],
            "left_out": list(self.left_out),
        }


def _first_call(make: Make, clock: Clock, row: dict[str, Any]) -> Call | None:
    """Make a call and run it once; where that can't be, None, and the row says why."""
    try:
        call = make()
        call()
        clock.synchronize()
        return call
    except (BackendUnavailableError, NotHere) as reason:
        row["reason"] = str(reason)
    except torch.OutOfMemoryError as error:
        row["reason"] = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:
        # One broken implementation must not take the others' figures with it; the command fails at its end.
        row["reason"], row["failed"] = f"{type(error).__name__}: {_first_line(error)}", True
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _completed(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its ratios to the peers of the same case, its speed and its share of the limit."""
    done = {**row, "against": {}, "flops_per_second": None, "share": None}
    if row["seconds"] is None:
        return done
    median = row["seconds"]["median"]
    for other in rows:
        if other["case"] == row["case"] and other["backend"] in PEERS and other["seconds"] is not None:
            done["against"][other["backend"]] = other["seconds"]["median"] / median
    done["flops_per_second"] = row["flops"] / median
    limit = limits.get(row["case"].get("precision", "fp32"), {}).get("flops_per_second")
    done["share"] = done["flops_per_second"] / limit if limit else None
    return done


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads (default: all cores)")
    parser.add_argument("--seconds", type=float, default=Budget.seconds, help="measuring time of each call")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, few repetitions: proves that it runs, no figures"
    )
    parser.add_argument("--within", type=float, help="stop starting cases after so many seconds")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG of time against B")


def start(arguments: argparse.Namespace) -> tuple[torch.device, Budget]:
    """Set torch up as the options say."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: torch finds none here")
    if arguments.threads < 1 or not 0 < arguments.seconds < 3600:
        raise SystemExit("--threads starts at 1, --seconds lies above 0")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    native.set_threads(None)  # as many as torch
    return torch.device(arguments.device), QUICK if arguments.quick else Budget(seconds=arguments.seconds)


def threads_for(names: Iterable[str], threads: int) -> dict[str, Call]:
    """Before each turn: all threads to torch for the peers; for ours as the commands set them, all to the C++ code and
    one to torch, whose OpenMP threads would spin on the cores that ours need."""

    def share(to_torch: int) -> None:
        torch.set_num_threads(to_torch)
        native.set_threads(threads)

    return {name: partial(share, 1 if name == "cpp" or name.startswith("ours") else threads) for name in names}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON values, without the names of files."""
    return {key: value for key, value in vars(arguments).items() if key not in ("json", "plot")}


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """The networks' sizes: those of the table of floors, or tiny ones."""
    return Sizes(state=5, action=3, prompt=8, hidden=16) if arguments.quick else Sizes()


def finish(bench: Bench, arguments: argparse.Namespace) -> int:
    """Print, write, draw; the exit status."""
    report = bench.report()
    print_report(report)
    if arguments.json is not None:
        write_report(arguments.json, report)
    if arguments.plot is not None:
        plot_report(arguments.plot, report)
    return 1 if any(row["failed"] for row in report["rows"]) else 0
