"""An exported policy against `Policy.act`: the same actions for the same seed and clock, whatever the policy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
from exporting import CASES, TEXT, Library, RefusedError, demonstration, make_policy, prompt_of

from llmdpd.export.contents import Prompt
from llmdpd.export.cpp import export_cpp
from llmdpd.policy.policy import Policy

Rng = np.random.Generator
TOLERANCE = 2e-5  # relative L2: the samplers'


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


def play(rng: Rng, policy: Policy, acting: Any, steps: int, rows: int | None = None) -> None:
    """Both act in the same observations, with the same numbers within tolerance."""
    width = policy.network.spaces.observed_dim
    for _ in range(steps):
        shape = (width,) if rows is None else (rows, width)
        observation = rng.normal(0, 0.3, shape).astype(np.float32)
        assert_close(acting.act(observation), policy.act(observation))


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_policy_plays_the_same_episode(case: str, library: Library, rng: Rng, tmp_path: Path) -> None:
    policy = make_policy(**CASES[case])
    prompt = prompt_of(rng, policy)
    export_cpp(policy, {"push": prompt}, tmp_path / "out")
    policy.prompt(*prompt)
    acting = library.policy(tmp_path / "out" / "policy.llmdpd", tmp_path / "out" / "prompts" / "push.llmdpd")
    seed = int(rng.integers(1 << 40))
    policy.seed(seed)
    acting.seed(seed)
    play(rng, policy, acting, 5)
    for each in (policy, acting):
        each.reset()
    play(rng, policy, acting, 3, rows=13)
    for each in (policy, acting):
        each.reset(2)
    play(rng, policy, acting, 4, rows=13)
    play(rng, policy, acting, 2, rows=3)


def test_its_clock_can_be_set(exported: tuple[Policy, Path], library: Library, rng: Rng) -> None:
    policy, folder = exported
    acting = library.policy(folder / "policy.llmdpd", folder / "prompts" / "push.llmdpd")
    observation = rng.normal(0, 0.3, (2, 7)).astype(np.float32)
    acting.act(observation)
    policy.act(observation)
    acting.set_step(0, 300)
    acting.set_step(1, 17)
    assert_close(acting.act(observation), policy.act(observation, step=[300, 17]))
    assert_close(acting.act(observation), policy.act(observation))


def test_one_policy_has_many_prompts(library: Library, rng: Rng, tmp_path: Path) -> None:
    policy = make_policy()
    prompts = {
        "text": Prompt(TEXT),
        "shown": Prompt(trajectory=demonstration(rng, policy, 4)),
        "both": prompt_of(rng, policy),
        "several": Prompt(TEXT, [demonstration(rng, policy, n) for n in (5, 30, 2)]),
    }
    export_cpp(policy, prompts, tmp_path / "out")
    acting = library.policy(tmp_path / "out" / "policy.llmdpd")
    for name, prompt in prompts.items():
        acting.prompt(tmp_path / "out" / "prompts" / f"{name}.llmdpd")
        policy.prompt(*prompt)
        play(rng, policy, acting, 2)
    export_cpp(make_policy(), {"push": prompts["both"]}, tmp_path / "other")
    with pytest.raises(RefusedError, match="another policy") as refused:
        acting.prompt(tmp_path / "other" / "prompts" / "push.llmdpd")
    assert refused.value.code == 4
    play(rng, policy, acting, 2)  # which goes on under the prompt that it had


def test_what_cannot_be_used_is_an_error_with_a_code(
    exported: tuple[Policy, Path], library: Library, rng: Rng, tmp_path: Path
) -> None:
    policy, folder = exported
    observation = rng.normal(0, 0.3, 7).astype(np.float32)
    acting = library.policy(folder / "policy.llmdpd")
    with pytest.raises(RefusedError, match="no prompt yet") as refused:
        acting.act(observation)
    assert refused.value.code == 5
    for source, code, words in (
        (tmp_path / "nothing", 2, "cannot be opened"),
        (tmp_path, 2, "cannot be read"),
        (folder / "export.json", 3, "no exported file"),
        (folder / "prompts" / "push.llmdpd", 3, "no policy's file"),
        (b"", 3, "too short"),
    ):
        with pytest.raises(RefusedError, match=words) as refused:
            library.policy(source)
        assert refused.value.code == code
    acting.prompt(folder / "prompts" / "push.llmdpd")
    for number in (np.nan, np.inf):
        with pytest.raises(RefusedError, match="in the observation") as refused:
            acting.act(np.where(np.arange(7) == 3, number, observation))
        assert refused.value.code == 6
    with pytest.raises(RefusedError, match="step") as refused:
        acting.set_step(0, -1)
    assert refused.value.code == 1
    for name in ("create", "set_prompt", "seed", "act", "reset"):
        assert getattr(library.c, f"llmdpd_{name}")(None, None, None, None) == 1
    assert_close(acting.act(observation), policy.act(observation))  # none of them changed its clock or its noise


THREADED = ("remembered", "soft")


@pytest.fixture
def episodes(library: Library, rng: Rng, tmp_path: Path) -> list[tuple[Path, np.ndarray, np.ndarray]]:
    """Of two policies each the folder, observations [T, B, S], and the actions on them in one thread [T, B, A]."""
    found = []
    for case in THREADED:
        policy, folder = make_policy(**CASES[case]), tmp_path / case
        export_cpp(policy, {"push": prompt_of(rng, policy)}, folder)
        observations = rng.normal(0, 0.3, (20, 150, policy.network.spaces.observed_dim)).astype(np.float32)
        acting = acting_of(library, folder)
        found.append((folder, observations, np.stack([acting.act(now) for now in observations])))
    return found


def acting_of(library: Library, folder: Path) -> Any:
    return library.policy(folder / "policy.llmdpd", folder / "prompts" / "push.llmdpd")


def test_policies_in_threads_of_their_own_act_as_one_after_the_other(library: Library, episodes: Any) -> None:
    together = Barrier(2 * len(episodes))

    def play(folder: Path, observations: np.ndarray) -> np.ndarray:
        acting = acting_of(library, folder)
        together.wait(timeout=60)
        return np.stack([acting.act(now) for now in observations])

    with ThreadPoolExecutor(together.parties) as pool:
        for _ in range(3):
            folders, observations, expected = zip(*(2 * episodes), strict=True)
            for found, one in zip(pool.map(play, folders, observations), expected, strict=True):
                np.testing.assert_array_equal(found, one)


def test_a_policy_goes_from_thread_to_thread(library: Library, episodes: Any) -> None:
    actings = [acting_of(library, folder) for folder, _, _ in episodes]
    found: list[list[np.ndarray]] = [[] for _ in episodes]

    def step(number: int) -> None:
        # Both in one thread: what a thread keeps between calls is the other policy's, or is not there yet.
        for acting, actions, (_, observations, _) in zip(actings, found, episodes, strict=True):
            actions.append(acting.act(observations[number]))

    for number in range(20):
        thread = Thread(target=step, args=(number,))
        thread.start()
        thread.join()
    for actions, (_, _, expected) in zip(found, episodes, strict=True):
        np.testing.assert_array_equal(np.stack(actions), expected)
