"""`llmdpd train --seeds 0-7`: several seeds in one process, a run folder each, one report over them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from llmdpd.config.parse import change, parse_train, split_options
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError, StopRequestedError, TrainingDivergedError
from llmdpd.evaluation.results import SPLITS
from llmdpd.reporting.compare import group_arms
from llmdpd.reporting.page import build_report
from llmdpd.reporting.run import read_run
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.seeds import SeedsFolder, execute_seeds, parse_seeds
from llmdpd.training.stopping import StopSignals
from llmdpd.utils import ranks
from llmdpd.utils.command_line import take_option
from llmdpd.utils.device import automatic_device
from llmdpd.utils.progress import console

_OF_ONE_RUN = ("--push", "--push-license")


class _Begun(NamedTuple):
    """Runs to train, of configurations that differ by the seed."""

    group: SeedsFolder
    configs: Sequence[TrainConfig]
    folders: Sequence[RunFolder]


def say_device(device: str) -> None:
    """Say where runs train, and why, where that was looked up."""
    # Only where it was: to ask starts CUDA.
    if automatic_device.cache_info().currsize and device == automatic_device()[0]:
        console.print(f"device: {device} ({automatic_device()[1]})")


def names_seeds(arguments: list[str]) -> bool:
    """Whether the arguments of `llmdpd train` ask for several seeds, or to go on with such runs.

    Raises:
        InputError: they do, of several processes.
    """
    seeds, words = take_option(arguments, "--seeds")
    resume, _ = take_option(words, "--resume")
    if seeds is None and (resume is None or not SeedsFolder.is_one(Path(resume))):
        return False
    if ranks.count() > 1 or ranks.may_restart():
        problem, found = "several seeds are trained by one process", f"{ranks.count()} of torchrun"
        raise InputError(problem, field="--seeds", found=found, hint="start it without torchrun, or one seed with it")
    return True


def train_seeds(arguments: list[str], held: ExitStack, of_start: Sequence[str]) -> None:
    """Train, evaluate and report on several seeds; `held` keeps their locks.

    of_start: options that only new runs take.
    """
    begun, new = _begin(arguments, held, of_start)
    group, configs, folders = begun
    console.print(f"run folders: {', '.join(str(folder.path) for folder in folders)}")
    with StopSignals() as stop:
        try:
            with ExitStack() as timed:
                for folder in folders:
                    timed.enter_context(folder.timed("total_seconds", len(folders)))
                failed = execute_seeds(configs, folders, stop)
        except StopRequestedError:
            console.print(f"saved; go on with: python -m llmdpd.train --resume {shlex.quote(str(group.path))}")
            raise
        except Exception:  # an unexpected one, too, must not refuse the next try
            if new and not any(folder.begun for folder in folders):
                group.discard()
            _put_back(folders)
            raise
    _report(group, [folder for seed, folder in zip(group.seeds, folders, strict=True) if seed not in failed])
    if failed:
        raise TrainingDivergedError("\n".join(f"seed {seed}: {why}" for seed, why in failed.items()))


def _begin(arguments: list[str], held: ExitStack, of_start: Sequence[str]) -> tuple[_Begun, bool]:
    """Make or open the run folders; whether they were made just now."""
    named, words = take_option(arguments, "--seeds")
    for name in _OF_ONE_RUN:
        value, words = take_option(words, name)
        _refuse(name, value, "a policy is pushed of one seed", "push it when its run is done: --resume RUN")
    resume, words = take_option(words, "--resume")
    run_dir, words = take_option(words, "--run-dir")
    argv = ["python", "-m", "llmdpd.train", *arguments]
    if resume is not None:
        given = {"--seeds": named, "--run-dir": run_dir}
        for name in of_start:
            given[name], words = take_option(words, name)
        for name, value in given.items():
            refusal = "resumed runs have their own seeds, configuration and folders"
            _refuse(name, value, refusal, f"leave {name} out")
        group = SeedsFolder.open(Path(resume))
        held.enter_context(group.lock())
        return _opened(group, group.any_config(), lambda config: change(config, words), held, argv), False
    assert named is not None, "checked by the caller"
    seeds = parse_seeds(named)
    if any(option.field == "seed" for option in split_options(words)):
        raise InputError("one seed, and several", field="--seed", found=f"--seeds {named}", expected="--seeds alone")
    start = parse_train(words)
    say_device(start.device)
    group = SeedsFolder.create(None if run_dir is None else Path(run_dir), start.preset, seeds)
    held.enter_context(group.lock())
    return _opened(group, start, lambda config: config, held, argv), True


def _refuse(name: str, value: str | None, problem: str, hint: str) -> None:
    if value is not None:
        raise InputError(problem, field=name, found=value, hint=hint)


def _opened(
    group: SeedsFolder,
    start: TrainConfig,
    change_of: Callable[[TrainConfig], TrainConfig],
    held: ExitStack,
    argv: list[str],
) -> _Begun:
    """The run folders, their configurations changed; those that are not there yet are made by `start`."""
    configs: list[TrainConfig] = []
    folders: list[RunFolder] = []
    try:
        for seed in group.seeds:
            folder = RunFolder(group.run(seed))
            if folder.config.is_file():
                folder = RunFolder.open(folder.path)
                held.enter_context(folder.lock())
                begun = folder.read_config()
                folder.use_tasks(begun, unchanged=True)
                configs.append(change_of(begun))
                folder.take_up(configs[-1])
            else:
                configs.append(change_of(dataclasses.replace(start, seed=seed)))
                folder = RunFolder.create(folder.path, configs[-1])
                held.enter_context(folder.lock())
                folder.note(command={"argv": argv})
            folders.append(folder)
    except InputError:
        _put_back(folders)
        raise
    return _Begun(group, configs, folders)


def _put_back(folders: Sequence[RunFolder]) -> None:
    """Give runs that were not gone on with their configurations back."""
    for folder in folders:
        folder.put_back()


def _report(group: SeedsFolder, folders: Sequence[RunFolder]) -> None:
    """A page of each run, and one over all of them."""
    for folder in folders:
        build_report([folder.path])
    if not folders:
        return
    report = build_report([folder.path for folder in folders], group.path / "report.html")
    arms = group_arms([read_run(folder.path, 0) for folder in folders])
    for arm, split, checkpoint in [(each, s, c) for each in arms for s in SPLITS for c in each.checkpoints]:
        estimate = arm.mean(split, checkpoint)
        if estimate is not None:
            console.print(f"success on {split} tasks, {checkpoint} checkpoint: {estimate.text} % ({estimate.seeds})")
    console.print(f"report: {report}")
