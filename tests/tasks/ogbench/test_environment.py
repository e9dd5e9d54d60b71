from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("ogbench", reason="pip install 'llmdpd[ogbench]'")

from llmdpd.tasks.demonstrators import Demonstrators, ScriptedEpisode, ScriptedRequest
from llmdpd.tasks.ogbench.environment import OGBenchTask
from llmdpd.tasks.ogbench.layout import CENTRE, SCALE, SPACES
from llmdpd.tasks.ogbench.tasks import MAX_STEPS, TASKS
from llmdpd.tasks.simulation.render import rendering_backend
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest

ONE_OF_EACH = ("scene-window-open", "cube-single-far-left", "cube-double-blue-near-right", "puzzle-3x3-far-centre")


def points(task: str, observation: np.ndarray) -> dict[str, np.ndarray]:
    """The layout's points in metres."""
    layout = SPACES[TASKS[task].kind].layout
    return {point.name: observation[list(point.at)] / SCALE + CENTRE for point in layout.points}


def states(task: str, observation: np.ndarray) -> np.ndarray:
    """Which buttons are on."""
    return observation[list(SPACES[TASKS[task].kind].button_states)]


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
    rows = [episode.observations[row] for row in (0, episode.success_step + 1)]
    before, after = (points(task, row) for row in rows)
    own = TASKS[task]
    if own.place is not None:
        cube = SPACES[own.kind].cubes[own.number]
        assert np.linalg.norm(before[cube] - own.place) > 0.04 >= np.linalg.norm(after[cube] - own.place) - 1e-4
    elif own.kind == "puzzle-3x3":
        row, column = divmod(own.number, 3)
        neighbours = {(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)}
        changed = np.flatnonzero(states(task, rows[0]) != states(task, rows[1]))
        assert {divmod(int(button), 3) for button in changed} == neighbours & {
            (i, j) for i in range(3) for j in range(3)
        }
        button = SPACES[own.kind].buttons[own.number]
        assert np.linalg.norm((after["hand"] - after[button])[:2]) < 0.05
    elif own.thing == "button":
        assert (states(task, rows[0])[own.number], states(task, rows[1])[own.number]) == (0, 1)
    else:
        moved = np.abs(after[f"{own.thing} handle"] - before[f"{own.thing} handle"])
        assert moved[1 if own.thing == "drawer" else 0] == moved.max() > 0.05


@pytest.mark.parametrize("task", ONE_OF_EACH[1:])
def test_the_oracles_mostly_succeed(demonstrators: Demonstrators, task: str, fresh_seed: int) -> None:
    assert sum(shown(demonstrators, task, fresh_seed + number).success for number in range(6)) >= 4


@pytest.mark.parametrize("task", ["scene-cube-drawer", "scene-button-left", "scene-drawer-open", *ONE_OF_EACH])
def test_no_task_is_done_at_its_start(task: str, fresh_seed: int) -> None:
    environment = OGBenchTask(task)
    for seed in range(fresh_seed, fresh_seed + 10):
        environment.reset(seed)
        environment._env.post_step()  # what decides success after a step
        assert not environment._env._success


def test_cubes_start_apart(fresh_seed: int) -> None:
    task = "cube-double-blue-middle-centre"
    environment = OGBenchTask(task)
    for seed in range(fresh_seed, fresh_seed + 30):
        found = points(task, environment.reset(seed))
        places = [found["red cube"][:2], found["blue cube"][:2], np.array(TASKS[task].place[:2])]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(places, 2)) > 0.08 - 1e-6


def test_pressing_a_neighbour_is_no_success(fresh_seed: int) -> None:
    # It changes the button's colour too.
    task = OGBenchTask("puzzle-3x3-middle-centre")
    before = task.reset(fresh_seed)
    task._env._cur_button_states[[0, 1, 2, 4]] ^= 1  # as by a press of the near centre button
    after, reward, success, _ = task.step(np.zeros(5))
    assert states(task.task, before)[4] != states(task.task, after)[4]
    assert (success, reward) == (False, 0)


@pytest.mark.parametrize("name", ["scene-cube-drawer", *ONE_OF_EACH])
def test_a_start_is_decided_by_its_seed_on_fresh_and_used_environments(name: str, fresh_seed: int) -> None:
    rng, actions = np.random.default_rng(fresh_seed), []
    used, fresh = OGBenchTask(name), OGBenchTask(name)
    used.reset(fresh_seed + 1)
    for _ in range(30):
        used.step(rng.uniform(-1, 1, 5))
    actions = rng.uniform(-1, 1, (20, 5))
    runs = [[task.reset(fresh_seed), *(task.step(action)[0] for action in actions)] for task in (used, fresh)]
    np.testing.assert_array_equal(*map(np.stack, runs))
    assert not np.array_equal(runs[0][0], used.reset(fresh_seed + 2))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_layout_names_what_the_simulator_has(name: str, fresh_seed: int) -> None:
    task, space = OGBenchTask(name), SPACES[TASKS[name].kind]
    observation = task.reset(fresh_seed)
    info, data = task._env.compute_ob_info(), task._env._data
    places = {
        "hand": info["proprio/effector_pos"],
        **{cube: data.body(f"object_{number}").xpos for number, cube in enumerate(space.cubes)},
        **{button: data.site(f"btntop_{number}").xpos for number, button in enumerate(space.buttons)},
        **{handle: info[f"privileged/{handle.replace(' ', '_')}_pos"] for handle in space.handles},
    }
    found = points(name, observation)
    assert found.keys() == places.keys()
    for point, place in found.items():
        np.testing.assert_allclose(place, places[point], atol=1e-6)
    assert observation.shape == (space.state_dim,)
    np.testing.assert_allclose(observation[: space.ogbench_dim], task._env.compute_observation(), atol=1e-5)
    on = [info[f"privileged/button_{number}_state"] for number in range(len(space.buttons))]
    assert states(name, observation).tolist() == on
    yaw = info["proprio/effector_yaw"][0]
    turns = [4 * (info[f"privileged/block_{cube}_yaw"][0] - yaw) for cube in range(len(space.cubes))]
    expected = [[np.cos(turn), np.sin(turn)] for turn in (*turns, 2 * yaw)]
    np.testing.assert_allclose(observation[list(space.layout.scalars[1 + len(on) :])], np.ravel(expected), atol=1e-5)
    # Moved along x, the hand goes along x.
    start = places["hand"].copy()
    for _ in range(3):
        moved = task.step([1.0 if start[0] < 0.45 else -1.0, 0, 0, 0, 0])[0]
    way = points(name, moved)["hand"] - start
    assert abs(way[0]) > 0.03 > 2 * max(abs(way[1:]))


def test_buttons_and_places_lie_where_their_names_say(fresh_seed: int) -> None:
    found = points("puzzle-3x3-far-left", OGBenchTask("puzzle-3x3-far-left").reset(fresh_seed))
    near, left, far = (found[f"{name} button"] for name in ("near right", "near left", "far right"))
    assert left - near == pytest.approx([0, 0.2, 0], abs=1e-6)
    assert far - near == pytest.approx([0.2, 0, 0], abs=1e-6)
    places = [np.array(TASKS[f"cube-single-{name}"].place) for name in ("near-right", "near-left", "far-right")]
    assert places[1] - places[0] == pytest.approx([0, 0.3, 0])
    assert places[2] - places[0] == pytest.approx([0.2, 0, 0])


def test_an_episode_has_its_steps_and_needs_a_start(fresh_seed: int) -> None:
    task = OGBenchTask("scene-button-left")
    with pytest.raises(RuntimeError, match="reset"):
        task.step(np.zeros(5))
    task.reset(fresh_seed)
    over = [task.step(np.full(5, np.float32(7)))[3] for _ in range(MAX_STEPS)]
    assert over == [False] * (MAX_STEPS - 1) + [True]
    with pytest.raises(RuntimeError, match="reset"):
        task.step(np.zeros(5))


@pytest.mark.parametrize("task", ["scene-drawer-close", *ONE_OF_EACH[2:]])
def test_demonstrations_depend_on_their_request_alone(demonstrators: Demonstrators, task: str, fresh_seed: int) -> None:
    random = np.random.get_state()[1].copy()
    one = shown(demonstrators, task, fresh_seed, "gaussian")
    shown(demonstrators, task, fresh_seed + 5, "bursts")
    again = shown(Demonstrators(goal_visible=True), task, fresh_seed, "gaussian")
    for name in ("observations", "actions", "expert_actions", "rewards"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.actions, one.expert_actions)
    assert one.noise_level > 0
    assert np.abs(one.actions).max() <= 1
    np.testing.assert_array_equal(np.random.get_state()[1], random)


@pytest.mark.skipif(rendering_backend()[0] is None, reason=rendering_backend()[1])
@pytest.mark.parametrize("task", ["scene-cube-drawer", *ONE_OF_EACH[2:]])
def test_pictures_show_the_scene(task: str, fresh_seed: int) -> None:
    with EnvPool(1, render=True) as pool:
        (result,) = pool.run(
            [EpisodeRequest(task, fresh_seed, 4, record=True, record_every=2)],
            lambda observations, index, steps, rewards: np.tile(np.float32([0, 0, -1, 0, 0]), (len(index), 1)),
        )
    assert result.frames is not None
    first, *_, last = result.frames
    assert (first.shape, first.dtype) == ((240, 320, 3), np.uint8)
    assert first.std() > 10
    assert not np.array_equal(first, last)
