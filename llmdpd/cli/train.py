"""`llmdpd train`: collect data if there is none, train, evaluate, report."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from llmdpd.cli.common import command, training_summary
from llmdpd.cli.seeds import names_seeds, say_device, train_seeds
from llmdpd.config.parse import change, parse_train
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError, StopRequestedError, located
from llmdpd.evaluation.results import read_results
from llmdpd.policy.card import UNKNOWN_LICENCE
from llmdpd.policy.hub import check_repository, unreachable
from llmdpd.policy.publish import folder_to_write, is_folder
from llmdpd.reporting.page import build_report
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.pipeline import execute
from llmdpd.runs.push import push_run
from llmdpd.training.stopping import StopSignals
from llmdpd.utils import ranks
from llmdpd.utils.command_line import take_option
from llmdpd.utils.progress import console


def _train(arguments: list[str]) -> None:
    with ranks.joined(), ExitStack() as held:
        if ranks.after_first(lambda: names_seeds(arguments)):
            train_seeds(arguments, held, _OF_START)
            return
        begun = ranks.first(lambda: _begin(arguments, held))
        path = ranks.told(None if begun is None else str(begun.folder.path))
        _run(_other(Path(path)) if begun is None else begun)


_OF_START = ("--preset", "--protocol", "--method", "--agent", "--tasks-file")
"""Options that a resumed run has no use for."""


class _Push(NamedTuple):
    """Where the policy is pushed to in the end, a repository or a folder, and under which licence."""

    target: str
    licence: str


class _Begun(NamedTuple):
    """A run to train; `new`: whether it was made just now."""

    config: TrainConfig
    folder: RunFolder
    push: _Push | None
    new: bool


def _begin(arguments: list[str], held: ExitStack) -> _Begun:
    """Make or open the run that the arguments ask for; `held` keeps its lock."""
    resume, words = take_option(arguments, "--resume")
    run_dir, words = take_option(words, "--run-dir")
    push, words = _take_push(words)
    if resume is None:
        if ranks.may_restart() and run_dir is None:
            hint = "name one: started again, the run goes on there"
            problem = "a run that torchrun may start again needs a folder that it finds again"
            raise InputError(problem, field="--run-dir", found="none, with --max-restarts", hint=hint)
        config = parse_train(words)
        say_device(config.device)
        if run_dir is not None and ranks.may_restart() and _began(Path(run_dir)):
            return _go_on(Path(run_dir), held, lambda _: config, push)
        folder = RunFolder.create(None if run_dir is None else Path(run_dir), config)
        held.enter_context(folder.lock())
        argv = ["python", "-m", "llmdpd.train", *arguments]
        folder.note(command={"argv": argv, "started_by": _launcher()})
        return _Begun(config, folder, push, new=True)
    for name in _OF_START:
        value, words = take_option(words, name)
        _refuse(name, value)
    _refuse("--run-dir", run_dir)
    return _go_on(Path(resume), held, lambda begun: change(begun, words), push)


def _launcher() -> str:
    """What started this process, which is the same for all attempts of a torchrun."""
    return f"{platform.node()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')}".rstrip()


def _began(path: Path) -> bool:
    """Whether a former attempt of this torchrun began a run there; another's is not to be gone on with."""
    folder = RunFolder(path)
    return folder.config.is_file() and folder.notes().get("command", {}).get("started_by") == _launcher()


def _take_push(words: list[str]) -> tuple[_Push | None, list[str]]:
    """What --push and --push-license say, checked before a training is waited for, and the other words."""
    target, words = take_option(words, "--push")
    licence, words = take_option(words, "--push-license")
    if target is None:
        if licence is not None:
            raise InputError("nothing is pushed", field="--push-license", found=licence, expected="--push beside it")
        return None, words
    with located(field="--push"):
        if is_folder(target):
            folder_to_write(target)
        else:
            check_repository(target)
    if not is_folder(target) and (reason := unreachable()):
        console.print(f"{target} will not be pushed to, {reason}: the folder for it is written only")
    return _Push(target, UNKNOWN_LICENCE if licence is None else licence), words


def _go_on(path: Path, held: ExitStack, change_of: Callable[[TrainConfig], TrainConfig], push: _Push | None) -> _Begun:
    """Open a run, with its configuration changed."""
    folder = RunFolder.open(path)
    held.enter_context(folder.lock())
    begun = folder.read_config()
    folder.use_tasks(begun, unchanged=True)
    config = change_of(begun)
    folder.take_up(config)
    return _Begun(config, folder, push, new=False)


def _other(path: Path) -> _Begun:
    """The run that the first process has begun, in the others."""
    folder = RunFolder.open(path)
    config = folder.read_config()
    folder.use_tasks(config, unchanged=False)
    return _Begun(config, folder, None, new=False)


def _refuse(name: str, value: str | None) -> None:
    if value is not None:
        raise InputError(
            "a resumed run has its own configuration and folder", field=name, found=value, hint=f"leave {name} out"
        )


def _run(begun: _Begun) -> None:
    """Train, evaluate, report and push; the caller holds the run's lock."""
    config, run, push, new = begun
    console.print(f"run folder: {run.path}")
    with StopSignals() as stop:
        try:
            with run.timed("total_seconds"):
                execute(config, run, stop)
        except StopRequestedError:
            console.print(f"saved; go on with: python -m llmdpd.train --resume {shlex.quote(str(run.path))}")
            raise
        except Exception:  # an unexpected one, too, must not refuse the next try
            if new and not run.begun:
                run.discard()
            run.put_back()
            raise
    ranks.first(lambda: _report(run, push))


def _report(run: RunFolder, push: _Push | None) -> None:
    report = build_report([run.path])
    records = read_results(run.results)
    if records:
        console.print(training_summary(records))
    console.print(f"results: {run.results}")
    console.print(f"report: {report}")
    if push is not None:
        pushed = push_run(run.path, push.target, licence=push.licence)
        console.print(str(pushed))
        if pushed.commit is not None:
            run.note(hub=pushed.commit._asdict())


main = command(_train)
