from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.simulation import render
from llmdpd.tasks.simulation.render import rendering_backend, require_backend
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest, EpisodeResult

BACKEND, REASON = rendering_backend()
needs_renderer = pytest.mark.skipif(BACKEND is None, reason=REASON)


def record(task: str, seed: int, max_steps: int, record_every: int = 4) -> EpisodeResult:
    """One episode, alone, with its frames."""
    with EnvPool(1, parallel=1, render=True) as pool:
        return pool.run([EpisodeRequest(task, seed, max_steps, record=True, record_every=record_every)], act)[0]


def act(observations: np.ndarray, index: np.ndarray, step: np.ndarray, reward: np.ndarray) -> np.ndarray:
    return np.sin(observations[:, :4] * 31 + step[:, None])


def test_a_backend_that_does_not_work_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    backend, reason = rendering_backend()
    assert backend is None
    assert "MUJOCO_GL=nonsense" in reason
    assert "libosmesa6" in reason
    with pytest.raises(InputError, match="off-screen renderer"):
        require_backend()


@pytest.mark.parametrize("picture", [np.ones((2, 2, 3)), np.zeros((2, 2, 3))])
def test_the_trial_by_itself_ends_as_the_renderers_picture_is(
    picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the trial itself is wrong no renderer works, and the tests that need one would be skipped."""
    shown = SimpleNamespace(update_scene=lambda data: None, render=lambda: picture)
    monkeypatch.setattr("mujoco.Renderer", lambda *_: nullcontext(shown))
    with nullcontext() if picture.any() else pytest.raises(AssertionError, match="black"):
        exec(render._TRIAL, {})


def test_without_any_renderer_every_attempt_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_try", lambda backend: f"no {backend} here")
    backend, reason = render._find.__wrapped__(None)
    assert backend is None
    for part in ("egl: no egl here", "osmesa: no osmesa here", "libosmesa6"):
        assert part in reason


@needs_renderer
def test_a_video_shows_the_episode_that_an_evaluation_runs() -> None:
    result = record("coffee-push", 11, max_steps=10)
    with EnvPool(1) as pool:
        (plain,) = pool.run([EpisodeRequest("coffee-push", 11, max_steps=10)], act)
    assert np.array_equal(result.final_observation, plain.final_observation)
    assert result.episode_return == plain.episode_return
    assert plain.frames is None
    # The start, steps 4 and 8, and the end.
    assert result.frames is not None
    assert len(result.frames) == 4
    for frame in result.frames:
        assert frame.dtype == np.uint8
        assert frame.shape == (240, 320, 3)
    assert not np.array_equal(result.frames[0], result.frames[-1])


@needs_renderer
def test_the_picture_is_upright() -> None:
    frames = record("coffee-push", 11, max_steps=1).frames
    assert frames is not None
    # The background above the scene is one grey; below is the table with its grain, lit and textured.
    top, bottom = frames[0][:20], frames[0][-20:]
    assert top.std() < bottom.std()
    # The robot's red arm stands at the left, the coffee machine (dark red) to the right of the middle.
    red = (frames[0][..., 0] > 100) & (frames[0][..., 1] < 60)
    assert np.nonzero(red)[1].mean() < 160


@needs_renderer
def test_environments_of_one_worker_draw_their_own_scenes() -> None:
    tasks = ("coffee-push", "box-close", "hand-insert")
    requests = [EpisodeRequest(task, 3, max_steps=6, record=True, record_every=2) for task in tasks]
    alone = [record(task, 3, max_steps=6, record_every=2).frames for task in tasks]
    with EnvPool(1, render=True) as pool:
        together = [result.frames for result in pool.run(requests, act)]
    for task, one, mixed in zip(tasks, alone, together, strict=True):
        assert one is not None
        assert mixed is not None
        assert np.array_equal(np.stack(one), np.stack(mixed)), task
