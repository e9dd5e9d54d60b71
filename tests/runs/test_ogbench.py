"""The preset of OGBench's scene at toy size: collected, trained, evaluated, with nothing named but the tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ogbench", reason="pip install 'llmdpd[ogbench]'")

from llmdpd.cli.evaluate import main as evaluate
from llmdpd.cli.train import main as train
from llmdpd.evaluation.results import read_results
from llmdpd.policy.policy import Policy
from llmdpd.tasks.ogbench.layout import SPACES
from llmdpd.tasks.ogbench.tasks import MAX_STEPS
from llmdpd.tasks.specs import task_spec

SEEN, UNSEEN = ("scene-button-right", "scene-drawer-close"), ("scene-button-left",)


@pytest.mark.slow
def test_the_preset_runs_from_collecting_to_results(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        *("--preset", "ogbench-scene", "--tasks.seen", *SEEN, "--tasks.unseen", *UNSEEN, "--run-dir", str(run)),
        *("--data.root", str(tmp_path / "data"), "--data.episodes", "2", "--data.demonstration-episodes", "1"),
        *("--data.workers", "1", "--method.batch-size", "8", "--method.prompts-per-batch", "2", "--iterations", "2"),
        *("--training.checkpoint-every", "2", "--training.select-every", "0"),
        *("--evaluation.episodes", "1", "--evaluation.no-videos", "--evaluation.max-steps", "20"),
    ]
    assert train(words) == 0
    records = [record for record in read_results(run / "results.json") if record.checkpoint == "last"]
    assert {(record.task, record.split) for record in records} == {
        *((task, "seen") for task in SEEN),
        *((task, "unseen") for task in UNSEEN),
    }
    assert {record.max_steps for record in records} == {20}
    assert {task_spec(task).max_steps for task in (*SEEN, *UNSEEN)} == {MAX_STEPS}
    assert all(record.prompts.text and record.prompts.trajectory for record in records)
    assert Policy.load(run / "policy").network.spaces.layout == SPACES["scene"].layout
    out, short = tmp_path / "replay.json", ("--max-steps", "20")
    assert (
        evaluate([str(run), "--baseline", "replay", "--episodes", "1", "--tasks", *UNSEEN, *short, "--out", str(out)])
        == 0
    )
    assert [record.task for record in read_results(out)] == list(UNSEEN)
