"""`python -m llmdpd.train`: collect data if there is none, train, evaluate, report."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from llmdpd.cli.common import renamed, run_command, take_option, training_summary
from llmdpd.cli.options import check_method_options
from llmdpd.config.baselines import with_method
from llmdpd.config.schema import PRESETS, PROTOCOLS, TrainConfig
from llmdpd.errors import InputError, nearest_names
from llmdpd.evaluation.results import read_results
from llmdpd.methods.networks import METHODS
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.pipeline import execute, prepare_config
from llmdpd.training.stopping import StopRequestedError, StopSignals
from llmdpd.utils.progress import console

_RENAMED = {"--evaluation.films": "--evaluation.videos", "--evaluation.film-tasks": "--evaluation.video-tasks"}
_DESCRIPTION = f"""Train a policy, told by text and one example trajectory what to do; evaluate it; write a report.

    --preset NAME    start from a named configuration: {", ".join(PRESETS)} (default: metaworld)
    --protocol NAME  which tasks are trained on and which held out: {", ".join(PROTOCOLS)}
    --run-dir DIR    the run's folder (default: runs/PRESET-seedN-TIME); must be new
    --resume RUN     go on with an interrupted run, as if it had never stopped

    --agent NAME     the method that learns: {", ".join(METHODS)} (default: the preset's)

Any field of the configuration can be given as an option beside these, except those of another method: agent.* is
policy diffusion's (llmdpd, diffusion-ql, diffusion-bc), planner.* trajectory-diffusion's, and so on by name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 for bad input, 1 for a diverged loss, 128 + signal when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _train(renamed(words, _RENAMED)))


def _train(arguments: list[str]) -> None:
    resume, words = take_option(arguments, "--resume")
    run_dir, words = take_option(words, "--run-dir")
    if resume is not None:
        preset, words = take_option(words, "--preset")
        protocol, words = take_option(words, "--protocol")
        run = _resume(Path(resume), preset, run_dir, protocol)
        with run.lock():
            config = _parse(words, run.read_config())
            run.take_up(config)
            _run(config, run, new=False)
        return
    config = configuration(words)
    run = RunFolder.create(None if run_dir is None else Path(run_dir), config)
    with run.lock():
        run.note(command={"argv": ["python", "-m", "llmdpd.train", *arguments]})
        _run(config, run, new=True)


def configuration(words: Sequence[str]) -> TrainConfig:
    """The configuration of a new run, from the command's words but for --run-dir: --preset, --protocol and any field.

    Raises:
        InputError: an unknown preset or protocol, an option of another method, or what `prepare_config` refuses.
            Options that don't exist end the process.
    """
    preset, rest = take_option(words, "--preset")
    protocol, rest = take_option(rest, "--protocol")
    name = preset or "metaworld"
    if name not in PRESETS:
        raise InputError(
            "unknown preset",
            field="--preset",
            found=name,
            expected=", ".join(PRESETS),
            hint=f"nearest names: {nearest_names(name, PRESETS)}",
        )
    start = PRESETS[name]
    if protocol is not None:
        if protocol not in PROTOCOLS:
            raise InputError("unknown protocol", field="--protocol", found=protocol, expected=", ".join(PROTOCOLS))
        tasks = dataclasses.replace(PROTOCOLS[protocol], goal_visible=start.tasks.goal_visible)
        start = dataclasses.replace(start, tasks=tasks)
    method, rest = take_option(rest, "--agent")
    other, rest = take_option(rest, "--method")
    if method is not None and other not in (None, method):
        raise InputError(
            "two methods", field="--method", found=f"{other}, and --agent {method}", expected="one of them"
        )
    if method is not None or other is not None:
        start = with_method(start, str(method or other))
    return _parse(rest, start)


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
    from llmdpd.reporting.page import build_report  # matplotlib takes half a second

    console.print(training_summary(read_results(run.results)))
    console.print(f"results: {run.results}")
    console.print(f"report: {build_report([run.path])}")


def _resume(path: Path, preset: str | None, run_dir: str | None, protocol: str | None) -> RunFolder:
    for name, value in (("--preset", preset), ("--run-dir", run_dir), ("--protocol", protocol)):
        if value is not None:
            raise InputError(
                "a resumed run has its own configuration and folder", field=name, found=value, hint=f"leave {name} out"
            )
    return RunFolder.open(path)


def _parse(words: list[str], default: TrainConfig) -> TrainConfig:
    config = _parse_fields(tuple(words), default)
    check_method_options(words, config.method)
    return prepare_config(dataclasses.replace(config, preset=default.preset))


# tyro reads the sources of all the configuration's parts at every call; an experiment asks for the same ones again.
@functools.lru_cache(maxsize=1024)
def _parse_fields(words: tuple[str, ...], default: TrainConfig) -> TrainConfig:
    return tyro.cli(TrainConfig, args=words, default=default, prog="python -m llmdpd.train", description=_DESCRIPTION)


if __name__ == "__main__":
    sys.exit(main())
