from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("ogbench", reason="pip install 'llmdpd[ogbench]'")

from llmdpd.tasks.demonstrators import Demonstrators, ScriptedEpisode, ScriptedRequest
from llmdpd.tasks.ogbench.environment import MAX_STEPS, OGBenchTask
from llmdpd.tasks.ogbench.layout import CENTRE, LAYOUT, OGBENCH_DIM, SCALE
from llmdpd.tasks.ogbench.suite import MAX_STEPS as DECLARED_STEPS
from llmdpd.tasks.ogbench.tasks import TASKS
from llmdpd.tasks.simulation.render import rendering_backend
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest


def points(observation: np.ndarray) -> dict[str, np.ndarray]:
    """The layout's points in metres."""
    return {point.name: observation[list(point.at)] / SCALE + CENTRE for point in LAYOUT.points}


@pytest.fixture(scope="module")
def demonstrators() -> Demonstrators:
    return Demonstrators(goal_visible=True)


def shown(demonstrators: Demonstrators, task: str, seed: int, behaviour: str = "clean") -> ScriptedEpisode:
    return demonstrators.episode(ScriptedRequest(task, seed, seed + 1, behaviour, MAX_STEPS, 2))


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_does_the_task_that_the_start_leaves_undone(
    demonstrators: Demonstrators, task: str, fresh_seed: int
) -> None:
    # The oracles fail now and then.
    episodes = (shown(demonstrators, task, fresh_seed + number) for number in range(5))
    episode = next(episode for episode in episodes if episode.success)
    assert 3 <= episode.success_step == len(episode.actions) - 3
    assert np.array_equal(episode.rewards > 0, np.arange(len(episode.actions)) >= episode.success_step)
    before, after = (points(episode.observations[row]) for row in (0, episode.success_step + 1))
    own = TASKS[task]
    if own.place is not None:
        assert np.linalg.norm(before["cube"] - own.place) > 0.04 >= np.linalg.norm(after["cube"] - own.place) - 1e-4
    elif own.thing == "button":
        state = LAYOUT.scalars[1 + own.number]
        assert (episode.observations[0, state], episode.observations[episode.success_step + 1, state]) == (0, 1)
    else:
        moved = np.abs(after[f"{own.thing} handle"] - before[f"{own.thing} handle"])
        assert moved[1 if own.thing == "drawer" else 0] == moved.max() > 0.05


def test_a_start_is_decided_by_its_seed_on_fresh_and_used_environments(fresh_seed: int) -> None:
    rng, actions = np.random.default_rng(fresh_seed), []
    used, fresh = OGBenchTask("scene-cube-drawer"), OGBenchTask("scene-cube-drawer")
    used.reset(fresh_seed + 1)
    for _ in range(30):
        used.step(rng.uniform(-1, 1, 5))
    actions = rng.uniform(-1, 1, (20, 5))
    runs = [[task.reset(fresh_seed), *(task.step(action)[0] for action in actions)] for task in (used, fresh)]
    np.testing.assert_array_equal(*map(np.stack, runs))
    assert not np.array_equal(runs[0][0], used.reset(fresh_seed + 2))


def test_the_layout_names_what_the_simulator_has(fresh_seed: int) -> None:
    task = OGBenchTask("scene-window-open")
    observation = task.reset(fresh_seed)
    info, data = task._env.compute_ob_info(), task._env._data
    places = {
        "hand": info["proprio/effector_pos"],
        "cube": info["privileged/block_0_pos"],
        "right button": data.site("btntop_0").xpos,
        "left button": data.site("btntop_1").xpos,
        "drawer handle": info["privileged/drawer_handle_pos"],
        "window handle": info["privileged/window_handle_pos"],
    }
    for name, place in points(observation).items():
        np.testing.assert_allclose(place, places[name], atol=1e-6)
    np.testing.assert_allclose(observation[:OGBENCH_DIM], task._env.compute_observation(), atol=1e-5)
    states = [info[f"privileged/button_{number}_state"] for number in range(2)]
    assert observation[list(LAYOUT.scalars[1:3])].tolist() == states
    # Moved along x, the hand goes along x.
    for _ in range(3):
        moved = task.step([1.0 if info["proprio/effector_pos"][0] < 0.45 else -1.0, 0, 0, 0, 0])[0]
    way = points(moved)["hand"] - places["hand"]
    assert abs(way[0]) > 0.03 > 2 * max(abs(way[1:]))


def test_an_episode_has_its_steps_and_needs_a_start(fresh_seed: int) -> None:
    assert MAX_STEPS == DECLARED_STEPS
    task = OGBenchTask("scene-button-left")
    with pytest.raises(RuntimeError, match="reset"):
        task.step(np.zeros(5))
    task.reset(fresh_seed)
    over = [task.step(np.full(5, np.float32(7)))[3] for _ in range(MAX_STEPS)]
    assert over == [False] * (MAX_STEPS - 1) + [True]
    with pytest.raises(RuntimeError, match="reset"):
        task.step(np.zeros(5))


def test_demonstrations_depend_on_their_request_alone(demonstrators: Demonstrators, fresh_seed: int) -> None:
    random = np.random.get_state()[1].copy()
    one = shown(demonstrators, "scene-drawer-close", fresh_seed, "gaussian")
    shown(demonstrators, "scene-drawer-close", fresh_seed + 5, "bursts")
    again = shown(Demonstrators(goal_visible=True), "scene-drawer-close", fresh_seed, "gaussian")
    for name in ("observations", "actions", "expert_actions", "rewards"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.actions, one.expert_actions)
    assert one.noise_level > 0
    assert np.abs(one.actions).max() <= 1
    np.testing.assert_array_equal(np.random.get_state()[1], random)


@pytest.mark.skipif(rendering_backend()[0] is None, reason=rendering_backend()[1])
def test_pictures_show_the_scene(fresh_seed: int) -> None:
    with EnvPool(1, render=True) as pool:
        (result,) = pool.run(
            [EpisodeRequest("scene-cube-drawer", fresh_seed, 4, record=True, record_every=2)],
            lambda observations, index, steps, rewards: np.tile(np.float32([0, 0, -1, 0, 0]), (len(index), 1)),
        )
    assert result.frames is not None
    first, *_, last = result.frames
    assert (first.shape, first.dtype) == ((240, 320, 3), np.uint8)
    assert first.std() > 10
    assert not np.array_equal(first, last)
