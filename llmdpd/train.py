"""`python -m llmdpd.train`: collect data if there is none, train, evaluate, report."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from llmdpd.cli import results_table, run_command, take_option
from llmdpd.config import PRESETS, TrainConfig
from llmdpd.errors import InputError, nearest_names
from llmdpd.progress import console
from llmdpd.report import build_report
from llmdpd.results import read_results
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.pipeline import execute, prepare_config
from llmdpd.training.stopping import StopRequestedError, StopSignals

_DESCRIPTION = f"""Train a policy, told by text and one example trajectory what to do; evaluate it; write a report.

    --preset NAME    start from a named configuration: {", ".join(PRESETS)} (default: metaworld)
    --run-dir DIR    the run's folder (default: runs/PRESET-seedN-TIME); must be new
    --resume RUN     go on with an interrupted run, as if it had never stopped

Any field of the configuration can be given as an option beside these."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 for bad input, 1 for a diverged loss, 128 + signal when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _train(words))


def _train(arguments: list[str]) -> None:
    resume, words = take_option(arguments, "--resume")
    run_dir, words = take_option(words, "--run-dir")
    preset, words = take_option(words, "--preset")
    if resume is not None:
        run = _resume(Path(resume), preset, run_dir)
        with run.lock():
            config = _parse(words, run.read_config())
            run.take_up(config)
            _run(config, run, new=False)
        return
    name = preset or "metaworld"
    if name not in PRESETS:
        raise InputError(
            "unknown preset",
            field="--preset",
            found=name,
            expected=", ".join(PRESETS),
            hint=f"nearest names: {nearest_names(name, PRESETS)}",
        )
    config = _parse(words, PRESETS[name])
    run = RunFolder.create(None if run_dir is None else Path(run_dir), config)
    with run.lock():
        run.note(command={"argv": ["python", "-m", "llmdpd.train", *arguments]})
        _run(config, run, new=True)


def _run(config: TrainConfig, run: RunFolder, new: bool) -> None:
    """Train, evaluate and report; the caller holds the run's lock."""
    console.print(f"run folder: {run.path}")
    with StopSignals() as stop:
        try:
            with run.timed("total_seconds"):
                execute(config, run, stop)
        except StopRequestedError:
            console.print(f"saved; go on with: python -m llmdpd.train --resume {shlex.quote(str(run.path))}")
            raise
        except InputError:
            if new and not run.begun:
                run.discard()
            raise
    console.print(results_table(read_results(run.results)))
    console.print(f"report: {build_report([run.path])}")


def _resume(path: Path, preset: str | None, run_dir: str | None) -> RunFolder:
    for name, value in (("--preset", preset), ("--run-dir", run_dir)):
        if value is not None:
            raise InputError(
                "a resumed run has its own configuration and folder", field=name, found=value, hint=f"leave {name} out"
            )
    return RunFolder.open(path)


def _parse(words: list[str], default: TrainConfig) -> TrainConfig:
    config = tyro.cli(TrainConfig, args=words, default=default, prog="python -m llmdpd.train", description=_DESCRIPTION)
    return prepare_config(dataclasses.replace(config, preset=default.preset))


if __name__ == "__main__":
    sys.exit(main())
