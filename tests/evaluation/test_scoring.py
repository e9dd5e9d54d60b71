from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmdpd.config.schema import PROTOCOLS, EvaluationConfig
from llmdpd.errors import InputError
from llmdpd.evaluation.prompts import TaskPrompt, task_prompts
from llmdpd.evaluation.results import ActingUse, TaskResult, read_results, wilson_interval
from llmdpd.evaluation.scoring import evaluate_run, film_run, protocol_of
from llmdpd.policy.policy import Policy
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks import ML45_TEST, ML45_TRAIN

CONFIG = EvaluationConfig(episodes=2, max_steps=8)


@pytest.fixture
def prompts(straight_run: Path) -> dict[str, TaskPrompt]:
    return task_prompts(("reach-v3", "door-lock-v3"), straight_run / "prompt_data", True)


def untimed(records: list[TaskResult]) -> list[TaskResult]:
    return [dataclasses.replace(record, wall_seconds=0.0) for record in records]


def children() -> list[int]:
    """Worker processes of this one."""
    pid = os.getpid()
    found = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [
        child for child in found if b"llmdpd.tasks.simulation.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_records_say_what_was_evaluated(run_copy: Path, prompts: dict[str, TaskPrompt], tmp_path: Path) -> None:
    records = evaluate_run(
        RunFolder(run_copy), CONFIG, prompts, checkpoints=("last",), workers=1, out=tmp_path / "o.json"
    )
    assert read_results(tmp_path / "o.json") == records
    assert [(r.task, r.split, r.checkpoint, r.episodes) for r in records] == [
        ("reach-v3", "seen", "last", 2),
        ("door-lock-v3", "unseen", "last", 2),
    ]
    for record in records:
        assert record.successes is not None
        assert record.ci95 == wilson_interval(record.successes, 2)
        assert record.prompts.text == "built in"
        assert record.goal_visible is True
        assert record.wall_seconds > 0
        assert record.max_steps == 8
        assert record.acting == ActingUse(
            samples=1, selection="soft", temperature=1.0, noise_scale=0.3, sampler="ddpm", steps=5
        )
        assert record.protocol == "custom", "the paper's tasks are others"


def test_a_task_without_an_example_was_seen_in_one_view(
    run_copy: Path, prompts: dict[str, TaskPrompt], tmp_path: Path
) -> None:
    told = {task: dataclasses.replace(prompt, examples=()) for task, prompt in prompts.items()}
    common: dict[str, Any] = {"checkpoints": ("last",), "acting": {"views": 8}, "workers": 1}
    for given, views in ((told, 1), (prompts, 8)):
        records = evaluate_run(RunFolder(run_copy), CONFIG, given, out=tmp_path / f"{views}.json", **common)
        assert {record.acting.views for record in records} == {views}
        assert {bool(record.prompts.trajectory) for record in records} == {views == 8}


def test_records_say_how_was_acted(run_copy: Path, prompts: dict[str, TaskPrompt], tmp_path: Path) -> None:
    chain = {"sampler": "ddim", "steps": 2, "precision": "bf16"}
    changes = {"samples": 3, "selection": "max", "noise_scale": 0.5, "views": 2, **chain}
    out = tmp_path / "o.json"
    records = evaluate_run(RunFolder(run_copy), CONFIG, prompts, acting=changes, workers=1, out=out)
    for record in records:
        assert dataclasses.asdict(record.acting) == {"temperature": 1.0, "replan": 1, **changes}


def test_a_protocol_is_called_by_its_name_where_it_was_followed() -> None:
    seen, unseen = PROTOCOLS["paper"].seen, PROTOCOLS["paper"].unseen
    assert protocol_of("paper", seen, [*unseen, *seen]) == "paper"
    assert protocol_of("paper", reversed(seen), unseen[:1]) == "paper"
    assert protocol_of("paper", seen[:2], seen) == "custom"
    assert protocol_of("paper", seen, [*seen, "soccer-v3"]) == "custom"
    assert protocol_of("ml45", ML45_TRAIN, ML45_TEST) == "ml45"
    assert protocol_of("ml45", ML45_TRAIN[1:], ML45_TEST) == "custom"
    assert protocol_of("my own", ["reach-v3"], ["push-v3"]) == "my own"


def test_a_worker_killed_in_an_evaluation_is_told_and_changes_nothing(
    run_copy: Path, prompts: dict[str, TaskPrompt], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(run_copy)
    plain = evaluate_run(run, CONFIG, prompts, checkpoints=("last",), workers=2, out=tmp_path / "a.json")
    killed: list[int] = []

    def kill() -> None:
        while len(found := children()) < 2:
            time.sleep(0.001)
        killed.append(found[0])
        os.kill(found[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    after = evaluate_run(run, CONFIG, prompts, checkpoints=("last",), workers=2, out=tmp_path / "b.json")
    killer.join()
    assert untimed(after) == untimed(plain)
    output = capsys.readouterr().out
    assert "a worker died and its episodes were redone" in output
    assert f"process {killed[0]}" in output
    assert "signal 9" in output


def test_a_best_that_is_the_last_is_not_evaluated_twice(
    run_copy: Path, prompts: dict[str, TaskPrompt], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, asked = RunFolder(run_copy), []
    shutil.rmtree(run.policy("best"))
    shutil.copytree(run.policy("last"), run.policy("best"))
    records = evaluate_run(run, CONFIG, prompts, workers=1, out=tmp_path / "o.json", check=lambda: asked.append(1))
    assert len(asked) == CONFIG.episodes * len(prompts)
    assert [r.checkpoint for r in records] == ["last", "last", "best", "best"]
    assert [dataclasses.replace(r, checkpoint="best") for r in records[:2]] == records[2:]
    assert "same results" in capsys.readouterr().out


def test_a_stop_leaves_the_old_results(run_copy: Path, prompts: dict[str, TaskPrompt]) -> None:
    run = RunFolder(run_copy)
    before = run.results.read_bytes()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, CONFIG, prompts, workers=1, check=stop)
    assert run.results.read_bytes() == before
    assert children() == []


def test_a_policy_that_is_not_there(run_copy: Path, prompts: dict[str, TaskPrompt], tmp_path: Path) -> None:
    run = RunFolder(run_copy)
    shutil.rmtree(run.policy("best"))
    with pytest.raises(InputError) as error:
        evaluate_run(run, CONFIG, prompts, checkpoints=("best",))
    assert (error.value.found, error.value.hint) == ("last", None)
    records = evaluate_run(run, CONFIG, prompts, workers=1, out=tmp_path / "o.json")
    assert {r.checkpoint for r in records} == {"last"}
    shutil.rmtree(run.policy("last"))
    with pytest.raises(InputError, match="--resume"):
        evaluate_run(run, CONFIG, prompts)


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_policy_is_named(run_copy: Path, prompts: dict[str, TaskPrompt], damage: str) -> None:
    file = run_copy / "policy" / "model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(InputError, match=damage) as error:
        evaluate_run(RunFolder(run_copy), CONFIG, prompts)
    assert error.value.path == str(file)


def test_where_films_are_or_why_not(
    run_copy: Path,
    prompts: dict[str, TaskPrompt],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmdpd.tasks.simulation.render.rendering_backend", lambda: (None, "there is no renderer"))
    film_run(RunFolder(run_copy), prompts, 3)
    assert "no films: there is no renderer" in capsys.readouterr().out
    assert (run_copy / "films" / "README.txt").is_file()


def test_what_was_evaluated_is_what_is_filmed(
    run_copy: Path, prompts: dict[str, TaskPrompt], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmdpd.evaluation import scoring

    asked: list[tuple[int, int, str, Path]] = []

    def noted(policy: Policy, prompts: object, folder: Path, *, checkpoint: str, **others: Any) -> str:
        asked.append((policy.facts["iterations"], policy.acting.samples, checkpoint, folder))
        return "not in this test"

    monkeypatch.setattr(scoring, "make_films", noted)
    run = RunFolder(run_copy)
    best = Policy.load(run.policy("best")).facts["iterations"]
    film_run(run, prompts, 3)
    film_run(run, prompts, 3, checkpoint="best", acting={"samples": 4}, folder=tmp_path)
    assert asked == [(200, 1, "last", run.films), (best, 4, "best", tmp_path)]
    with pytest.raises(InputError, match="absent"):
        film_run(run, prompts, 3, device="cuda:99")


@pytest.mark.parametrize("most", [None, 1, 2])
def test_unseen_tasks_are_filmed_first(
    run_copy: Path, prompts: dict[str, TaskPrompt], monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    from llmdpd.evaluation import scoring

    filmed: list[str] = []

    def noted(policy: Policy, prompts: dict[str, TaskPrompt], folder: Path, **others: Any) -> str:
        filmed.extend(prompts)
        return "not in this test"

    monkeypatch.setattr(scoring, "make_films", noted)
    seen = Policy.load(RunFolder(run_copy).policy("last")).facts["trained_on"]
    film_run(RunFolder(run_copy), prompts, 3, most=most)
    expected = [task for task in prompts if task not in seen] + [task for task in prompts if task in seen]
    assert filmed == expected[:most]
    assert expected != list(prompts), "the test's own order has a seen task first"


def test_a_stop_while_filming_is_heeded(run_copy: Path, prompts: dict[str, TaskPrompt]) -> None:
    from llmdpd.tasks.simulation.render import rendering_backend

    if rendering_backend()[0] is None:
        pytest.skip(rendering_backend()[1])

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        film_run(RunFolder(run_copy), prompts, 2, check=stop)
    assert list((run_copy / "films").iterdir()) == []
    assert children() == []
