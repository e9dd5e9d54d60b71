"""`python tests/fuzz`: damaged files, command lines and native calls; a table of what became of them.

The exit code is 1 where a case ended in something other than a result or a clear error. `--only NAME --case N` runs
one case again, in which a fault was found.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time

from crafted import CRAFTED
from judge import Outcome, Target, run_cases
from targets import TARGETS

_SLICE = 200


def main() -> int:
    """Fuzz, print the table; 0 where nothing was found."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="of each target (default: 100)")
    parser.add_argument("--hours", type=float, help="instead: as many cases as fit in")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="the first case's number, times 2^20")
    parser.add_argument("--only", default="", help="targets whose names begin so")
    parser.add_argument("--case", type=int, help="this case alone, of one target")
    options = parser.parse_args()
    chosen = {name: target for name, target in TARGETS.items() if name.startswith(options.only)}
    first = options.seed << 20
    if options.case is not None:
        outcomes = {name: run_cases(name, target, [options.case]) for name, target in chosen.items()}
    elif options.hours is not None:
        outcomes = _until(chosen, first, time.monotonic() + 3600 * options.hours)
    else:
        outcomes = {name: run_cases(name, chosen[name], _numbers(name, first, options.cases)) for name in chosen}
    print_table(outcomes)
    return 1 if any(outcome.faults for outcome in outcomes.values()) else 0


def _numbers(name: str, first: int, count: int) -> range:
    """Cases of a target; a crafted file has no choices to make, and is one case."""
    return range(first, first + (1 if name in CRAFTED else count))


def _until(chosen: dict[str, Target], first: int, end: float) -> dict[str, Outcome]:
    """Slices of every target in turn, until the time is up."""
    outcomes = {name: Outcome() for name in chosen}
    while time.monotonic() < end:
        for name, target in chosen.items():
            found = run_cases(name, target, _numbers(name, first, _SLICE))
            outcomes[name].counts += found.counts
            outcomes[name].faults = found.faults | outcomes[name].faults
        first += _SLICE
    return outcomes


def print_table(outcomes: dict[str, Outcome]) -> None:
    """Cases by target, as a Markdown table, and below it one case for each fault."""
    print("| target | cases | read | refused | unclear | hang, slow | memory | died |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    kinds = (("read",), ("refused",), ("unclear", "not prepared"), ("hangs", "slow"), ("memory",), ("died",))
    total = Outcome()
    for outcome in outcomes.values():
        total.counts += outcome.counts
    for name, outcome in [*outcomes.items(), ("all", total)]:
        figures = [outcome.counts.total(), *(sum(outcome.counts[kind] for kind in group) for group in kinds)]
        print(f"| {name} | {' | '.join(f'{figure:,}' for figure in figures)} |")
    for name, outcome in outcomes.items():
        for fault, case in outcome.faults.items():
            print(f"{name}: {fault}: python tests/fuzz --only '{name}' --case {case}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
