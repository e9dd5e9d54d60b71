"""What learns nothing: open-loop replay and the tracker, on made-up examples and in a real task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.evaluation.non_learned import BASELINES, replay, retrieve_and_play, tracker
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.tasks.demonstrators import ScriptedRequest
from llmdpd.tasks.metaworld.environment import make_task
from llmdpd.tasks.metaworld.scripted import run_episode
from llmdpd.tasks.simulation.rollout import EpisodeRequest

LENGTH = 60
NONE = np.zeros(1, np.float32)  # a reward that no baseline looks at
START, THING, GOAL = np.array([0.0, 0.6, 0.2]), np.array([0.1, 0.7, 0.02]), np.array([-0.1, 0.8, 0.1])


def demonstration(rng: np.random.Generator) -> Trajectory:
    """The hand goes to the thing in 30 steps, closes, and carries it to the goal in 30 more."""
    share = np.linspace(0, 1, LENGTH // 2)[:, None]
    hand = np.concatenate([START + share * (THING - START), THING + share * (GOAL - THING)])
    things = np.concatenate([np.tile(THING, (LENGTH // 2, 1)), THING + share * (GOAL - THING)])
    observations = np.zeros((LENGTH, 39), np.float32)
    observations[:, :3], observations[:, 4:7], observations[:, 36:39] = hand, things, GOAL
    actions = rng.normal(0, 0.05, (LENGTH, 4)).astype(np.float32)
    actions[:-1, :3] += 100 * np.diff(hand, axis=0)  # an action of 1 moves it by a centimetre
    actions[:, 3] = np.repeat([-1.0, 1.0], LENGTH // 2)
    return Trajectory(observations, actions, np.zeros(LENGTH, np.float32), "push-v3")


def prompted(*demonstrations: Trajectory) -> dict[str, TaskPrompt]:
    return {"push-v3": TaskPrompt("push", "built in", demonstrations, "made up")}


def test_a_replay_does_what_was_done_and_then_stands_still(rng: np.random.Generator) -> None:
    one, two = demonstration(rng), demonstration(rng)
    act = replay(prompted(one, two), [EpisodeRequest("push-v3", seed, 500) for seed in range(3)])
    for step in (0, 7, LENGTH - 1):
        actions = np.asarray(
            act(rng.normal(size=(3, 39)).astype(np.float32), np.arange(3), np.full(3, step), np.zeros(3))
        )
        np.testing.assert_array_equal(actions, [one.actions[step], two.actions[step], one.actions[step]])
    late = np.asarray(act(np.zeros((1, 39), np.float32), np.array([1]), np.array([LENGTH]), NONE))
    np.testing.assert_array_equal(late, [[0, 0, 0, two.actions[-1, 3]]])


def test_the_tracker_goes_to_the_thing_and_on_to_the_goal_where_they_are_now(rng: np.random.Generator) -> None:
    request = EpisodeRequest("push-v3", 1, 500)
    act = tracker(prompted(demonstration(rng)), [request, request])
    thing, goal = THING + rng.uniform(-0.1, 0.1, 3), GOAL + rng.uniform(-0.1, 0.1, 3)
    hand, held, nearest = START.copy(), False, np.inf
    for step in range(400):
        observation = np.zeros((1, 39), np.float32)
        observation[0, :3], observation[0, 4:7], observation[0, 36:39] = hand, thing, goal
        # The other request's walk must not be mixed up with this one's.
        act(rng.normal(size=(1, 39)).astype(np.float32), np.array([1]), np.array([step]), NONE)
        action = np.asarray(act(observation, np.array([0]), np.array([step]), NONE))[0]
        assert np.abs(action).max() <= 1
        hand = hand + 0.01 * action[:3]
        nearest = min(nearest, float(np.linalg.norm(hand - thing)))
        held = held or (action[3] > 0 and np.linalg.norm(hand - thing) < 0.03)
        thing = hand.copy() if held else thing
    assert nearest < 0.03
    assert held
    assert np.linalg.norm(thing - goal) < 0.03


def test_the_action_of_the_nearest_state_of_one_demonstration_or_of_several_is_played(rng: np.random.Generator) -> None:
    one, two = demonstration(rng), demonstration(rng)
    two = dataclasses.replace(two, observations=two.observations + np.float32(0.5))
    turns = retrieve_and_play(prompted(one, two), [EpisodeRequest("push-v3", seed, 500) for seed in range(3)])
    near = rng.normal(0, 1e-5, (3, 39)).astype(np.float32)
    seen = near + np.stack([one.observations[7], two.observations[11], one.observations[40]])
    actions = np.asarray(turns(seen, np.arange(3), np.zeros(3, int), np.zeros(3)))
    np.testing.assert_array_equal(actions, [one.actions[7], two.actions[11], one.actions[40]])

    both = {"push-v3": dataclasses.replace(prompted(one, two)["push-v3"], together=True)}
    together = retrieve_and_play(both, [EpisodeRequest("push-v3", 0, 500)])
    for shown, step in ((one, 3), (two, 50)):
        found = together(near[:1] + shown.observations[step], np.array([0]), np.array([99]), NONE)
        np.testing.assert_array_equal(found, shown.actions[step : step + 1])


def test_the_tracker_does_a_task_that_it_is_shown_once() -> None:
    task = make_task("door-unlock")
    shown = run_episode(task, ScriptedRequest("door-unlock-v3", 3, 4, "clean", 300, 20))
    assert shown.success
    one = Trajectory(shown.observations[:-1], shown.actions, shown.rewards, "door-unlock-v3")
    prompts = {"door-unlock-v3": TaskPrompt(None, "none", (one,), "shown")}
    won = 0
    for seed in range(3):
        act = tracker(prompts, [EpisodeRequest("door-unlock-v3", seed, 500)])
        observation, success, step = task.reset(1_000_000_000 + seed), False, 0
        while not success and step < 300:
            observation, _, success, _ = task.step(
                np.asarray(act(observation[None], np.array([0]), np.array([step]), NONE))[0]
            )
            step += 1
        won += success
    assert won >= 2


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_baseline_needs_a_demonstration(name: str) -> None:
    with pytest.raises(InputError, match="follows a demonstration"):
        BASELINES[name](prompted(), [EpisodeRequest("push-v3", 0, 500)])


def test_a_tracker_needs_a_layout_that_says_how_the_hand_moves() -> None:
    one = Trajectory(np.zeros((3, 11), np.float32), np.zeros((3, 3), np.float32), np.zeros(3, np.float32), "Hopper-v4")
    prompts = {"Hopper-v4": TaskPrompt("hop", "built in", (one,), "made up")}
    with pytest.raises(InputError, match="where body and goal are") as error:
        tracker(prompts, [EpisodeRequest("Hopper-v4", 0, 500)])
    assert "replay" in str(error.value.hint)
    late = np.asarray(replay(prompts, [EpisodeRequest("Hopper-v4", 0, 500)])(NONE, np.array([0]), np.array([9]), NONE))
    np.testing.assert_array_equal(late, one.actions[-1:])
