from __future__ import annotations

import numpy as np
import pytest

from llmdpd.tasks.metaworld.behaviours import BEHAVIOURS, Behaviour

HAND = np.array([0.0, 0.6, 0.2], np.float32)
EXPERT = np.array([0.9, -1.0, 0.1, 0.5], np.float32)


def made(kind: str, seed: int, count: int = 1) -> list[Behaviour]:
    return [Behaviour(kind, np.random.default_rng([seed, n])) for n in range(count)]


@pytest.mark.parametrize("kind", sorted(BEHAVIOURS))
def test_actions_stay_in_bounds_and_repeat_for_a_seed(kind: str, fresh_seed: int) -> None:
    first, second = (Behaviour(kind, np.random.default_rng(fresh_seed)) for _ in range(2))
    for _ in range(200):
        action = first(EXPERT, HAND)
        assert action.dtype == np.float32
        assert action.shape == (4,)
        assert np.abs(action).max() <= 1
        assert np.array_equal(action, second(EXPERT, HAND))
    assert first.level == second.level


@pytest.mark.parametrize(
    ("kind", "level", "total", "weighted"),
    [
        ("clean", 0.0, 24.99999888, 2484.99989063),
        ("gaussian", 0.3500381866418668, 20.89011202, 2378.73723163),
        ("bursts", 0.2875286399814001, 15.75961138, 468.85164598),
        ("random", 0.9250190933209335, 2.99034744, 285.50921827),
    ],
)
def test_the_noises_draw_as_they_always_did(kind: str, level: float, total: float, weighted: float) -> None:
    # Sums of what was drawn before there were other behaviours: data that was collected then is known by its hash.
    noise = Behaviour(kind, np.random.default_rng(7))
    actions = np.stack([noise(EXPERT, HAND) for _ in range(50)]).astype(np.float64)
    assert noise.level == level
    assert actions.sum() == pytest.approx(total, abs=1e-6)
    assert (actions * np.arange(200).reshape(50, 4)).sum() == pytest.approx(weighted, abs=1e-5)


def test_gaussian_noise_has_the_recorded_sigma(fresh_seed: int) -> None:
    for noise in made("gaussian", fresh_seed, 3):
        # sigma <= 0.5 around 0: clipping at 2 sigma or more takes little.
        drawn = np.stack([noise(np.zeros(4, np.float32), HAND) for _ in range(4000)])
        inside = np.quantile(np.abs(drawn), 0.5) / 0.6745  # the median is untouched by clipping
        assert inside == pytest.approx(noise.level, rel=0.06)


@pytest.mark.parametrize("kind", ["bursts", "random", "pauses"])
def test_the_level_is_the_share_of_steps_without_the_expert(kind: str, fresh_seed: int) -> None:
    for behaviour in made(kind, fresh_seed, 3):
        other = np.array([(behaviour(EXPERT, HAND) != EXPERT).any() for _ in range(20_000)])
        assert other.mean() == pytest.approx(behaviour.level, abs=0.04)


@pytest.mark.parametrize(("kind", "shortest", "longest"), [("bursts", 5, 15), ("pauses", 5, 20)])
def test_one_action_is_held(kind: str, shortest: int, longest: int, fresh_seed: int) -> None:
    (behaviour,) = made(kind, fresh_seed)
    other = np.stack([behaviour(EXPERT, HAND) for _ in range(3000)])
    changes = np.flatnonzero((np.diff(other, axis=0) != 0).any(1)) + 1
    runs = [part for part in np.split(other, changes)[1:-1] if (part[0] != EXPERT).any()]
    assert len(runs) > 5
    # Two pauses that follow each other look like one.
    assert all(len(run) >= shortest for run in runs)
    assert np.median([len(run) for run in runs]) <= longest


def test_a_pause_holds_the_gripper_where_it_was(fresh_seed: int) -> None:
    for behaviour in made("pauses", fresh_seed, 5):
        before = None
        for step in range(300):
            expert = np.array([0.5, 0.5, 0.5, np.sin(step)], np.float32)
            action = behaviour(expert, HAND)
            if not action[:3].any() and before is not None:
                assert action[3] == before
            before = action[3]


def test_slow_is_slow_and_closes_its_gripper_later(fresh_seed: int) -> None:
    for behaviour in made("slow", fresh_seed, 5):
        commands = [-1.0] * 10 + [1.0] * 60
        actions = np.stack([behaviour(np.array([*EXPERT[:3], grip], np.float32), HAND) for grip in commands])
        assert np.allclose(actions[:, :3], EXPERT[:3] * (1 - behaviour.level), atol=1e-6)
        closes = int(np.argmax(actions[:, 3] > 0))
        assert closes == 10 + round(10 * behaviour.level / (1 - behaviour.level))
        assert (actions[closes:, 3] == 1).all()


def test_jerky_is_right_on_average(fresh_seed: int) -> None:
    (behaviour,) = made("jerky", fresh_seed)
    expert = np.array([0.7, -0.3, 0.0, 0.5], np.float32)
    actions = np.stack([behaviour(expert, HAND) for _ in range(5000)])
    assert set(np.unique(actions[:, :3])) == {-1.0, 0.0, 1.0}
    assert np.allclose(actions.mean(0), expert, atol=0.04)
    assert (actions[:, 3] == 0.5).all()


def walk(behaviour: Behaviour, grips: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Hand positions and actions of a hand that goes where it is told, a centimetre a step; the expert stands still."""
    hand, hands, actions = HAND.copy(), [], []
    for grip in grips:
        action = behaviour(np.array([0, 0, 0, grip], np.float32), hand)
        hands.append(hand.copy())
        actions.append(action)
        hand = hand + 0.01 * action[:3]
    return np.stack(hands), np.stack(actions)


def test_a_detour_goes_aside_first_and_up_after_a_grip(fresh_seed: int) -> None:
    for behaviour in made("detour", fresh_seed, 10):
        hands, actions = walk(behaviour, [-1.0] * 80 + [1.0] * 120)
        gone = hands[79] - HAND
        aside = float(np.linalg.norm(gone[:2]))
        assert 0.04 < aside < behaviour.level * 0.5 + 0.01
        assert gone[2] > 0.01
        # It rises before it goes aside.
        assert not actions[0, :2].any()
        lifted = hands[-1] - hands[79]
        assert np.linalg.norm(lifted[:2]) < 1e-6
        assert lifted[2] > 0.01 or hands[79, 2] > 0.31
        # The command that it interrupts is held.
        assert (actions[:80, 3] == -1).all()
        assert (actions[80:, 3] == 1).all()


def test_a_gripper_that_flickers_is_interrupted_thrice_at_most(fresh_seed: int) -> None:
    for behaviour in made("detour", fresh_seed, 5):
        _, actions = walk(behaviour, ([1.0] * 40 + [-1.0] * 40) * 10)
        assert not actions[400:, :3].any()


LEVELS = {
    **{kind: (0.0, 0.0) for kind in ("clean", "cut", "overrun", "wander")},
    **{"gaussian": (0.1, 0.5), "bursts": (0.1, 0.4), "random": (0.8, 1.0), "slow": (0.3, 0.7)},
    **{"pauses": (0.1, 0.4), "detour": (0.2, 0.5), "jerky": (0.5, 0.5)},
}


@pytest.mark.parametrize("kind", BEHAVIOURS)
def test_levels_and_steps_after_the_success(kind: str, fresh_seed: int) -> None:
    several, (low, high) = made(kind, fresh_seed, 200), LEVELS[kind]
    levels = [behaviour.level for behaviour in several]
    assert low <= min(levels) <= max(levels) <= high
    assert max(levels) - min(levels) >= 0.8 * (high - low)
    steps = {behaviour.post_success_steps(20) for behaviour in several}
    if kind in ("overrun", "wander"):
        assert len(steps) > 10
        assert 100 <= min(steps) <= max(steps) <= (200 if kind == "overrun" else 400)
    else:
        assert steps == ({0} if kind == "cut" else {20})
    if high == 0 and kind != "wander":
        assert np.array_equal(several[0](EXPERT, HAND), EXPERT)


def test_wander_is_the_expert_until_the_success_and_random_after_it(fresh_seed: int) -> None:
    for behaviour in made("wander", fresh_seed, 5):
        for _ in range(30):
            assert np.array_equal(behaviour(EXPERT, HAND), EXPERT)
        behaviour.post_success_steps(20)
        after = np.stack([behaviour(EXPERT, HAND) for _ in range(400)])
        changes = np.flatnonzero((np.diff(after, axis=0) != 0).any(1)) + 1
        assert 5 <= np.diff(changes).min() <= np.diff(changes).max() <= 30
        assert len(np.unique(after, axis=0)) == len(changes) + 1
        assert after.std(0).min() > 0.2
