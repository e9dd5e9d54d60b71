"""Sessions: several users of one policy; what each keeps; rows that begin anew; weights as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.nn.acting import BestOfN
from llmdpd.policy.policy import Policy
from llmdpd.policy.session import Session
from tests.policy.conftest import KNOWN, A, MakePolicy, S

CHUNKS = {"network": {"chunk": 3}, "critic": False}


def played(session: Session | Policy, states: np.ndarray) -> np.ndarray:
    return np.stack([session.act(state) for state in states])


@pytest.mark.parametrize("options", [{}, CHUNKS, {"acting": BestOfN(samples=5)}], ids=["one", "chunks", "best of N"])
def test_sessions_share_nothing_that_changes(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator, options: dict[str, Any]
) -> None:
    policy, states = make_policy(**options), rng.normal(size=(3, 12, S))
    alone = [played(policy.session(KNOWN, example, seed=n), states[n]) for n in range(3)]
    together = [policy.session(KNOWN, example, seed=n) for n in range(3)]
    found = np.stack([[one.act(states[n, step]) for n, one in enumerate(together)] for step in range(12)], axis=1)
    np.testing.assert_array_equal(found, np.stack(alone))
    policy.prompt(KNOWN, example)
    policy.seed(1)
    np.testing.assert_array_equal(played(policy, states[1]), alone[1])  # the policy's own is one of them


def test_sessions_in_threads_act_as_alone(make_policy: MakePolicy, example: Any, rng: np.random.Generator) -> None:
    policy, states = make_policy(acting=BestOfN(samples=5)), rng.normal(size=(4, 60, S))
    alone = [played(policy.session(KNOWN, example, seed=n), states[n]) for n in range(4)]
    found: dict[int, np.ndarray] = {}

    def play(n: int) -> None:
        found[n] = played(policy.session(KNOWN, example, seed=n), states[n])

    threads = [threading.Thread(target=play, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        np.testing.assert_array_equal(found[n], alone[n])


def test_rows_have_timesteps_of_their_own(policy: Policy, acted_at: list[list[int]]) -> None:
    rows = np.ones((3, S))
    policy.act(rows)
    policy.act(rows)
    policy.reset(rows=[1])
    policy.act(rows)
    policy.act(np.ones((4, S)), step=[7, 1, 2, 0])
    policy.reset([0, 3, 900])  # a row that has never acted has nothing to forget
    policy.act(np.ones((4, S)))
    policy.reset(rows=np.int64(2))
    policy.act(np.ones((2, S)))
    policy.act(np.ones((3, S)))
    expected = [[0] * 3, [1] * 3, [2, 0, 2], [7, 1, 2, 0], [0, 2, 3, 0], [1, 3], [2, 4, 0]]
    assert acted_at == expected


def test_a_row_that_is_reset_drops_its_chunk_alone(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy(**CHUNKS).prompt(KNOWN, example)
    first, second = np.ones((2, S)), np.full((2, S), -1.0)
    whole = [policy.act(first) for _ in range(3)]
    policy.seed(0)
    policy.reset()
    assert np.array_equal(policy.act(first), whole[0])
    policy.reset(rows=[1])
    after = policy.act(second)
    assert np.array_equal(after[0], whole[1][0])
    assert not np.array_equal(after[1], whole[1][1])


@pytest.mark.parametrize("bad", [[-1], 0.5, ["a"], [[1], [2, 3]], True, 2**70], ids=str)
@pytest.mark.parametrize("name", ["rows", "step"])
def test_rows_and_steps_that_are_none_are_refused(policy: Policy, name: str, bad: Any) -> None:
    calls: dict[str, Callable[[], object]] = {
        "rows": lambda: policy.reset(rows=bad),
        "step": lambda: policy.act(np.ones(S), step=bad),
    }
    with pytest.raises(InputError) as error:
        calls[name]()
    assert error.value.field == name


def test_steps_of_another_number_than_rows_are_refused(policy: Policy) -> None:
    with pytest.raises(InputError, match="steps"):
        policy.act(np.ones((3, S)), step=[1, 2])


def test_weights_count_as_they_are_at_the_prompt(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy(acting=BestOfN(samples=4)).prompt(KNOWN, example)
    before = played(policy, np.ones((3, S)))
    for part in (policy.network, policy.critic):
        assert part is not None
        for tensor in part.state_dict().values():
            tensor.mul_(-0.5)
    policy.seed(0)
    policy.reset()
    assert np.array_equal(played(policy, np.ones((3, S))), before)
    policy.prompt(KNOWN, example).seed(0)
    assert not np.array_equal(played(policy, np.ones((3, S))), before)


def test_the_users_threads_are_as_before(make_policy: MakePolicy, example: Any) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        policy = make_policy().prompt(KNOWN, example)
        policy.act(np.ones(S))
        policy.attention(KNOWN, example, np.ones((4, S), np.float32))
        assert torch.get_num_threads() == 3
        with pytest.raises(InputError):
            policy.prompt(KNOWN, (np.ones((3, S + 1)), np.ones((3, A))))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_frozen_acts_in_torch(
    make_policy: MakePolicy, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(acting=BestOfN(samples=4, selection="max"))
    states = np.random.default_rng().normal(size=(9, S))
    fast = policy.prompt(KNOWN, example).act(states)
    monkeypatch.setattr(type(policy.network), "freeze", lambda *_: None)
    policy.seed(0)
    np.testing.assert_allclose(policy.prompt(KNOWN, example).act(states), fast, atol=1e-4)


def test_which_prompt_is_asked_for_where_there_are_several(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy()
    with pytest.raises(InputError) as error:
        policy.episodes(policy.encode_prompts([KNOWN, KNOWN], [example, example]))
    assert error.value.field == "prompt_of"
