"""Grids of tiny runs on random data, and run folders with results that are made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdpd.evaluation.results import ActingUse, PromptUse, TaskResult, write_results
from llmdpd.experiments.grids import Grid, Method
from llmdpd.experiments.plan import Plan, Settings, make_plan
from llmdpd.reporting.paper import PaperRow, Reported
from llmdpd.utils.files import atomic_write_json
from llmdpd.utils.plain import to_plain

PAPER = {
    "reach": PaperRow("seen", {"LLMDPD": Reported(90.5, 1.25), "other": Reported(11.0)}, "other"),
    "door-lock": PaperRow("unseen", {"LLMDPD": Reported(70.0, 2.5), "other": Reported(22.0, 3.0)}, "other"),
}
GRID = Grid(
    "A grid of tests",
    "Two methods.",
    (
        Method("full", "full", "smoke", reported="LLMDPD"),
        Method("plain", "w/o prompts", "smoke", ("--policy.context.no-text", "--policy.context.no-trajectory")),
    ),
    protocols=("custom",),
    paper=PAPER,
    others=("other",),
)
MakePlan = Callable[..., Plan]


@pytest.fixture
def make_test_plan(tmp_path: Path, shared_options: list[str]) -> MakePlan:
    """A plan of the grid above with tiny runs; keywords are fields of `Settings`, and the grid."""

    def make(grid: Grid = GRID, **changes: Any) -> Plan:
        values: dict[str, Any] = {
            "experiment": "tests",
            "seeds": 2,
            "episodes": 2,
            "out": tmp_path / "grid",
            "data_root": tmp_path / "data",
            "options": tuple(shared_options),
        }
        return make_plan(Settings(**(values | changes)), {"tests": grid})

    return make


def _result(task: str, split: str, seed: int, **changes: Any) -> TaskResult:
    values: dict[str, Any] = {
        "task": task,
        "split": split,
        "protocol": "custom",
        "episodes": 40,
        "seed": seed,
        "max_steps": 500,
        "prompts": PromptUse(text="built in", trajectory="RUN/prompt_data"),
        "acting": ActingUse(samples=1, selection="soft", temperature=1.0, noise_scale=1.0, sampler="ddpm", steps=5),
        "trained_on": ("reach-v3", "push-v3"),
        "training_data": "made up by a test",
        "goal_visible": True,
        "checkpoint": "last",
        "context": "pooled",
        "iterations": 200,
        "wall_seconds": 1.0,
        "successes": 20,
    }
    return TaskResult(**(values | changes))


@pytest.fixture
def make_result() -> Callable[..., TaskResult]:
    """A success record: task, split, seed, successes of 40, and fields that differ."""
    return _result


def _finish(cell: Any, counts: dict[str, int], **changes: Any) -> None:
    """Put a finished run into the cell's folder: the checkpoints of 200 (last) and 150 iterations (best), with these
    successes of 40 by task."""
    config = dataclasses.replace(cell.config, device="cpu")
    atomic_write_json(cell.run.config, to_plain(config))
    split = {task: "seen" if task in config.tasks.seen else "unseen" for task in counts}
    records = [
        _result(
            task,
            split[task],
            config.seed,
            **({"successes": count, "checkpoint": checkpoint, "iterations": iterations} | changes),
        )
        for checkpoint, iterations in (("last", 200), ("best", 150))
        for task, count in counts.items()
    ]
    write_results(cell.run.results, records)
    cell.run.note(
        times={"training_seconds": 100.0, "evaluation_seconds": 30.0, "total_seconds": 150.0},
        acting={"parameters": 1_234_567, "milliseconds_an_action": 0.25},
        machine={"cpu": "a test's", "cores": 2},
        versions={"torch": "2.13.0"},
        command={"argv": ["python", "-m", "llmdpd.train", "--preset", cell.preset]},
    )
    (cell.folder / "report.html").write_text("<p>a report</p>")


@pytest.fixture
def finish() -> Callable[..., None]:
    """See `_finish`."""
    return _finish
