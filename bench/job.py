"""The user's whole wait for a first result, by stage: `python -m llmdpd.train` in a folder of its own.

    python bench/job.py --json bench/results/job-NAME.json -- --seed 1     # after --: options of llmdpd.train

With --install the checkout is installed into a new environment first, as README says; --before names what is installed
there before it, and timed apart, such as torch's CPU build.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import ROOT

STAGES = ("embedding", "data", "training", "evaluation", "recording")


def timed(words: Sequence[str], folder: Path, **changes: str) -> float:
    """Seconds that a command takes, which must succeed; what it says goes to our standard error.

    `changes`: of its environment.
    """
    start = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, stdout=2, env={**os.environ, **changes})
    return time.perf_counter() - start


def install(folder: Path, before: str | None) -> tuple[str, dict[str, float]]:
    """A new environment's interpreter, and what each step of its installation took."""
    python = str(folder / "environment" / "bin" / "python")
    seconds = {"environment": timed([sys.executable, "-m", "venv", "environment"], folder)}
    pip = [python, "-m", "pip", "install", "--quiet"]
    if before is not None:
        seconds["before"] = timed([*pip, before], folder)
    seconds["installation"] = timed([*pip, "-c", str(ROOT / "constraints.txt"), f"{ROOT}[train]"], folder)
    return python, seconds


def train(python: str, folder: Path, options: Sequence[str]) -> dict[str, float]:
    """What each stage of the run took; `other` is imports, start, report and what lies between the stages."""
    words = [python, "-m", "llmdpd.train", "--run-dir", str(folder / "run"), *options]
    whole = timed(words, folder, XDG_CACHE_HOME=str(folder / "cache"))  # a first run's texts are not embedded yet
    times = meta(folder)["times"]
    seconds = {stage: times[f"{stage}_seconds"] for stage in STAGES if f"{stage}_seconds" in times}
    return {**seconds, "other": whole - sum(seconds.values())}


def meta(folder: Path) -> dict[str, Any]:
    """What the run noted of itself."""
    noted: dict[str, Any] = json.loads((folder / "run" / "meta.json").read_text(encoding="utf-8"))
    return noted


def unseen_success(run: Path) -> float | None:
    """Mean success of the last checkpoint on the tasks held out: a fast job that learns nothing is none."""
    records = json.loads((run / "results.json").read_text(encoding="utf-8"))["records"]
    rates = [
        record["successes"] / record["episodes"]
        for record in records
        if record["checkpoint"] == "last" and record["split"] == "unseen" and record.get("successes") is not None
    ]
    return sum(rates) / len(rates) if rates else None


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="install into a new environment first")
    parser.add_argument("--before", help="what pip installs before, timed apart")
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    parser.add_argument("options", nargs="*", help="options of llmdpd.train, after --")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="llmdpd-job-") as scratch:
        folder = Path(scratch)
        python, seconds = install(folder, options.before) if options.install else (sys.executable, {})
        seconds |= train(python, folder, options.options)
        success, noted = unseen_success(folder / "run"), meta(folder)
    total = sum(seconds.values())
    print("| stage | seconds | share |\n| --- | ---: | ---: |")
    for stage, value in seconds.items():
        print(f"| {stage} | {value:.1f} | {100 * value / total:.0f} % |")
    print(f"| all | {total:.1f} | |")
    if success is not None:
        print(f"\nsuccess on the tasks held out: {100 * success:.1f} %")
    if options.json:
        report: dict[str, Any] = {
            "benchmark": "job",
            "machine": noted["machine"],
            "versions": noted["versions"],
            "options": options.options,
            "seconds": seconds,
            "unseen_success": success,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
