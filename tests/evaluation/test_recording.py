from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmdpd.evaluation.prompts import TaskPrompt, task_prompts
from llmdpd.evaluation.recording import record_videos
from llmdpd.policy.policy import Policy
from llmdpd.tasks import EVALUATION_SEED_START
from llmdpd.tasks.simulation.rollout import EpisodeRequest
from llmdpd.tasks.specs import suite_of

Prompts = dict[str, TaskPrompt]

SETTINGS: dict[str, Any] = {"goal_visible": True, "max_steps": 6}


@pytest.fixture
def prompts(prompts: Prompts) -> dict[str, TaskPrompt]:
    return {"door-lock-v3": prompts["door-lock-v3"]}


@pytest.fixture
def renderer() -> None:
    from llmdpd.tasks.simulation.render import rendering_backend

    backend, reason = rendering_backend()
    if backend is None:
        pytest.skip(reason)


def test_without_a_renderer_the_reason_is_printed_and_left_beside(
    policy: Policy,
    prompts: Prompts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmdpd.tasks.simulation.render.rendering_backend", lambda: (None, "no renderer here; get one"))
    record_videos(policy, prompts, tmp_path / "videos", **SETTINGS)
    assert "no videos: no renderer here; get one" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "videos").iterdir()] == ["README.txt"]
    assert (tmp_path / "videos" / "README.txt").read_text() == "no renderer here; get one\n"


def test_environments_that_render_none_are_told_apart_from_a_missing_renderer(
    policy: Policy, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report shows what stands in the file, and would else advise to install a renderer."""
    monkeypatch.setattr("llmdpd.tasks.simulation.render.rendering_backend", lambda: ("any", ""))
    monkeypatch.setattr("llmdpd.tasks.base.TaskSuite.renders", lambda *_: False)
    record_videos(policy, prompts, tmp_path / "videos", **SETTINGS)
    assert "render_modes" in (tmp_path / "videos" / "README.txt").read_text()


def test_a_video_shows_an_evaluated_episode(renderer: None, policy: Policy, prompts: Prompts, tmp_path: Path) -> None:
    record_videos(policy, prompts, tmp_path, **SETTINGS)
    names = {f"door-lock-v3.{kind}" for kind in ("mp4", "png", "json")} | {"attention"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "attention" / "door-lock-v3.png").read_bytes().startswith(b"\x89PNG")
    info = json.loads((tmp_path / "door-lock-v3.json").read_text())
    assert info == {"seed": EVALUATION_SEED_START, "steps": 6, "success": False, "checkpoint": "last"}


@pytest.mark.parametrize(("steps_per_second", "expected"), [(20, 5), (120, 30)])
def test_the_suite_says_how_fast_a_video_is(
    renderer: None,
    policy: Policy,
    prompts: Prompts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps_per_second: float,
    expected: float,
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(suite_of("door-lock-v3"), "steps_per_second", steps_per_second)
    monkeypatch.setattr(
        "llmdpd.evaluation.recording.save_video", lambda *_, frames_per_second: rates.append(frames_per_second)
    )
    record_videos(policy, prompts, tmp_path, **SETTINGS)
    assert rates == [expected]


@pytest.mark.parametrize("most", [None, 1])
def test_unseen_tasks_are_recorded_first(
    straight_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    monkeypatch.setattr("llmdpd.tasks.simulation.render.rendering_backend", lambda: ("egl", ""))
    asked: list[str] = []

    def noted(prompts: object, requests: list[EpisodeRequest]) -> Any:
        asked.extend(request.task for request in requests)
        raise KeyboardInterrupt

    prompts = task_prompts(("reach-v3", "push-v3", "door-lock-v3"), straight_run / "prompt_data", True)
    with pytest.raises(KeyboardInterrupt):
        record_videos(noted, prompts, tmp_path, **SETTINGS, seen=("push-v3", "reach-v3"), most=most)
    assert asked == ["door-lock-v3", "reach-v3", "push-v3"][:most]


def test_a_stop_is_heeded(renderer: None, policy: Policy, prompts: Prompts, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_videos(policy, prompts, tmp_path, **SETTINGS, check=stop)
    assert list(tmp_path.iterdir()) == []
