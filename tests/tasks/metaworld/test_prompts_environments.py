"""What the Meta-World prompts say, against the real environments: resets, observations, and the success test."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import pytest

from llmdpd.tasks.metaworld.prompts import SuccessCondition, TaskMetadata, all_task_metadata, task_metadata

# The experts' gains exceed the action bound by design.
pytestmark = pytest.mark.filterwarnings("ignore:Constant:UserWarning")

metaworld_envs = pytest.importorskip("metaworld.env_dict").ALL_V3_ENVIRONMENTS
reward_utils = pytest.importorskip("metaworld.utils.reward_utils")
experts = pytest.importorskip("metaworld.policies").ENV_POLICY_MAP

RESETS = 12
# Drawn less widely than this counts as not drawn: many heights are, within 1 mm, and push's within 1 cm, unused.
NEGLIGIBLE = 0.011
NO_ACTION = np.zeros(4, dtype=np.float32)


@dataclass
class Task:
    name: str
    facts: TaskMetadata
    env: Any
    seed: int

    def success(self, obs: np.ndarray) -> bool:
        return bool(self.env.evaluate_state(obs, NO_ACTION)[1]["success"])


@pytest.fixture(scope="module", params=sorted(all_task_metadata()))
def task(request: pytest.FixtureRequest, seed_of: Callable[[str], int]) -> Iterator[Task]:
    env = metaworld_envs[f"{request.param}-v3"]()
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)  # cached with the goal hidden
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    seed = seed_of(f"{request.node.nodeid} {request.param}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the environments' rewards take logarithms of anything
        yield Task(request.param, task_metadata(request.param), env, seed)
    env.close()


def measure(task: Task, obs: np.ndarray, condition: SuccessCondition) -> float:
    """The quantity that a condition compares with its limit."""
    if condition.kind in ("joint_above", "joint_near"):
        position = float(task.env.data.joint(condition.point.removeprefix("joint:")).qpos.item())
        return position if condition.kind == "joint_above" else abs(position - condition.at)
    if condition.kind == "held":
        return float(obs[6] - task.env.stick_init_pos[2])
    goal = np.array(task.env._target_pos)
    if condition.kind in ("above", "below"):
        return float(point(task, obs, condition)[2] - goal[2])
    assert condition.kind == "near"
    if condition.goal_height is not None:
        goal[2] = condition.goal_height
    delta = (point(task, obs, condition) + condition.offset - goal) * condition.weights
    return float(np.linalg.norm(delta[["xyz".index(axis) for axis in condition.axes]]))


def point(task: Task, obs: np.ndarray, condition: SuccessCondition) -> np.ndarray:
    if condition.point == "object":
        return obs[4:7]
    if condition.point == "second":
        return obs[11:14]
    if condition.point == "gripper":
        return np.array(task.env.tcp_center)
    return np.array(task.env.data.site(condition.point.removeprefix("site:")).xpos)


def holds(task: Task, obs: np.ndarray, condition: SuccessCondition) -> bool:
    if condition.kind == "inserted":
        delta = point(task, obs, condition) - obs[11:14]
        return bool(delta[0] >= 0 and abs(delta[1]) <= condition.box[0] and abs(delta[2]) <= condition.box[1])
    value = measure(task, obs, condition)
    if condition.kind == "held":
        return bool(task.env.touching_main_object) and value > condition.limit
    return {
        "near": value <= condition.limit,
        "joint_near": value <= condition.limit,
        "joint_above": value > condition.limit,
        "above": value > 0,
        "below": value < 0,
    }[condition.kind]


def reset(task: Task, seed: int) -> np.ndarray:
    task.env.seed(seed)
    task.env.reset()
    # The first observation of several tasks still shows the object where it stood before the reset.
    return task.env.step(NO_ACTION)[0]


def test_resets_draw_what_the_prompt_says(task: Task) -> None:
    space = task.env._random_reset_space
    width = space.high - space.low
    expected = [task.facts.object_range.get(axis, 0.0) for axis in "xyz"]
    # A second half of the draw that moves no goal only keeps disassemble's peg away from where it would have been.
    if len(width) == 6 and task.name != "disassemble":
        expected += [task.facts.goal_range.get(axis, 0.0) for axis in "xyz"]
    assert np.where(width > NEGLIGIBLE, width, 0.0)[: len(expected)] == pytest.approx(expected, abs=1e-6)
    assert (task.facts.goal == "sampled") == bool(task.facts.goal_range)


def test_observations_show_what_the_prompt_says(task: Task) -> None:
    observations, goals, draws = [], [], []
    for index in range(RESETS):
        observations.append(reset(task, task.seed + index))
        goals.append(np.array(task.env._target_pos))
        draws.append(task.env._last_rand_vec[:3].copy())
        if claim := re.search(r"start at least (\d+) cm|starts at least (\d+) cm", task.facts.constraints):
            drawn = task.env._last_rand_vec
            other = goals[-1] if task.facts.goal == "fixed" else drawn[3:]
            assert 100 * np.linalg.norm(drawn[:2] - other[:2]) >= int(claim.group(1) or claim.group(2))
    obs, goal, draw = np.array(observations), np.array(goals), np.array(draws)
    assert obs[:, 36:39] == pytest.approx(goal, abs=1e-9)
    for axis, name in enumerate("xyz"):
        moved = np.ptp(obs[:, 4 + axis])
        # Twelve uniform draws span less than a tenth of their range once in 10^10 times.
        if name in task.facts.object_range:
            assert moved > 0.1 * task.facts.object_range[name]
        else:
            # A thing that falls into place comes to rest up to 3 cm higher or lower, as it fell.
            assert moved < (0.03 if name == "z" else 0.02)
        check_goal(task.facts, axis, goal, draw)
    assert np.any(obs[:, 7:11] != 0) == task.facts.orientation
    assert np.any(obs[:, 11:14] != 0) == bool(task.facts.second)


def check_goal(facts: TaskMetadata, axis: int, goal: np.ndarray, draw: np.ndarray) -> None:
    name = "xyz"[axis]
    if facts.goal == "sampled" and name in facts.goal_range:
        assert np.ptp(goal[:, axis]) > 0.1 * facts.goal_range[name]
    elif facts.goal == "follows" or (facts.goal == "follows_y" and name == "y"):
        assert np.ptp(goal[:, axis] - draw[:, axis]) < 0.001
    else:
        assert np.ptp(goal[:, axis]) < 0.005


def test_actions_do_what_the_prompt_says(task: Task) -> None:
    reset(task, task.seed)
    for axis, name in enumerate("xyz"):
        before = task.env.data.mocap_pos[0].copy()
        # Away from the workspace's nearer bound, so that the motion is not cut short.
        middle = (task.env.mocap_low + task.env.mocap_high) / 2
        sign = 1.0 if before[axis] < middle[axis] else -1.0
        task.env.step(sign * np.eye(4, dtype=np.float32)[axis])
        moved = task.env.data.mocap_pos[0] - before
        assert moved == pytest.approx(sign * 0.01 * np.eye(3)[axis], abs=1e-9), name
    opening = [reset(task, task.seed)[3]]
    for effort in (1.0, -1.0):
        for _ in range(15):
            obs = task.env.step(np.array([0, 0, 0, effort], dtype=np.float32))[0]
        opening.append(obs[3])
    assert opening[1] < opening[0] - 0.2
    assert opening[2] > opening[1] + 0.2


def expert_success(task: Task) -> np.ndarray:
    """Drive the scripted expert to its first success, comparing every step's flag with the prompt's conditions."""
    for attempt in range(6):
        expert = experts[f"{task.name}-v3"]()
        obs = reset(task, task.seed + 1000 + attempt)
        for _ in range(499):
            obs, _, _, _, info = task.env.step(np.clip(expert.get_action(obs), -1, 1))
            told = all(holds(task, obs, condition) for condition in task.facts.conditions)
            values = [c.kind if c.kind == "inserted" else measure(task, obs, c) for c in task.facts.conditions]
            assert told == bool(info["success"]), f"seed {task.seed + 1000 + attempt}: {values}"
            if told:
                return obs
    raise AssertionError(f"the expert never succeeded, seeds from {task.seed + 1000}")


def test_success_is_what_the_prompt_says(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    obs = expert_success(task)
    # The rewards, which are computed along with success, refuse goals that no reset draws.
    tolerance = reward_utils.tolerance
    monkeypatch.setattr(
        reward_utils, "tolerance", lambda x, margin=0.0, **more: tolerance(x, margin=abs(margin), **more)
    )
    assert task.success(obs)
    kinds = {condition.kind: condition for condition in task.facts.conditions}
    if kinds.keys() & {"near", "above", "below"}:
        check_goal_limits(task, obs, kinds)
    for kind, condition in kinds.items():
        if kind in ("joint_above", "joint_near"):
            check_joint_limit(task, obs, condition)
        if kind == "held":
            check_held(task, obs, condition)
        if kind == "inserted":
            check_inserted(task, obs, condition)


def crossing(succeeds: Callable[[float], bool], far: float = 0.5) -> float | None:
    """The place in [0, far] where success ends, found by bisection; None if it doesn't."""
    if succeeds(far):
        return None
    low, high = 0.0, far
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if succeeds(middle) else (low, middle)
    return (low + high) / 2


def check_goal_limits(task: Task, obs: np.ndarray, kinds: dict[str, SuccessCondition]) -> None:
    """Move the goal away along every axis: success must end where the prompt's measure reaches its limit, or never."""
    start = np.array(task.env._target_pos)
    near = kinds.get("near")
    for axis, name in enumerate("xyz"):
        for sign in (1.0, -1.0):

            def succeeds(shift: float, axis: int = axis, sign: float = sign) -> bool:
                task.env._target_pos = start + sign * shift * np.eye(3)[axis]
                return task.success(obs)

            end = crossing(succeeds)
            message = f"goal moved along {'+' if sign > 0 else '-'}{name}"
            if near is not None and name in near.axes and not (name == "z" and near.goal_height is not None):
                assert end is not None, message
                assert measure(task, obs, near) == pytest.approx(near.limit, abs=1e-6), message
            elif name == "z" and (sign > 0 if "above" in kinds else "below" in kinds and sign < 0):
                assert end is not None, message
                assert measure(task, obs, kinds["above" if sign > 0 else "below"]) == pytest.approx(0, abs=1e-6)
            else:
                assert end is None, message
    task.env._target_pos = start
    assert task.success(obs)


def check_joint_limit(task: Task, obs: np.ndarray, condition: SuccessCondition) -> None:
    joint = task.env.data.joint(condition.point.removeprefix("joint:"))
    start = joint.qpos.copy()
    towards = -np.sign(start)  # back to where the joint started, at 0

    def succeeds(shift: float) -> bool:
        joint.qpos[:] = start + towards * shift
        mujoco.mj_forward(task.env.model, task.env.data)
        return task.success(obs)

    assert crossing(succeeds, far=abs(start.item())) is not None
    assert measure(task, obs, condition) == pytest.approx(condition.limit, abs=1e-6)


def check_held(task: Task, obs: np.ndarray, condition: SuccessCondition) -> None:
    start = task.env.stick_init_pos.copy()

    def succeeds(shift: float) -> bool:
        task.env.stick_init_pos = start + shift * np.eye(3)[2]
        return task.success(obs)

    assert crossing(succeeds) is not None
    assert measure(task, obs, condition) == pytest.approx(condition.limit, abs=1e-6)
    task.env.stick_init_pos = start
    assert task.success(obs)
    task.env.data.efc_force[:] = 0.0  # no finger presses on the stick any more
    assert not task.success(obs)


def check_inserted(task: Task, obs: np.ndarray, condition: SuccessCondition) -> None:
    site = task.env.data.site(condition.point.removeprefix("site:"))
    start = site.xpos.copy()
    # Along x the stick's end must be past the handle; farther is no fault.
    for axis, sign, limit in ((0, -1, 0.0), (1, 1, condition.box[0]), (1, -1, condition.box[0]),
                              (2, 1, condition.box[1]), (2, -1, condition.box[1])):  # fmt: skip

        def succeeds(shift: float, axis: int = axis, sign: int = sign) -> bool:
            site.xpos[:] = start + sign * shift * np.eye(3)[axis]
            return task.success(obs)

        assert crossing(succeeds) is not None
        assert abs(site.xpos[axis] - obs[11 + axis]) == pytest.approx(limit, abs=1e-6)
    site.xpos[:] = start + 0.5 * np.eye(3)[0]
    assert task.success(obs)
    site.xpos[:] = start
