"""Where the useful part of a demonstration ends, by what is known of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, choose_steps, make_tokens
from llmdpd.prompts.useful_part import FEW, TAIL, Recorded, useful_part, without_standing
from llmdpd.tasks.layout import Layout, Point

HAND, CUBE, GOAL = (0, 1, 2), (3, 4, 5), (7, 8, 9)
LAYOUT = Layout((Point("hand", HAND), Point("cube", CUBE), Point("goal", GOAL)), goal="goal", gripper=(6,))
ENCODER = TrajectoryEncoderConfig(layers=1, heads=2, width=16, inner=16, steps=10, trim="useful")


def wandering(rng: np.random.Generator, arrival: int, length: int) -> Recorded:
    """A hand that brings a cube to a goal, which it reaches at step `arrival`, and then goes astray without it."""
    seen = np.zeros((length, 10), np.float32)
    seen[:, GOAL] = goal = rng.uniform(0.3, 0.6, 3)
    share = np.clip(np.arange(length) / arrival, 0, 1)[:, None]
    seen[:, CUBE] = share * goal + (1 - share) * 0.1
    away = rng.normal(size=(length, 3)).cumsum(0)
    seen[:, HAND] = np.where(share < 1, seen[:, CUBE], goal + away)
    return Recorded(seen, rng.uniform(-1, 1, (length, 4)).astype(np.float32))


def test_the_end_is_found_by_what_is_known_best(rng: np.random.Generator) -> None:
    arrival, step, highest = (int(n) for n in rng.integers([100, 200, 300], [150, 250, 350]))
    shown = wandering(rng, arrival, 500)
    rewards = np.where(np.arange(500) < highest, rng.uniform(0, 0.9, 500), 1.0).astype(np.float32)
    assert useful_part(shown._replace(rewards=rewards, success=1, success_step=step), LAYOUT) == (
        step + 1 + FEW,
        "success",
    )
    assert useful_part(shown._replace(rewards=rewards, success=1), LAYOUT) == (highest + 1 + TAIL, "reward")
    assert useful_part(shown._replace(rewards=rewards), LAYOUT) == (highest + 1 + TAIL, "reward")
    steps, by = useful_part(shown, LAYOUT)
    assert by == "goal"
    assert arrival - 0.1 * arrival <= steps - 1 - TAIL <= arrival
    assert useful_part(shown._replace(rewards=rewards, success=0), LAYOUT) == (500, "whole")


def test_a_highest_reward_that_passes_says_nothing_unless_it_is_known_to_be_a_success(rng: np.random.Generator) -> None:
    shown = wandering(rng, 100, 500)
    rewards = rng.uniform(0, 0.5, 500).astype(np.float32)
    peak = int(rng.integers(150, 300))
    rewards[peak] = 1.0
    assert useful_part(shown._replace(rewards=rewards), LAYOUT).by == "goal"
    assert useful_part(shown._replace(rewards=rewards, success=1), LAYOUT) == (peak + 1 + TAIL, "reward")
    for same in (0.0, 1.0):
        constant = np.full(500, same, np.float32)
        assert useful_part(shown._replace(rewards=constant, success=1), LAYOUT).by == "goal"


def test_without_things_the_body_is_what_arrives(rng: np.random.Generator) -> None:
    shown = wandering(rng, 80, 400)
    seen = shown.observations.copy()
    seen[:, HAND] = np.where(np.arange(400)[:, None] < 120, seen[:, CUBE], seen[:, HAND])
    seen[:, CUBE] = 0
    steps, by = useful_part(shown._replace(observations=seen), LAYOUT)
    assert by == "goal"
    assert 70 <= steps - 1 - TAIL <= 80


@pytest.mark.parametrize("layout", [None, dataclasses.replace(LAYOUT, goal=None), "goal hidden"])
def test_without_a_goal_it_ends_when_nothing_moves_any_more(rng: np.random.Generator, layout: Any) -> None:
    rest = int(rng.integers(50, 200))
    seen = rng.normal(size=(300, 10)).cumsum(0).astype(np.float32)
    seen[:, GOAL] = 0
    seen[rest:] = seen[rest]
    shown = Recorded(seen, np.zeros((300, 4), np.float32))
    assert useful_part(shown, LAYOUT if layout == "goal hidden" else layout) == (rest + 1 + TAIL, "rest")
    moving = Recorded(seen[:rest], shown.actions[:rest])
    assert useful_part(moving, None) == (rest, "whole")
    still = Recorded(np.ones((300, 10), np.float32), shown.actions)
    assert useful_part(still, None) == (300, "whole")


@pytest.mark.parametrize("length", [1, 2, TAIL, TAIL + 1])
def test_short_demonstrations_stay_whole(rng: np.random.Generator, length: int) -> None:
    shown = wandering(rng, 10, 100)
    short = Recorded(shown.observations[:length], shown.actions[:length], np.arange(length, dtype=np.float32))
    for success, step in ((-1, -1), (0, -1), (1, -1), (1, 0)):
        assert useful_part(short._replace(success=success, success_step=step), LAYOUT) == (length, "whole")


def test_steps_are_taken_of_the_useful_part_alone(rng: np.random.Generator) -> None:
    shown = wandering(rng, 100, 500)
    rewards = rng.normal(size=500).astype(np.float32)
    known = shown._replace(rewards=rewards, success=1, success_step=60)
    end = 61 + TAIL
    cut = Recorded(known.observations[:end], known.actions[:end], rewards[:end], 1, 60)
    tokens, expected = (make_tokens([one], ENCODER, returns=True) for one in (known, cut))
    for name, part in vars(expected).items():
        assert np.array_equal(getattr(tokens, name), part), name
    assert tokens.times[0].tolist() == choose_steps(end, ENCODER).tolist()
    whole = make_tokens([known], dataclasses.replace(ENCODER, trim="none"))
    assert whole.times[0, -1] == 499
    assert make_tokens([shown], ENCODER, layout=LAYOUT).times[0, -1] < 121 < make_tokens([shown], ENCODER).times[0, -1]


def test_what_wanders_off_after_the_success_is_cut_there(rng: np.random.Generator) -> None:
    shown = wandering(rng, 100, 500)._replace(success=1, success_step=100)
    assert useful_part(shown, LAYOUT) == (101 + FEW, "success")
    assert useful_part(shown, None) == (101 + TAIL, "success")
    assert useful_part(shown, dataclasses.replace(LAYOUT, unit=1e-4)) == (101 + TAIL, "success")
    seen = shown.observations.copy()
    seen[101:, HAND] = seen[100, HAND] + rng.uniform(-0.05, 0.05, (399, 3))
    assert useful_part(shown._replace(observations=seen), LAYOUT) == (101 + TAIL, "success")
    for length, steps in ((101 + TAIL, 101 + TAIL), (105, 105), (102 + TAIL, 101 + FEW)):
        short = Recorded(shown.observations[:length], shown.actions[:length], None, 1, 100)
        assert useful_part(short, dataclasses.replace(LAYOUT, unit=1e3)).steps == steps


def test_by_default_demonstrations_are_read_whole() -> None:
    assert TrajectoryEncoderConfig().trim == "none"


@pytest.mark.parametrize("layout", [LAYOUT, None])
def test_long_standing_is_shortened_to_its_beginning_and_end(rng: np.random.Generator, layout: Any) -> None:
    seen, done = rng.uniform(-1, 1, (150, 10)), rng.uniform(-1, 1, (150, 4))
    shown = Recorded(seen.astype(np.float32), done.astype(np.float32))
    place, long, short = (int(n) for n in rng.integers([20, TAIL, 2], [100, 200, TAIL]))
    index = np.concatenate([np.arange(5), np.full(short, 5), np.arange(5, place), np.full(long, place)])
    index = np.concatenate([index, np.arange(place, 150)])
    waiting = Recorded(shown.observations[index], shown.actions[index], index.astype(np.float32))
    found = without_standing(waiting, layout)
    assert found.rewards is not None
    times = found.rewards.astype(int)
    assert (times == place).sum() == TAIL
    assert (times == 5).sum() == short + 1
    assert sorted(set(times)) == list(range(150))
    assert np.array_equal(found.observations, shown.observations[times])
    assert len(found.actions) == len(times)
    for whole in (shown, Recorded(shown.observations[:1], shown.actions[:1])):
        assert np.array_equal(without_standing(whole, layout).observations, whole.observations)


def test_training_reads_standing_and_acting_does_not(rng: np.random.Generator) -> None:
    shown = wandering(rng, 100, 100)
    index = np.concatenate([np.arange(50), np.full(200, 50), np.arange(50, 100)])
    waiting = Recorded(shown.observations[index], shown.actions[index])
    trained, acted = (make_tokens([waiting], ENCODER, layout=LAYOUT, standing=which) for which in (True, False))
    assert trained.times[0, -1] > 270
    assert acted.times[0, -1] < 130
    untrimmed = dataclasses.replace(ENCODER, trim="none")
    assert make_tokens([waiting], untrimmed, layout=LAYOUT, standing=False).times[0, -1] == 299
