"""Grids of tiny runs on random data, and run folders with results that are made up."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmdpd.evaluation.results import PromptUse, TaskResult, write_results
from llmdpd.experiments.cell import Cell, Share, Step
from llmdpd.experiments.grids import Compared, Grid
from llmdpd.experiments.plan import Plan, Settings, make_plan
from llmdpd.reporting.paper import PaperRow, Reported
from llmdpd.utils.files import atomic_write_json
from llmdpd.utils.plain import to_plain

PAPER = {
    "reach": PaperRow("seen", {"LLMDPD": Reported(90.5, 1.25), "other": Reported(11.0)}, "other"),
    "door-lock": PaperRow("unseen", {"LLMDPD": Reported(70.0, 2.5), "other": Reported(22.0, 3.0)}, "other"),
}
WITHOUT = tuple(f"--method.network.context.no-{name}" for name in ("text", "trajectory"))
GRID = Grid(
    "A grid of tests",
    "Two methods.",
    (
        Compared("full", "full", "smoke", reported="LLMDPD"),
        Compared(
            "plain", "w/o prompts", "smoke", tuple(f"--method.network.context.no-{n}" for n in ("text", "trajectory"))
        ),
    ),
    protocols=("custom",),
    paper=PAPER,
    others=("other",),
)
MakePlan = Callable[..., Plan]


@dataclass(frozen=True)
class Script(Step):
    code: str = ""

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-c", self.code]


@dataclass(frozen=True)
class FakeCell:
    """A cell whose one step is a script, done once the folder holds `done`."""

    folder: Path
    code: str
    preset = method = "none"
    config = SimpleNamespace(method=SimpleNamespace(name="none"))

    @property
    def progress(self) -> tuple[int, int]:
        return self.iterations_done, 20

    def records(self) -> list[object]:
        return []

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def iterations_done(self) -> int:
        """As many as the folder holds files `iteration…`."""
        return len(list(self.folder.glob("iteration*")))

    def next_step(self, share: Share) -> Step | None:
        code = f"from pathlib import Path\nimport sys, time\nfolder = Path({str(self.folder)!r})\n{self.code}"
        return None if (self.folder / "done").exists() else Script("work", ("a script",), code)


@pytest.fixture
def fake_cell() -> type[FakeCell]:
    """See `FakeCell`."""
    return FakeCell


@pytest.fixture
def cell(tmp_path: Path) -> Callable[[str, str], FakeCell]:
    """Makes a `FakeCell` of this name and code in a folder below `tmp_path`, which is there."""

    def make(name: str, code: str) -> FakeCell:
        (tmp_path / name).mkdir()
        return FakeCell(tmp_path / name, code)

    return make


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


@pytest.fixture
def finish(make_result: Callable[..., TaskResult]) -> Callable[..., None]:
    """Puts a finished run into a cell's folder: the checkpoints of 200 (last) and 150 iterations (best), with these
    successes of 40 by task."""

    def put(cell: Cell, counts: dict[str, int], **changes: Any) -> None:
        config = dataclasses.replace(cell.config, device="cpu")
        atomic_write_json(cell.run.config, to_plain(config))
        values: dict[str, Any] = {
            "protocol": "custom",
            "episodes": 40,
            "seed": config.seed,
            "prompts": PromptUse(text="built in", trajectory="RUN/prompt_data"),
            "trained_on": ("reach-v3", "push-v3"),
            "training_data": "made up by a test",
        }
        records = []
        for checkpoint, iterations in (("last", 200), ("best", 150)):
            for task, count in counts.items():
                split = "seen" if task in config.tasks.seen else "unseen"
                own = {"task": task, "split": split, "checkpoint": checkpoint, "successes": count}
                records.append(make_result(**(values | own | {"iterations": iterations} | changes)))
        write_results(cell.run.results, records)
        cell.run.note(
            times={"training_seconds": 100.0, "evaluation_seconds": 30.0, "total_seconds": 150.0},
            acting={"parameters": 1_234_567, "milliseconds_an_action": 0.25},
            machine={"cpu": "a test's", "cores": 2},
            versions={"torch": "2.13.0"},
            command={"argv": ["python", "-m", "llmdpd.train", "--preset", cell.preset]},
        )
        (cell.folder / "report.html").write_text("<p>a report</p>")

    return put
