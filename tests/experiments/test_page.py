"""The page, read back: its figures are those worked out from the results by hand, the paper's stand apart."""

from __future__ import annotations

import html
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.evaluation.intervals import bootstrap_interval, wilson_interval
from llmdpd.evaluation.results import TaskResult, write_results
from llmdpd.experiments.grids import GRIDS, Compared, Grid
from llmdpd.experiments.page import write_page
from llmdpd.experiments.plan import Plan, Settings, make_plan
from llmdpd.experiments.scheduler import Outcome

MakePlan = Callable[..., Plan]
Finish = Callable[..., None]

COUNTS = {
    ("full", 0): {"reach-v3": 40, "push-v3": 20, "door-lock-v3": 10},
    ("full", 1): {"reach-v3": 36, "push-v3": 4, "door-lock-v3": 31},
    ("plain", 0): {"reach-v3": 33, "push-v3": 22, "door-lock-v3": 0},
}
COMMAND = ["python", "-m", "llmdpd.experiment", "tests", "--out", "a folder"]


def section(page: Path, name: str) -> list[list[str]]:
    """Rows of cell texts of a section's tables."""
    (part,) = re.findall(rf'<section id="{name}">(.*?)</section>', page.read_text(), re.DOTALL)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part, re.DOTALL)
    return [[words(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def words(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


@pytest.fixture
def plan(make_test_plan: MakePlan, finish: Finish) -> Plan:
    """Two methods of two seeds, of which the second method's second seed is missing."""
    plan = make_test_plan()
    for (method, seed), counts in COUNTS.items():
        finish(plan.cells[method][seed], counts)
    return plan


def expected(counts: list[int]) -> str:
    """A cell of the table for these successes of 40 a seed."""
    rates = [100 * count / 40 for count in counts]
    spread = f" ± {statistics.stdev(rates):.1f}" if len(rates) > 1 else ""
    low, high = wilson_interval(sum(counts), 40 * len(counts))
    draws = bootstrap_interval(rates)
    seeds = f" seeds {draws[0]:.1f} to {draws[1]:.1f}" if draws else ""
    return f"{statistics.fmean(rates):.1f}{spread} {100 * low:.1f} to {100 * high:.1f}{seeds}"


def test_the_tables_figures_are_those_of_the_results(plan: Plan) -> None:
    page = write_page(plan, [], COMMAND)
    assert page == plan.out / "tests.html"
    rows = {(row[0], row[1]): row[2:] for row in section(page, "seen")[2:]}
    for name, method in (("full", "full"), ("w/o prompts", "plain")):
        seeds = [seed for key, seed in COUNTS if key == method]
        for checkpoint in ("last", "best"):
            row = rows[name, checkpoint]
            assert row[0] == expected([COUNTS[method, seed]["reach-v3"] for seed in seeds])
            assert row[2] == expected([COUNTS[method, seed]["push-v3"] for seed in seeds])
            assert row[1] == ("90.50 ± 1.25" if method == "full" else "")
    unseen = {(row[0], row[1]): row[2:] for row in section(page, "unseen")[2:]}
    assert unseen["full", "last"][:2] == [expected([10, 31]), "70.00 ± 2.50"]
    assert rows["other", "the paper's"][:3] == ["", "11.00", ""]
    # The mean over tasks: of each seed's own mean, 75 and 50.
    assert rows["full", "last"][3].startswith("62.5 ± 17.7 seeds 50.0 to 75.0")


def test_the_page_says_what_is_missing_failed_and_skipped(plan: Plan) -> None:
    failed = Outcome(plan.cells["plain"][1], 1.0, False, "train", "the end <of> its log")
    text = words(write_page(plan, [failed], COMMAND).read_text())
    assert "3 of 4 runs are done" in text
    assert "plain-seed1: failed the end <of> its log" in text
    plan.skipped["plain"] = "its weights are absent; fetch them with `x`"
    text = words(write_page(plan, [], COMMAND).read_text())
    assert "w/o prompts: skipped. its weights are absent; fetch them with `x`" in text


def test_the_page_says_which_language_model_lamo_is_made_of(
    make_test_plan: MakePlan, finish: Finish, tiny_gpt2: tuple[Path, Path]
) -> None:
    folder, text = tiny_gpt2
    grid = Grid(
        "", "", (Compared("lamo", "LaMo", "smoke", ("--method", "lamo")), Compared("own", "own", "smoke")), ("custom",)
    )
    plan = make_test_plan(grid, options=("--method.model", str(folder), "--method.corpus", str(text)))
    for key, method in (("lamo", "lamo"), ("own", "llmdpd")):
        finish(plan.cells[key][0], {"reach-v3": 40}, method=method)
    facts = [row for row in section(write_page(plan, [], COMMAND), "metadata") if row[0] == "language model"]
    assert facts == [["language model", f"{folder}, 2 layers of 16; text: {text}"]] * 2, "of both checkpoints"
    # Its sizes are compared by no one: the language model may be gone.
    cell = plan.cells["lamo"][0]
    value = json.loads(cell.run.config.read_text())
    value["method"]["network"]["language"]["layers"] = 3
    cell.run.config.write_text(json.dumps(value))
    assert cell.state == "done"


def test_the_page_says_what_was_trained_on_and_links_to_the_runs(plan: Plan) -> None:
    page = write_page(plan, [], COMMAND)
    facts = section(page, "metadata")
    assert ["trained on", "reach-v3, push-v3"] in facts
    assert ["training data", "made up by a test"] in facts
    assert ["seeds", "0, 1"] in facts
    text = page.read_text()
    assert '<a href="full-seed0/report.html">' in text
    assert "plain-seed1/report.html" not in text
    assert "default-src 'none'" in text
    assert not re.findall(r'(?:src|href)="(?!data:|#|full-|plain-)[^"]*"', text)
    assert "cpu a test&#39;s, cores 2" in text
    assert "python -m llmdpd.experiment tests --out &#39;a folder&#39;" in text
    runs = {row[0]: row[1:] for row in section(page, "cells")}
    assert runs["full-seed0"] == [
        *("done", "200", "1,234,567", "500.0", "0.25"),
        *("", "1 min 40 s", "30.0 s", "2 min 30 s"),
    ]
    assert runs["plain-seed1"][0] == "missing"


def test_figures_and_tables_beside_the_page(plan: Plan) -> None:
    page = write_page(plan, [], COMMAND)
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    value = json.loads(page.with_suffix(".json").read_text())
    row = next(r for r in value["rows"] if (r["method"], r["checkpoint"]) == ("full", "last"))
    told = row["tasks"]["door-lock-v3"]
    assert (told["by_seed"], told["successes"], told["episodes"]) == ([25.0, 77.5], 41, 80)
    assert row["reported_by_the_paper"]["door-lock-v3"] == {"mean": 70.0, "std": 2.5}
    told = next(cell for cell in value["cells"] if cell["name"] == "full-seed0")
    assert (told["parameters"], told["iteration_ms"], told["action_ms"]) == (1_234_567, 500.0, 0.25)
    assert value["bootstrap"] == {"draws": 10_000, "seed": 0}
    lines = page.with_suffix(".md").read_text().splitlines()
    assert lines[0].startswith("| unseen tasks | checkpoint | door-lock | reported |")
    assert lines[2].startswith("| full | last | 51.2 ± 37.1 (40.5 to 61.9) | 70.00 ± 2.50 |")


def test_an_experiment_without_results_has_a_page(make_test_plan: MakePlan) -> None:
    page = write_page(make_test_plan(), [], COMMAND)
    assert "0 of 4 runs are done" in page.read_text()
    assert not page.with_suffix(".png").exists()


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if any(m.variants for m in grid.methods)])
def test_every_experiment_with_further_evaluations_has_a_page(
    name: str, finish: Finish, make_result: Callable[..., TaskResult], tmp_path: Path
) -> None:
    """Non-learned baselines are rows without a method, other prompts are rows of a method's."""
    plan = make_plan(Settings(name, seeds=1, out=tmp_path / "out", data_root=tmp_path))
    for cell in (cells[0] for cells in plan.cells.values()):
        seen, unseen = cell.config.tasks.seen[0], cell.config.tasks.unseen[0]
        finish(cell, {seen: 30, unseen: 20})
        for evaluation in cell.evaluations:
            file = evaluation.file(cell.folder)
            file.parent.mkdir(exist_ok=True)
            context = f"non-learned-{evaluation.name}" if "--baseline" in evaluation.options else "retrieval"
            write_results(file, [make_result(task=unseen, split="unseen", episodes=40, successes=7, context=context)])
    write_page(plan, [], COMMAND)
    shown = json.loads((plan.out / f"{name}.json").read_text())["rows"]
    labels = {variant.label for method in plan.grid.methods for variant in method.variants}
    assert labels <= {row["variant"] for row in shown}
    baselines = [row for row in shown if (row["variant"] or "").startswith("not learned")]
    assert baselines
    assert all(row["method"] is None for row in baselines)
