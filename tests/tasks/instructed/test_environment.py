"""Who judges an instruction, and the experts that follow it, in the real simulator."""

from __future__ import annotations

import numpy as np
import pytest

from llmdpd.tasks.demonstrators import Demonstrators, ScriptedEpisode, ScriptedRequest
from llmdpd.tasks.instructed.environment import NEAR, STILL, WAIT_STEPS, InstructedTask, WaitJudge
from llmdpd.tasks.metaworld.environment import make_task
from llmdpd.tasks.metaworld.layout import HAND, OBJECT, STATE_DIM
from llmdpd.tasks.metaworld.scripted import ScriptedExpert
from llmdpd.tasks.specs import make_environment

STEPS = 150


def at(hand: tuple[float, float, float], thing: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    observation = np.zeros(STATE_DIM, np.float32)
    observation[HAND], observation[OBJECT] = hand, thing
    return observation


def judged(observations: list[np.ndarray], finished: tuple[int, ...] = ()) -> int:
    """The first step, from 0, at which the judge is content; -1: none."""
    judge = WaitJudge(observations[0])
    said = [judge.step(observation, step in finished) for step, observation in enumerate(observations[1:])]
    return said.index(True) if True in said else -1


def test_the_hand_has_to_wait_near_the_object_for_thirty_steps() -> None:
    assert judged([at((0, 0, 0.1))] * (WAIT_STEPS + 1)) == WAIT_STEPS - 1
    assert judged([at((0, 0, 0.1))] * WAIT_STEPS) == -1
    assert judged([at((0, 0, NEAR + 0.01))] * 100) == -1
    slow = [at((0, 0, 0.1 - 0.9 * STILL * step)) for step in range(40)]
    fast = [at((0, 0, 0.1 - 1.1 * STILL * step)) for step in range(40)]
    assert (judged(slow), judged(fast)) == (WAIT_STEPS - 1, -1)
    # A step that is none of waiting begins the thirty anew.
    late = [*[at((0, 0, 0.1))] * 20, *[at((0, 0, 0.09))] * (WAIT_STEPS + 1)]
    assert judged(late) == 19 + WAIT_STEPS


def test_who_moved_the_object_or_finished_the_task_has_not_waited() -> None:
    still = [at((0, 0, 0.1))] * 100
    for moved, content in ((0.015, True), (0.025, False)):
        pushed = [still[0], *[at((0, 0, 0.1), (moved, 0, 0))] * 99]
        assert (judged(pushed) >= 0) is content
    assert judged(still, finished=(5,)) == -1, "once up, the flag is not forgotten"
    assert judged(still, finished=(60,)) == WAIT_STEPS - 1, "what was waited before counts"


@pytest.fixture(scope="module")
def demonstrators() -> Demonstrators:
    return Demonstrators(goal_visible=True)


def shown(demonstrators: Demonstrators, task: str, seed: int, behaviour: str = "clean") -> ScriptedEpisode:
    return demonstrators.episode(ScriptedRequest(task, seed, seed + 1, behaviour, STEPS, 10))


@pytest.mark.parametrize("seed", range(3))
def test_the_waiting_expert_stops_at_the_object_and_leaves_it(demonstrators: Demonstrators, seed: int) -> None:
    episode = shown(demonstrators, "wait-push", seed)
    assert episode.success
    last = episode.observations[episode.success_step - WAIT_STEPS + 1 : episode.success_step + 2]
    assert (np.linalg.norm(last[:, HAND] - last[:, OBJECT], axis=1) < NEAR).all()
    assert (np.linalg.norm(np.diff(last[:, HAND], axis=0), axis=1) < STILL).all()
    assert np.abs(episode.observations[:, OBJECT] - episode.observations[0, OBJECT]).max() < 0.02
    np.testing.assert_array_equal(episode.rewards > 0, np.arange(len(episode.rewards)) >= episode.success_step)
    assert (episode.actions[episode.success_step :, 3] == -1).all(), "the gripper is open"


def test_the_finishing_expert_and_its_success_are_metaworlds(demonstrators: Demonstrators) -> None:
    own = ScriptedExpert("push", goal_visible=True).episode(ScriptedRequest("push-v3", 1, 2, "gaussian", STEPS, 10))
    episode = shown(demonstrators, "finish-push", 1, "gaussian")
    assert episode.success_step == own.success_step
    for name in ("observations", "actions", "expert_actions", "rewards"):
        np.testing.assert_array_equal(getattr(episode, name), getattr(own, name))


def test_what_one_instruction_asks_for_is_no_success_of_the_other(demonstrators: Demonstrators) -> None:
    for followed, other in (("finish", "wait"), ("wait", "finish")):
        actions = shown(demonstrators, f"{followed}-push", 1).actions
        environment = InstructedTask(f"{other}-push")
        environment.reset(1)
        assert not any(environment.step(action)[2] for action in actions)


def test_an_expert_begins_each_episode_anew(demonstrators: Demonstrators) -> None:
    first = shown(demonstrators, "wait-push", 4)
    shown(demonstrators, "wait-push", 5)
    np.testing.assert_array_equal(shown(demonstrators, "wait-push", 4).actions, first.actions)


@pytest.mark.parametrize("visible", [True, False])
def test_both_start_as_metaworlds_task(visible: bool, fresh_seed: int) -> None:
    starts = [make_environment(f"{each}-push", visible, False).reset(fresh_seed) for each in ("finish", "wait")]
    for start in starts:
        np.testing.assert_array_equal(start, make_task("push", goal_visible=visible).reset(fresh_seed))
