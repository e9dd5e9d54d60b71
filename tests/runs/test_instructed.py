"""The protocol whose text decides, at toy size: collected, trained, evaluated under its own and the other text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.cli.evaluate import main as evaluate
from llmdpd.data import load_dataset
from llmdpd.evaluation.results import read_results

SEEN, UNSEEN = ("finish-handle-press", "wait-handle-press"), ("wait-door-unlock",)
TINY = {
    **{"data.episodes": 3, "data.noise": "clean", "data.demonstration-episodes": 1, "data.workers": 1, "threads": 1},
    **{"training.iterations": 20, "training.checkpoint-every": 20, "evaluation.episodes": 1, "evaluation.max-steps": 5},
    **{"method.batch-size": 8, "method.prompts-per-batch": 2},
}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    fields = {**TINY, "run-dir": tmp_path / "run", "data.root": tmp_path / "data"}
    return ["--protocol", "text", *(str(word) for name, value in fields.items() for word in (f"--{name}", value))]


@pytest.mark.slow
def test_the_text_can_be_exchanged_under_the_same_demonstration(
    words: list[str], tmp_path: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "other.json"
    assert train(*words, "--tasks.seen", *SEEN, "--tasks.unseen", *UNSEEN, "--evaluation.no-videos") == 0
    kept = load_dataset(run / "prompt_data")
    assert sorted(kept.tasks) == ["finish-door-unlock", "finish-handle-press"], "of both handle-press tasks one"
    own = {record.task: record for record in read_results(run / "results.json")}
    assert set(own) == {*SEEN, *UNSEEN}
    assert {record.prompts.kind for record in own.values()} == {"own"}
    # The run holds the demonstration of a task that it has not evaluated, finish-door-unlock, and none of another.
    shared = ["--episodes", "1", "--workers", "1", "--threads", "1"]
    asked = [*SEEN, *UNSEEN, "finish-door-unlock"]
    other_text = ["--prompts", "other-text", "--checkpoint", "last", "--tasks", *asked, "--out", str(out)]
    assert evaluate([str(run), *shared, *other_text]) == 0
    records = read_results(out)
    assert [record.task for record in records] == asked
    for record in records:
        instruction, _, base = record.task.partition("-")
        other = f"{'wait' if instruction == 'finish' else 'finish'}-{base}"
        assert record.prompts.text == f"other text ({other}'s): built in"
        assert record.prompts.trajectory == own[SEEN[0]].prompts.trajectory
        assert record.prompts.kind == "other text"
        assert record.goal_visible
        assert record.acting.contradicted_text == "keep", "here texts are to say something else than what is shown"
        assert record.acting.track_after == 0, "and the tracker would do what is shown"
    capsys.readouterr()
    for options, told in (
        (["--tasks", "wait-push"], "no demonstration of this task"),
        (["--prompts", "other-text", "--tasks", "push"], "no other task shares"),
        (["--prompts", "other-text", "--prompt-text", "text.txt"], "two texts for each task"),
        (["--prompts", "other-text", "--baseline", "replay"], "reads no text"),
    ):
        assert evaluate([str(run), *shared, *options]) == 2
        assert told in capsys.readouterr().err


def test_a_task_is_not_learned_without_the_one_that_shows_it(words: list[str], refused: Callable[..., str]) -> None:
    message = refused(*words, "--tasks.seen", "wait-push", "--tasks.unseen")
    assert "wait-push without finish-push" in message
