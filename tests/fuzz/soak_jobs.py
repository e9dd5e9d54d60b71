"""What is disturbed by the soak: small runs of the commands, how they are continued, and what they must end in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from llmdpd.data import EpisodeRecord, join_episodes, load_dataset, save_minari
from llmdpd.data.collecting.scripted import content_hash
from llmdpd.experiments.grids import GRIDS, Compared, Grid

SEEN, UNSEEN = ("reach-v3", "push-v3"), ("door-lock-v3",)
_SIZES = {
    **{"text-dim": 8, "trajectory-dim": 8, "text-hidden": 16, "retrieval.width": 16},
    **{"encoder.layers": 1, "encoder.width": 16, "encoder.inner": 32, "encoder.steps": 8},
}


@dataclass(frozen=True)
class Job:
    """A command with small work.

    begin: (the folder it works in, its files before) → the command's words.
    go_on: → the words that continue it.
    result: → what must not depend on how it was disturbed.
    prepare: puts into the folder what must be there before.
    """

    begin: Callable[[Path], list[str]]
    go_on: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    prepare: Callable[[Path], object] = lambda place: None


def _words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


def _options(fields: dict[str, object]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def write_data(folder: Path) -> None:
    """Random trajectories of Meta-World's widths: `train` of the seen tasks, `prompts` of all."""
    for name, tasks, episodes in (("train", SEEN, 3), ("prompts", (*SEEN, *UNSEEN), 2)):
        rng = np.random.default_rng(episodes)
        records = [
            EpisodeRecord(
                observations=rng.normal(size=(31 + number, 39)),
                actions=rng.uniform(-1, 1, (30 + number, 4)),
                rewards=rng.uniform(0, 1, 30 + number),
                task=task,
                expert_actions=rng.uniform(-1, 1, (30 + number, 4)),
                noise_level=0.1 * number,
                success=1,
                seed=100 * episodes + number,
            )
            for task in tasks
            for number in range(episodes)
        ]
        save_minari(join_episodes(records, goal_visible=True, source="made by the soak"), folder / name)


def jobs(data: Path) -> dict[str, Job]:
    """All of them, by name, on the data in this folder; runs for evaluation are kept there as well."""
    shared = {
        **{"data.path": data / "train", "data.demonstrations": data / "prompts"},
        **{"training.iterations": 40, "training.log-every": 5, "training.checkpoint-every": 5},
        **{"training.select-every": 20, "training.select-episodes": 1, "evaluation.max-steps": 8},
        **{"method.batch-size": 16, "method.prompts-per-batch": 2, "method.network.hidden-dim": 16},
        **{f"method.network.context.{name}": value for name, value in _SIZES.items()},
        **{"method.eta": 0.05, "method.critic-hidden": 16, "method.ema-start": 5},
    }
    seen = ("--tasks.seen", *(task.removesuffix("-v3") for task in SEEN))
    of_all = (*_options(shared), *seen, "--tasks.unseen", *(task.removesuffix("-v3") for task in UNSEEN))
    small = (*_options({"data.workers": 1, "threads": 1, "evaluation.episodes": 1}), "--evaluation.no-videos")
    sac = {
        **{"training.iterations": 120, "training.log-every": 20, "training.checkpoint-every": 20},
        **{"training.select-every": 60, "training.select-episodes": 1, "evaluation.max-steps": 10},
        **{"method.learning-starts": 40, "method.batch-size": 32, "method.network.hidden-dim": 16},
        **{"method.max-steps": 25},
    }
    on_sac = (*small, *_options(sac), *seen, "--tasks.unseen", "door-lock")
    two = (Compared("full", "full", "smoke"), Compared("plain", "without prompts", "smoke", _WITHOUT))
    GRIDS["soak"] = Grid("The soak's grid", "Two methods.", two, protocols=("custom",), others=())
    known = {
        "train": _training(*small, *of_all),
        "train --method sac": _training("--preset", "smoke", "--method", "sac", *on_sac),
        "collect --tasks": _same_again(
            lambda place: _words(
                *("collect", "--tasks", "reach", "push", "--episodes", 3, "--max-steps", 40, "--workers", 2),
                *("--out", place / "out"),
            ),
            _collection,
        ),
        "collect --policy sac": _same_again(
            lambda place: _words(
                *("collect", "--policy", "sac", "--tasks", "hopper", "--steps", 240, "--evaluate-every", 60),
                *("--evaluation-episodes", 1, "--out", place / "sac"),
            ),
            _replay,
        ),
        "evaluate": _same_again(
            lambda place: _words("evaluate", place / "run", "--episodes", 2, "--workers", 2),
            lambda place: (_results(place / "run"), (place / "run" / "report.html").is_file()),
            lambda place: shutil.copytree(data / "run", place / "run"),
        ),
        "experiment": _same_again(
            lambda place: _words(
                *("experiment", "soak", "--seeds", 1, "--episodes", 1, "--jobs", 2, "--out", place / "grid"),
                *("--data-root", place / "data", "--device", "cpu", "--", *of_all),
            ),
            _experiment,
        ),
    }
    # An extra of the package.
    return {name: job for name, job in known.items() if "sac" not in name or find_spec("stable_baselines3")}


_WITHOUT = tuple(f"--method.network.context.no-{name}" for name in ("text", "trajectory"))


def _same_again(
    words: Callable[[Path], list[str]],
    result: Callable[[Path], Any],
    prepare: Callable[[Path], object] = lambda place: None,
) -> Job:
    """A command that is continued by itself."""
    return Job(words, words, result, prepare)


def _training(*options: object) -> Job:
    """A run is continued by --resume where there is one, as the command's own messages say."""

    def begin(place: Path) -> list[str]:
        return _words("train", "--run-dir", place / "run", *options)

    def go_on(place: Path) -> list[str]:
        there = (place / "run" / "config.json").is_file()
        return _words("train", "--resume", place / "run") if there else begin(place)

    return Job(begin, go_on, lambda place: _run(place / "run"))


def _run(run: Path) -> dict[str, Any]:
    """Everything of a run but times and paths: file → content."""
    (checkpoint,) = (run / "checkpoint").iterdir()
    found: dict[str, Any] = {"checkpoint": checkpoint.name, "results": _results(run)}
    for folder in (checkpoint, run / "policy", run / "policy_best"):
        for file in sorted(folder.iterdir()):
            name = f"{folder.relative_to(run)}/{file.name}"
            found[name] = json.loads(file.read_text()) if file.name == "state.json" else file.read_bytes()
    for timed in ("elapsed", "sha256_of_this"):  # the checksum is over the time as well
        del found[f"checkpoint/{checkpoint.name}/state.json"][timed]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Of the losses, a run that is stopped in between (SIGTERM) records the mean up to there as well.
    found["selections"] = [
        {name: value for name, value in line.items() if "second" not in name}
        for line in lines
        if "eval/seen_success" in line
    ]
    found["report"] = (run / "report.html").is_file()
    return found


def _results(run: Path) -> list[dict[str, Any]]:
    records = json.loads((run / "results.json").read_text())["records"]
    return [{**record, "wall_seconds": None, "prompts": None} for record in records]


def _collection(place: Path) -> dict[str, Any]:
    manifest = json.loads((place / "out" / "collect.json").read_text())
    return {**manifest, "seconds": None, "read again": content_hash(load_dataset(place / "out"))}


def _replay(place: Path) -> dict[str, Any]:
    file = place / "sac" / "hopper-medium-replay.hdf5"
    with h5py.File(file) as stored:
        arrays = {name: np.asarray(stored[name]).tobytes() for name in stored}
        return {**arrays, **stored.attrs, "summary": json.loads(file.with_name(f"{file.name}.json").read_text())}


def _experiment(place: Path) -> dict[str, Any]:
    grid = place / "grid"
    runs = sorted(path.parent for path in grid.glob("*/config.json"))
    return {**{run.name: _run(run) for run in runs}, "pages": sorted(path.name for path in grid.glob("*.html"))}
