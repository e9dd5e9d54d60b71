"""Handing over to the tracker: when it acts, what it does there, and that the policy is what it was until then."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.policy import Policy
from llmdpd.policy.takeover import Takeover
from llmdpd.policy.tracker import Follower, Scene, Track, nearest
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.layout import Layout, Point

S, A, D, T = 12, 4, 10, 60
STILL = 30
BODY, OBJECT, GOAL, GRIPPER = slice(0, 3), slice(3, 6), slice(6, 9), 9
LAYOUT = Layout(
    points=(Point("hand", (0, 1, 2)), Point("block", (3, 4, 5)), Point("target", (6, 7, 8))),
    goal="target",
    gripper=(9,),
    move=(0, 1, 2),
    grip=(3,),
    up=2,
)
PLACES = (-0.2, 0.0, 0.2), (0.1, 0.2, 0.05), (0.1, -0.2, 0.25)  # of hand, block and target, about
SPEED = 0.02  # metres for an action of 1

Shown = tuple[np.ndarray, np.ndarray]
MakePolicy = Callable[..., Policy]


def demonstration(rng: np.random.Generator) -> Shown:
    """Observations [T, S] and actions [T, A]: the hand goes to the block, closes, and carries it to the target."""
    hand, block, goal = (np.array(place) + rng.uniform(-0.05, 0.05, 3) for place in PLACES)
    share, half = np.linspace(0, 1, T // 2)[:, None], T // 2
    seen = rng.normal(size=(T, S))
    seen[:, BODY] = np.concatenate([hand + share * (block - hand), block + share * (goal - block)])
    seen[:, OBJECT] = np.concatenate([np.tile(block, (half, 1)), block + share * (goal - block)])
    seen[:, GOAL], seen[:, GRIPPER] = goal, np.repeat([1.0, 0.0], half)
    actions = np.zeros((T, A))
    actions[:-1, :3] = np.diff(seen[:, BODY], axis=0) / SPEED
    actions[:, 3] = np.repeat([-1.0, 1.0], half)
    return seen.astype(np.float32), actions.astype(np.float32).clip(-1, 1)


@pytest.fixture
def scene() -> Scene:
    return Scene(LAYOUT, -np.ones(A, np.float32), np.ones(A, np.float32), "test", "none")


@pytest.fixture
def make_policy() -> MakePolicy:
    """An untrained policy that hands over after `after` lengths; `context`: fields of its configuration."""

    def make(
        after: float = 1.5, layout: Layout | None = LAYOUT, chunk: int = 1, reach: float = 1.0, **context: Any
    ) -> Policy:
        encoder = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8)
        sizes = {"text_dim": 5, "text_hidden": 16, "trajectory_dim": 4, "encoder": encoder}
        reads = ContextConfig(**{"text_dropout": 0.1, "trajectory_dropout": 0.1, **sizes, **context})
        config = DiffusionNetworkConfig(hidden_dim=24, time_dim=8, chunk=chunk, context=reads)
        spaces = Spaces(S, A, D, layout, (-reach,) * A, (reach,) * A)
        network = DiffusionPolicy(spaces, config)
        network.context.features.fit(torch.randn(50, S))
        return Policy("llmdpd", network, None, BestOfN(samples=1, track_after=after))

    return make


def test_until_then_the_policy_acts_and_from_then_on_the_tracker(
    rng: np.random.Generator, make_policy: MakePolicy, scene: Scene
) -> None:
    shown = demonstration(rng)
    handing = make_policy(0.5)
    alone = handing.with_acting(track_after=0.0)
    for policy in (handing, alone):
        policy.prompt(trajectory=shown)
    states = demonstration(rng)[0]
    follower = nearest([Track.of(*shown, scene)], scene, states[0], states[T // 2])
    for step, state in enumerate(states):
        own, others = alone.act(state), handing.act(state)
        assert handing.tracked.tolist() == [step >= T // 2]
        if step < T // 2:
            np.testing.assert_array_equal(others, own)
        else:
            np.testing.assert_array_equal(others, follower.act(state))
    handing.reset()
    alone.reset()
    handing.seed(3)
    alone.seed(3)
    np.testing.assert_array_equal(handing.act(states[0]), alone.act(states[0]), err_msg="a new episode is the policy's")


def test_rows_are_handed_over_by_themselves(rng: np.random.Generator, make_policy: MakePolicy) -> None:
    policy, states = make_policy(0.5), demonstration(rng)[0][:3]
    long = tuple(np.concatenate([part] * 2) for part in demonstration(rng))
    shown: list[Any] = [long, demonstration(rng)]
    prompts, of = policy.network.encode(torch.randn(2, D), policy._tokens(shown)), np.array([0, 1, 1])
    handing, alone = policy.episodes(prompts, of, shown=shown), policy.episodes(prompts, of)

    def late(*steps: int) -> list[bool]:
        given = np.arange(3), np.array(steps), states, None, lambda due: due * 7
        ours, own = handing.act(*given), alone.act(*given)
        return [not np.array_equal(*pair) for pair in zip(ours, own, strict=True)]

    assert late(0, STILL, 3) == [False, True, False]
    assert late(1, 1, STILL) == [False, False, True], "a time step that is set back is the policy's"
    assert late(T - 1, STILL - 1, STILL) == [False, False, True]
    assert late(T, STILL, T) == [True, True, True], "each by its own prompt's length"
    assert [handing.taken_over(episode) for episode in range(4)] == [True, True, True, False]
    handing.forget(np.array([2]))
    assert not handing.taken_over(2)
    handing.reset()
    assert not any(handing.taken_over(episode) for episode in range(3))


def test_each_row_is_tracked_by_its_own_prompt(rng: np.random.Generator, make_policy: MakePolicy, scene: Scene) -> None:
    policy, shown, states = make_policy(1.0), [demonstration(rng) for _ in range(3)], demonstration(rng)[0][:3]
    prompts, of = policy.network.encode(torch.randn(3, D), policy._tokens(shown)), np.array([2, 0, 1])
    given: list[Any] = [shown[0], None, shown[2]]
    episodes = policy.episodes(prompts, of, shown=given)
    late = np.arange(3), np.full(3, 2 * T), states, None, lambda due: due
    found, own = episodes.act(*late), policy.episodes(prompts, of).act(*late)
    for row, prompt in ((0, 2), (1, 0)):
        follower = nearest([Track.of(*shown[prompt], scene)], scene, states[row], states[row])
        np.testing.assert_array_equal(found[row], follower.act(states[row]))
    np.testing.assert_array_equal(found[2], own[2], err_msg="its prompt has no demonstration")
    with pytest.raises(InputError, match="number of demonstrations"):
        policy.episodes(prompts, of, shown=shown[:2])


@pytest.mark.parametrize(
    ("moves", "taken"),
    [
        (lambda step: 0.0, 30),  # still from the first step on, which half a length allows
        (lambda step: 0.019 * (step % 2), 30),  # it trembles
        (lambda step: 0.03 * min(step, 25), 55),  # since step 25
        (lambda step: 0.03 * (step // 29), 3 * T),  # by 3 cm in every 29 steps: at the latest
        (lambda step: 0.001 * step, 3 * T),  # slowly: within 2 cm of where it last was for 20 steps
    ],
    ids=["still", "trembles", "comes to rest", "rests in between", "creeps"],
)
def test_what_stands_still_for_thirty_steps_is_taken_over(
    rng: np.random.Generator, scene: Scene, moves: Callable[[int], float], taken: int
) -> None:
    takeover = Takeover([[Track.of(*demonstration(rng), scene)]], scene, 3.0, None)
    state = demonstration(rng)[0][:1]
    late = []
    for step in range(3 * T + 2):
        now = state.copy()
        now[0, 1] += moves(step)
        late += takeover.late(np.array([4]), np.array([step]), now)
        if late[-1]:
            takeover.act(np.array([4]), now)
    assert late == [step >= taken for step in range(3 * T + 2)], "and from then on"


@pytest.mark.parametrize(("stands", "waits"), [(5, 30), (20, 30), (21, 31), (60, 90)])
def test_it_waits_half_as_long_again_as_the_demonstration_does(
    rng: np.random.Generator, scene: Scene, stands: int, waits: int
) -> None:
    seen, done = demonstration(rng)
    seen[:, BODY], done[:, :3] = 0.03 * np.arange(T)[:, None], 1.0
    times = np.ones(T, int)
    times[T // 3] += stands
    others = [Track.of(*demonstration(rng), scene) for _ in range(2)]
    standing = Track.of(np.repeat(seen, times, axis=0), np.repeat(done, times, axis=0), scene)
    takeover = Takeover([[standing, others[0]], [others[1]]], scene, 30.0, np.array([0, 1]))
    late = np.stack([takeover.late(np.arange(2), np.full(2, step), seen[:2]) for step in range(2 * T + 2 * stands)])
    first = late.argmax(0).tolist()
    assert first == [max(waits, (T + stands + 1) // 2), STILL], "each by its own prompt's demonstrations"


def test_standing_still_counts_from_half_a_length_on(rng: np.random.Generator, scene: Scene) -> None:
    seen, done = (np.concatenate([part] * 3) for part in demonstration(rng))
    takeover = Takeover([[Track.of(seen, done, scene)]], scene, 3.0, None)
    late = [bool(takeover.late(np.array([0]), np.array([step]), seen[:1])[0]) for step in range(3 * T)]
    assert late == [step >= 3 * T / 2 for step in range(3 * T)]
    takeover.forget(0)
    assert not takeover.late(np.array([0]), np.array([3 * T - 1]), seen[:1])[0], (
        "of one that begins anew nothing is known"
    )
    again = [bool(takeover.late(np.array([0]), np.array([3 * T - 1]), seen[:1])[0]) for _ in range(40)]
    assert not any(again), "a step that is looked at again is the same step"


def test_an_episode_that_begins_at_another_step_than_0_has_its_own_start(
    rng: np.random.Generator, scene: Scene
) -> None:
    shown = demonstration(rng)
    takeover = Takeover([[Track.of(*shown, scene)]], scene, 1.0, None)
    for first, moved in ((0, 0.0), (1, 0.4)):
        states = shown[0].copy()
        for part in (BODY, OBJECT, GOAL):
            states[:, part] += moved
        for step in range(first, T + 2):
            now = states[[min(step, T - 1)]]
            if takeover.late(np.array([0]), np.array([step]), now)[0]:
                action = takeover.act(np.array([0]), now)[0]
                assert np.abs(action[:3]).max() < 0.1, "it is where the demonstration ended"


@pytest.mark.parametrize("opening", [0.0, 0.5, 1.0])
def test_a_gripper_that_the_demonstration_hardly_moves_does_not_decide(
    rng: np.random.Generator, scene: Scene, opening: float
) -> None:
    seen, done = demonstration(rng)
    for range_of in (0.0, 0.003):
        seen[:, GRIPPER] = 0.9 + range_of * rng.uniform(0, 1, T)
        now = seen.copy()
        now[:, GRIPPER] = opening
        follower = Follower(Track.of(seen, done, scene), scene, now[0])
        for moment in (3, T // 2, T - 9):
            follower.join(now[moment])
            assert abs(follower._step - moment) <= 1


@pytest.mark.parametrize("absent", [OBJECT, GOAL, slice(3, 9)], ids=["object", "goal", "both"])
def test_what_is_absent_is_no_place(rng: np.random.Generator, scene: Scene, absent: slice) -> None:
    seen, done = demonstration(rng)
    seen[:, absent] = 0
    moved, shift = seen.copy(), np.float32(0 if absent.stop - absent.start == 6 else 0.3)
    for part in (BODY, OBJECT, GOAL):
        moved[:, part] += shift
    moved[:, absent] = 0
    follower = Follower(Track.of(seen, done, scene), scene, moved[0])
    for moment in (5, 20, T - 5):
        follower.join(moved[moment])
        assert abs(follower._step - moment) <= 1
    last = moved[-1].copy()
    follower.join(last)
    assert np.abs(follower.act(last)[:3]).max() < 0.1, "it is where the demonstration ended"


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_demonstration_that_shows_no_way_is_not_tracked(
    rng: np.random.Generator, make_policy: MakePolicy, length: int
) -> None:
    seen, done = (part[:length] for part in demonstration(rng))
    still = np.repeat(seen[:1], 40, axis=0), np.zeros((40, A), np.float32)
    for shown in ((seen, done), still):
        handing = make_policy(1.0).prompt(trajectory=shown)
        alone = handing.with_acting(track_after=0.0).prompt(trajectory=shown)
        state = demonstration(rng)[0][0]
        for _ in range(STILL):
            np.testing.assert_array_equal(handing.act(state), alone.act(state))
    if length == 1:
        np.testing.assert_array_equal(handing.act(state, step=10_000), alone.act(state, step=10_000))


def test_actions_are_the_environments_own(rng: np.random.Generator, make_policy: MakePolicy) -> None:
    (seen, done), start = demonstration(rng), demonstration(rng)[0][0]
    found = []
    for reach in (1.0, 5.0):
        policy = make_policy(1.0, reach=reach).prompt(trajectory=(seen, done * np.float32(reach)))
        policy.act(start)
        found.append(policy.act(start, step=2 * T) / reach)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("moment", [0, 7, T // 2 - 1, T // 2, T - 2, T - 1])
def test_it_joins_at_the_moment_that_is_like_now_in_a_scene_that_is_moved(
    rng: np.random.Generator, scene: Scene, moment: int
) -> None:
    seen, done = demonstration(rng)
    moved = seen.copy()
    for part in (BODY, OBJECT, GOAL):
        moved[:, part] += (0.3, -0.2, 0.1)
    follower = Follower(Track.of(seen, done, scene), scene, moved[0])
    unlike = follower.join(moved[moment])
    step = follower._step
    assert abs(step - moment) <= 1, "where the body was, or is after the step"
    assert unlike < 1


def test_of_several_demonstrations_the_one_that_is_like_now_is_tracked(
    rng: np.random.Generator, make_policy: MakePolicy, scene: Scene
) -> None:
    shown = [demonstration(rng) for _ in range(3)]
    tracks = [Track.of(*one, scene) for one in shown]
    for own, (seen, _) in zip(tracks, shown, strict=True):
        assert nearest(tracks, scene, seen[0], seen[T // 2 + 3])._track is own
    policy = make_policy(1.0, kind="retrieval").prompt(trajectory=shown)
    now = shown[1][0][T // 2 + 3]
    policy.act(shown[1][0][0])
    expected = nearest(tracks, scene, shown[1][0][0], now).act(now)
    np.testing.assert_array_equal(policy.act(now, step=T), expected)


def test_the_tracker_finishes_what_stands_before_the_goal_at_another_height(
    rng: np.random.Generator, make_policy: MakePolicy
) -> None:
    """A block that is held, 10 cm above its target: the tracker, from the nearest moment on, brings it there."""
    policy = make_policy(1.0).prompt(trajectory=demonstration(rng))
    state = demonstration(rng)[0][-1].copy()
    state[BODY] = state[OBJECT] = state[GOAL] + np.array([0, 0, 0.1], np.float32)
    for step in range(T, 4 * T):
        action = policy.act(state, step=step)
        state[BODY] += SPEED * action[:3]
        state[OBJECT] = state[BODY]
        assert action[3] == 1, "closed"
    assert np.linalg.norm(state[OBJECT] - state[GOAL]) < 0.03


def test_chunks_end_where_the_tracker_takes_over(rng: np.random.Generator, make_policy: MakePolicy) -> None:
    shown, states = demonstration(rng), demonstration(rng)[0]
    handing = make_policy(0.25, chunk=4)
    alone = handing.with_acting(track_after=0.0).prompt(trajectory=shown)
    handing.prompt(trajectory=shown)
    same = [np.array_equal(handing.act(state), alone.act(state)) for state in states[:40]]
    assert same == [True] * STILL + [False] * 10


def test_it_travels_with_a_session(rng: np.random.Generator, make_policy: MakePolicy) -> None:
    policy, states = make_policy(0.5), demonstration(rng)[0]
    session = policy.session(trajectory=demonstration(rng))
    for state in states[: T // 2 + 5]:
        session.act(state)
    others = copy.deepcopy(session), pickle.loads(pickle.dumps(session))
    for state in states[T // 2 + 5 :][:3]:
        expected = session.act(state)
        for other in others:
            np.testing.assert_array_equal(other.act(state), expected)


def test_without_a_demonstration_there_is_nothing_to_track(rng: np.random.Generator, make_policy: MakePolicy) -> None:
    policy = make_policy(1.0)
    prompts = policy.network.encode(torch.randn(1, D), None)
    state = demonstration(rng)[0][:1]
    late = (np.array([0]), np.array([10_000]), state, None, lambda due: due)
    plain = policy.with_acting(track_after=0.0).episodes(prompts).act(*late)
    np.testing.assert_array_equal(policy.episodes(prompts, shown=[None]).act(*late), plain)
    np.testing.assert_array_equal(policy.episodes(prompts).act(*late), plain)


@pytest.mark.parametrize(
    "layout",
    [None, dataclasses.replace(LAYOUT, goal=None), dataclasses.replace(LAYOUT, move=())],
    ids=["none", "no goal", "no action.move"],
)
def test_a_layout_that_cannot_be_tracked_is_refused(make_policy: MakePolicy, layout: Layout | None) -> None:
    with pytest.raises(InputError, match="tracker needs to know") as error:
        make_policy(1.5, layout)
    assert error.value.field == "acting.track_after"
    assert make_policy(0.0, layout).acting.track_after == 0
    assert make_policy(1.5, layout, trajectory=False).acting.track_after == 1.5, "what reads none does not track"
