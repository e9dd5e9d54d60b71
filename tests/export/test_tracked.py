"""An exported policy that hands over to the tracker, against `Policy.act`: the same decisions and the same actions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import SCENE, TRACKED, Acting, Library, RefusedError, demonstration, make_policy, prompt_of

from llmdpd.export.contents import Prompt
from llmdpd.export.cpp import export_cpp
from llmdpd.export.folder import description
from llmdpd.policy.policy import Policy
from llmdpd.tasks.layout import Point

Rng = np.random.Generator
Shown = tuple[np.ndarray, np.ndarray]
Export = Callable[[Policy, Prompt], Acting]
T, S, A = 30, 11, 5
HAND, BLOCK, TARGET, GRIPPER, MOVE, GRIP = [2, 0, 1], [3, 4, 5], [6, 7, 8], [9, 10], [0, 3, 1], 2
SPEED = 0.04  # units for an action of 1
TOLERANCE = 1e-5
CHUNKS = {"network": {"chunk": 4}, "acting": {"action_horizon": 3, "track_after": 0.5}}


def pushed(rng: Rng, length: int = T) -> Shown:
    """Observations [length, S] and actions [length, A]: the hand goes to the block and carries it to the target."""
    hand, block, goal = (rng.uniform(-0.4, 0.4, 3) for _ in range(3))
    half = length // 2
    share = np.linspace(0, 1, half)[:, None]
    seen = np.empty((2 * half, S))
    seen[:, HAND] = np.concatenate([hand + share * (block - hand), block + share * (goal - block)])
    seen[:, BLOCK] = np.concatenate([np.tile(block, (half, 1)), block + share * (goal - block)])
    seen[:, TARGET], seen[:, GRIPPER] = goal, np.repeat([[1.0, -0.3], [0.0, 0.2]], half, axis=0)
    actions = rng.uniform(-0.5, 0.5, (2 * half, A))
    actions[:-1, MOVE] = np.diff(seen[:, HAND], axis=0) / SPEED
    actions[:, GRIP] = np.repeat([-1.0, 1.0], half)
    return seen.astype(np.float32), actions.astype(np.float32).clip(-0.5, 0.7)


def after(state: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The next state [S]: actions move the hand, and the block along where it is held."""
    state = state.copy()
    held = np.linalg.norm(state[HAND] - state[BLOCK]) < 0.1
    state[HAND] += SPEED * action[MOVE].clip(-1, 1)
    if held:
        state[BLOCK] += SPEED * action[MOVE].clip(-1, 1)
    state[GRIPPER] = [0.5 - 0.5 * action[GRIP], 0.1]
    return state


@pytest.fixture
def export(library: Library, tmp_path: Path) -> Export:
    """Exports a policy under one prompt, by which both are to act with the same noise."""

    def written(policy: Policy, prompt: Prompt) -> Acting:
        export_cpp(policy, {"push": prompt}, tmp_path / "out")
        policy.prompt(*prompt)
        policy.seed(11)
        acting = library.policy(tmp_path / "out" / "policy.llmdpd", tmp_path / "out" / "prompts" / "push.llmdpd")
        acting.seed(11)
        return acting

    return written


def handing(after: float, **others: Any) -> Policy:
    return make_policy(**{"spaces": TRACKED, "acting": {"track_after": after}, **others})


def late(policy: Policy) -> list[bool]:
    """Which rows the tracker has."""
    takeover = policy._session._episodes._takeover  # type: ignore[union-attr]
    return [course.follower is not None for course in takeover._courses.values()]  # type: ignore[union-attr]


def act(policy: Policy, acting: Acting, states: np.ndarray, step: Any = None) -> np.ndarray:
    """Both act in these states; the same actions."""
    expected = policy.act(states, step=step)
    for row in () if step is None else range(len(states)):
        acting.set_step(row, step[row])
    found = acting.act(states)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    return expected


@pytest.mark.parametrize(("stands", "due"), [(True, 35), (True, 45), (False, 60)], ids=["still", "halfway", "long"])
def test_an_episode_is_handed_over_where_python_hands_it_over(stands: bool, due: int, export: Export, rng: Rng) -> None:
    policy = handing(2.0)
    acting = export(policy, Prompt(trajectory=pushed(rng, 90 if due == 45 else T)))
    state, taken = pushed(rng)[0][0], None
    for step in range(due + 70):
        if stands and step in (5, 9):  # by 2.5 cm, which counts as moving, and by 1.5, which does not
            state[HAND] += np.float32(0.05 if step == 5 else 0.03)
        action = act(policy, acting, state)
        if late(policy)[0]:
            taken = step if taken is None else taken
            state = after(state, action)
        elif not stands:
            state[HAND] = rng.uniform(-0.4, 0.4, 3)
    assert taken == due


def test_it_waits_half_as_long_again_as_the_longest_stand_of_a_demonstration(export: Export, rng: Rng) -> None:
    policy, shown, times = handing(9.0), pushed(rng), np.ones(T, int)
    times[T // 3] += 41
    acting = export(policy, Prompt(trajectory=[tuple(np.repeat(part, times, axis=0) for part in shown), pushed(rng)]))
    taken = []
    for _ in range(70):
        act(policy, acting, shown[0][0])
        taken.append(late(policy)[0])
    assert 61 <= taken.index(True) <= 64, "a step or two of its way may lie within 2 cm of where it stands"


def test_of_several_demonstrations_the_same_one_is_tracked(export: Export, rng: Rng) -> None:
    policy, shown = handing(0.6), [pushed(rng, length) for length in (40, 60, 48)]
    acting, tracked = export(policy, Prompt(trajectory=shown)), set()
    for step in range(38):  # by the longest of them it is known when it takes over
        act(policy, acting, rng.normal(0, 0.3, S).astype(np.float32))
        assert late(policy) == [step >= 36]
    for _ in range(30):
        seen = shown[rng.integers(3)][0]
        policy.reset()
        acting.reset()
        act(policy, acting, seen[:1])
        for step in range(100, 104):
            now = seen[[rng.integers(len(seen))]] + rng.normal(0, 0.1, (1, S)).astype(np.float32)
            act(policy, acting, now, [step])
        takeover = policy._session._episodes._takeover  # type: ignore[union-attr]
        follower = takeover._courses[0].follower  # type: ignore[union-attr]
        tracked.add([follower._track is track for track in takeover._tracks[0]].index(True))  # type: ignore[union-attr]
    assert len(tracked) > 1


def test_of_equally_like_moments_the_last_is_joined(export: Export, rng: Rng) -> None:
    seen, done = pushed(rng)
    seen[10:13] = seen[10]  # whose actions differ
    policy = handing(0.5)
    acting = export(policy, Prompt(trajectory=(seen, done)))
    act(policy, acting, seen[:1])
    act(policy, acting, seen[10:11], [100])


@pytest.mark.parametrize("others", [{}, CHUNKS], ids=["single actions", "chunks"])
def test_rows_are_handed_over_by_themselves(others: dict[str, Any], export: Export, rng: Rng) -> None:
    policy = handing(0.5, **others)
    acting = export(policy, Prompt(trajectory=pushed(rng)))
    count, changes = 5, set()
    states = np.stack([pushed(rng)[0][rng.integers(T)] for _ in range(count)])
    for call in range(80):
        step = None
        if call % 9 == 8:  # some go back, or on
            step = policy._session._timesteps[:count] + rng.integers(-3, 4, count)  # type: ignore[union-attr]
            step = step.clip(0)
        if call % 13 == 12:
            ended = int(rng.integers(count))
            policy.reset(ended)
            acting.reset(ended)
        actions = act(policy, acting, states, step)
        changes.add(tuple(late(policy)))
        states = np.stack([after(*pair) for pair in zip(states, actions, strict=True)])
        states += rng.normal(0, 0.01, states.shape).astype(np.float32) * (rng.random((count, 1)) < 0.5)
    assert len(changes) > 3


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_row_that_is_the_policys_again_goes_on_where_the_policy_was(chunk: int, export: Export, rng: Rng) -> None:
    policy = handing(5.0, network={"chunk": chunk}, features="raw")
    acting, state = export(policy, Prompt(trajectory=pushed(rng))), pushed(rng)[0][:1]
    for step in range(33):
        act(policy, acting, state + rng.normal(0, 0.002, (1, S)).astype(np.float32))
        assert late(policy) == [step >= 30]
    for step in (30, 31, 32):  # after what it saw at step 29, and by what is left of its chunk
        act(policy, acting, state + rng.normal(0, 0.2, (1, S)).astype(np.float32), [step])
        assert late(policy) == [False]


def test_a_plane_of_another_unit_is_tracked(export: Export, rng: Rng) -> None:
    points = tuple(Point(name, at) for name, at in (("tip", (1, 0)), ("cube", (2, 3)), ("hole", (4, 5))))
    layout = type(SCENE)(points, goal="hole", move=(1, 0), unit=0.01)
    policy = handing(0.3, spaces={"state_dim": 6, "action_dim": 2, "layout": layout}, features="raw")
    acting = export(policy, Prompt(trajectory=demonstration(rng, policy)))
    for state in rng.normal(0, 0.3, (45, 6)).astype(np.float32):
        act(policy, acting, state)
    assert late(policy) == [True]


@pytest.mark.parametrize("absent", [BLOCK, TARGET, [*BLOCK, *TARGET]], ids=["object", "goal", "both"])
@pytest.mark.parametrize("shown", [True, False])
def test_what_is_absent_is_no_place_here_too(absent: list[int], shown: bool, export: Export, rng: Rng) -> None:
    policy, (seen, done), states = handing(0.5), pushed(rng), pushed(rng)[0]
    if not shown:
        seen[:, absent] = 0
    states[:, absent] = 0
    acting = export(policy, Prompt(trajectory=(seen, done)))
    act(policy, acting, states[:1])
    for step, state in enumerate(states, start=100):
        act(policy, acting, state[None], [step])
    assert late(policy) == [True]


def test_a_demonstration_without_a_way_is_not_tracked_here_either(export: Export, rng: Rng) -> None:
    policy, still = handing(0.5), np.repeat(pushed(rng)[0][:1], 40, axis=0)
    acting = export(policy, Prompt(trajectory=(still, np.zeros((40, A), np.float32))))
    act(policy, acting, still[:1])
    for step in range(1000, 1005):
        act(policy, acting, pushed(rng)[0][:1], [step])
    assert late(policy) == [False]


def test_without_a_demonstration_the_policy_acts_alone(export: Export, rng: Rng) -> None:
    policy = handing(0.1)
    acting = export(policy, prompt_of(rng, policy)._replace(trajectory=None))
    for _ in range(40):
        act(policy, acting, rng.normal(0, 0.3, S).astype(np.float32))


def test_a_call_that_fails_changes_nothing(export: Export, rng: Rng) -> None:
    policy, (seen, done) = handing(0.5, features="raw"), pushed(rng)
    acting = export(policy, Prompt(trajectory=(seen, done)))
    act(policy, acting, seen[:2])
    states = seen[[3, 4]]
    for step in (40, 41):
        act(policy, acting, states, [step, 1])
    wrong = states.copy()
    wrong[1] = 3e38  # the first row is the tracker's
    acting.set_step(1, 1)
    with pytest.raises(RefusedError, match="in the action") as refused:
        acting.act(wrong)
    assert refused.value.code == 6
    for step in range(42, 60):
        act(policy, acting, states, [step, step - 40])


def test_what_keeps_no_state_acts_by_the_network_alone_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    policy = handing(0.5)
    with caplog.at_level(logging.WARNING):
        assert description(policy, "cpp", ["push"])["acting"]["track_after"] == 0.5
        assert not caplog.records
        assert description(policy, "onnx", ["push"])["acting"]["track_after"] == 0
    assert "track_after 0.5" in caplog.text
