"""`llmdpd.fit`: a policy from a data set in memory, by the stages of a run."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmdpd.config.parse import change, parse_train
from llmdpd.config.schema import TrainConfig
from llmdpd.data import TrajectoryDataset, save_minari, save_shards
from llmdpd.errors import InputError
from llmdpd.policy.policy import Policy
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.pipeline import execute
from llmdpd.tasks.user import use_no_file
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.files import atomic_write_text

_DATA = "fit"


def fit(
    dataset: TrajectoryDataset | None = None,
    tasks: str | Path | Mapping[str, str] | None = None,
    config: TrainConfig | None = None,
    *,
    init: str | Path | None = None,
    options: Sequence[str] = (),
    run_dir: str | Path | None = None,
) -> Policy:
    """Train a policy as `llmdpd train` does, and return it.

    Args:
        dataset: episodes of the tasks that are learned (see `TrajectoryDataset.from_episodes`); None: the data that
            the task file names.
        tasks: a task file (tasks.toml), or each task's text prompt by its name, of tasks without an environment; None:
            the texts that the data set has.
        config: the run's configuration; by default that of `llmdpd train --tasks-file`, without an evaluation.
        init: the trained policy whose weights training starts from: a run, a policy folder or "hub:OWNER/NAME"; its
            method and network are taken from it, unless a `config` is given, which must have them.
        options: words of the command line that change the configuration, such as ("--iterations", "3000").
        run_dir: the run's folder, which must be new and is kept, for `llmdpd evaluate`, `report` and `train --resume`,
            with what it learns from beside it in RUN_DIR-inputs; by default a temporary one.

    Returns:
        The policy after the last iteration. `Policy.prompt`, then `Policy.act`.

    Raises:
        InputError: neither data nor a task file, a task without a text, a policy to start from that does not fit, and
            as `llmdpd train`.
        TrainingDivergedError: a loss became NaN or Inf.
    """
    if dataset is None and not isinstance(tasks, (str, Path)):
        raise InputError("nothing to learn from", field="dataset", found="None", expected="a data set, or a task file")
    with tempfile.TemporaryDirectory(prefix="llmdpd-fit-") as scratch:
        inputs = Path(scratch) if run_dir is None else Path(f"{Path(run_dir).absolute()}-inputs")
        for place in () if run_dir is None else (Path(run_dir), inputs):
            _check_empty(place)
        try:
            file, given = _task_file(dataset, tasks, inputs)
            words = ["--tasks-file", str(file), *given]
            start = [] if init is None else ["--init", str(init)]
            if config is None:
                wanted = parse_train(["--evaluation", "none", *words, *start, *options])
            else:
                named = parse_train(words)
                data = dataclasses.replace(config.data, path=named.data.path)
                wanted = change(dataclasses.replace(config, tasks=named.tasks, data=data), [*start, *options])
            run = RunFolder.create(Path(scratch) / "run" if run_dir is None else Path(run_dir), wanted)
            with run.lock(), StopSignals() as stop:
                execute(wanted, run, stop)
            return Policy.load(run.path, wanted.device)
        finally:
            use_no_file()


def _check_empty(place: Path) -> None:
    """Raise `InputError` for a folder that holds something, before anything is written."""
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        found = "a file" if not place.is_dir() else "a folder that is not empty"
        raise InputError("the run needs a folder of its own", path=place, field="run_dir", found=found, expected="none")


def _task_file(
    dataset: TrajectoryDataset | None, tasks: str | Path | Mapping[str, str] | None, folder: Path
) -> tuple[Path, list[str]]:
    """The run's task file, written into `folder` where there is none yet, and options that name a given data set."""
    if dataset is None or isinstance(tasks, (str, Path)):
        assert isinstance(tasks, (str, Path)), "checked by the caller"
        if dataset is None:
            return Path(tasks), []
        _save(dataset, folder / _DATA)
        return Path(tasks), ["--data", str(folder / _DATA)]
    texts = dict(zip(dataset.tasks, dataset.texts, strict=True)) | dict(tasks or {})
    without = [task for task in dataset.tasks if not texts[task].strip()]
    if without or set(texts) != set(dataset.tasks):
        unknown = sorted(set(texts) - set(dataset.tasks))
        raise InputError(
            "each task of the data needs a text prompt, and no other has one",
            field="tasks",
            found=f"no text of {', '.join(without)}" if without else f"texts of {', '.join(unknown)}",
            expected="a text for each of " + ", ".join(dataset.tasks),
        )
    places = _save(dataset, folder / _DATA)
    # What JSON makes of a text is a basic string of TOML, too.
    known = '[suite]\nsuccess = "success"\n' if (dataset.successes >= 0).any() else ""
    tables = [known] + [
        f"[tasks.{json.dumps(task, ensure_ascii=False)}]\ndata = {json.dumps(str(place))}\n"
        f"text = {json.dumps(texts[task], ensure_ascii=False)}\n"
        for task, place in zip(dataset.tasks, places, strict=True)
    ]
    file = folder / "tasks.toml"
    atomic_write_text(file, "\n".join(tables).replace("\x7f", "\\u007f"))
    return file, []


def _save(dataset: TrajectoryDataset, folder: Path) -> list[Path]:
    """Write a data set, as shards where it is in shards; the folder of each task's data."""
    if dataset.stored:
        return [save_shards([dataset], folder)] * len(dataset.tasks)
    return save_minari(dataset, folder, namespace=_DATA, name="given-v0")
