from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from llmdpd.evaluation import scoring
from llmdpd.evaluation.config import EvaluationConfig
from llmdpd.evaluation.intervals import wilson_interval
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.results import ActingUse, TaskResult
from llmdpd.evaluation.scoring import evaluate_policies, protocol_of
from llmdpd.policy.policy import Policy
from llmdpd.tasks.metaworld.names import ML45_TEST, ML45_TRAIN
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.tasks.simulation.rollout import EnvPool

Prompts = dict[str, TaskPrompt]
CONFIG = EvaluationConfig(episodes=2, max_steps=8)


def children() -> list[int]:
    """Worker processes of this one."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    found = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [
        child for child in found if b"llmdpd.tasks.simulation.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def untimed(records: list[TaskResult]) -> list[TaskResult]:
    return [dataclasses.replace(record, wall_seconds=0.0) for record in records]


def test_records_say_what_was_evaluated_and_how(policy: Policy, prompts: Prompts) -> None:
    records = evaluate_policies({"last": policy}, CONFIG, prompts, workers=1)
    assert [(r.task, r.split, r.checkpoint, r.episodes) for r in records] == [
        ("reach-v3", "seen", "last", 2),
        ("door-lock-v3", "unseen", "last", 2),
    ]
    for record in records:
        assert record.successes is not None
        assert record.ci95 == wilson_interval(record.successes, 2)
        assert (record.prompts.text, record.goal_visible, record.max_steps) == ("built in", True, 8)
        assert record.wall_seconds > 0
        assert record.acting == ActingUse(
            **{
                "samples": 1,
                "selection": "soft",
                "temperature": 1.0,
                "noise_scale": 0.3,
                "sampler": "ddpm",
                "steps": 5,
            },
            contradicted_text="drop",
            track_after=3.0,
        )
        assert record.protocol == "custom", "the paper's tasks are others"
    changes = {"samples": 3, "selection": "max", "noise_scale": 0.5, "sampler": "ddim", "steps": 2, "precision": "bf16"}
    changes |= {"contradicted_text": "keep", "track_after": 0.5}
    alone = {task: dataclasses.replace(prompt, demonstrations=()) for task, prompt in prompts.items()}
    for record in evaluate_policies({"last": policy.with_acting(**changes)}, CONFIG, alone, workers=1):
        done = {**changes, "track_after": 0.0}  # there is nothing to track
        assert dataclasses.asdict(record.acting) == {"temperature": 1.0, "action_horizon": 1, **done}
        assert record.prompts.trajectory is False


def test_a_protocol_is_called_by_its_name_where_it_was_followed() -> None:
    seen, unseen = PROTOCOLS["paper"].seen, PROTOCOLS["paper"].unseen
    assert protocol_of("paper", seen, [*unseen, *seen]) == "paper"
    assert protocol_of("paper", reversed(seen), unseen[:1]) == "paper"
    assert protocol_of("paper", seen[:2], seen) == "custom"
    assert protocol_of("paper", seen, [*seen, "soccer-v3"]) == "custom"
    assert protocol_of("ml45", ML45_TRAIN, ML45_TEST) == "ml45"
    assert protocol_of("ml45", ML45_TRAIN[1:], ML45_TEST) == "custom"
    assert protocol_of("my own", ["reach-v3"], ["push-v3"]) == "my own"


def test_a_killed_worker_is_reported_and_changes_nothing(
    policy: Policy, prompts: Prompts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "EnvPool", EnvPool)  # whose workers begin with it: see `kept_workers`
    others = children()
    plain = evaluate_policies({"last": policy}, CONFIG, prompts, workers=2)
    killed: list[int] = []

    def kill() -> None:
        while len(found := [child for child in children() if child not in others]) < 2:
            time.sleep(0.001)
        killed.append(found[0])
        os.kill(found[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    after = evaluate_policies({"last": policy}, CONFIG, prompts, workers=2)
    killer.join()
    assert untimed(after) == untimed(plain)
    output = capsys.readouterr().out
    for words in ("a worker died and its episodes were redone", f"process {killed[0]}", "signal 9"):
        assert words in output


def test_a_best_that_is_the_last_is_not_evaluated_twice(
    policy: Policy, prompts: Prompts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    run = EnvPool.run
    monkeypatch.setattr(EnvPool, "run", lambda self, requests, *rest: asked.append(1) or run(self, requests, *rest))
    records = evaluate_policies({"last": policy, "best": policy}, CONFIG, prompts, workers=1)
    assert len(asked) == 1
    assert [r.checkpoint for r in records] == ["last", "last", "best", "best"]
    assert [dataclasses.replace(r, checkpoint="best") for r in records[:2]] == records[2:]
    assert "same results" in capsys.readouterr().out


def test_a_stop_leaves_no_process(policy: Policy, prompts: Prompts) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    before = children()
    with pytest.raises(KeyboardInterrupt):
        evaluate_policies({"last": policy}, CONFIG, prompts, workers=1, check=stop)
    assert {*children()} <= {*before}
