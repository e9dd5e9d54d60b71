"""A policy in a user's process: weights that are not finite, and settings of torch that belong to the user."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmdpd.errors import InputError
from llmdpd.nn.acting import BestOfN
from llmdpd.policy.policy import Policy
from tests.policy.conftest import KNOWN, A, MakePolicy, S

BEST = BestOfN(samples=5)


def spoil(module: nn.Module, value: float) -> None:
    *_, last = module.parameters()
    last.data.view(-1)[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["network", "critic"])
def test_weights_that_are_not_finite_are_refused(
    make_policy: MakePolicy, example: Any, part: str, value: float
) -> None:
    policy = make_policy(acting=BEST)
    spoil(getattr(policy, part), value)
    with pytest.raises(InputError, match="NaN or Inf in a tensor"):
        policy.prompt(KNOWN, example)
    with pytest.raises(InputError, match="NaN or Inf in a tensor"):
        policy.with_acting(samples=3)


def test_an_action_that_is_not_finite_is_refused(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy()
    for parameter in policy.network.net.parameters():  # finite, but what is computed by them is not
        parameter.data.mul_(1e30)
    with pytest.raises(InputError, match="NaN or Inf in the action"):
        policy.prompt(KNOWN, example).act(np.ones(S))


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], Any]] = {
    "float64 by default": default_dtype,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


def episode(path: Path, example: Any) -> np.ndarray:
    policy = Policy.load(path).prompt(KNOWN, example)
    policy.seed(3)
    return np.stack([policy.act(np.full(S, 0.1 * step)) for step in range(4)])


@pytest.mark.parametrize("kind", ["pooled", "retrieval"])
@pytest.mark.parametrize("acting", [BestOfN(samples=1), BEST], ids=["one sample", "best of N"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torch_change_no_action(
    make_policy: MakePolicy, example: Any, tmp_path: Path, name: str, acting: BestOfN, kind: str
) -> None:
    make_policy(acting=acting, kind=kind).save(tmp_path / "policy")
    plain = episode(tmp_path / "policy", example)
    with SETTINGS[name]():
        assert np.array_equal(episode(tmp_path / "policy", example), plain)


def test_a_setting_made_after_loading_changes_no_action(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy(acting=BEST).prompt(KNOWN, example)
    policy.seed(1)
    plain = policy.act(np.ones(S))
    for setting in SETTINGS.values():
        with setting():
            policy.seed(1)
            policy.reset()
            assert np.array_equal(policy.act(np.ones(S)), plain)


def test_numbers_of_numpy_are_numbers(make_policy: MakePolicy, example: Any) -> None:
    policy = make_policy().prompt(KNOWN, example, target_return=np.float32(1.0))
    policy.seed(7)
    plain = policy.act(np.ones(S), step=2)
    policy.seed(np.int64(7))
    assert np.array_equal(policy.act(np.ones(S, np.float64), step=np.int32(2), reward=np.float64(0.0)), plain)


def test_policies_in_threads_act_as_alone(make_policy: MakePolicy, example: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"policy-{number}" for number in range(4)]
    for path in paths:
        make_policy(acting=BEST).save(path)
    alone, found = [episode(path, example) for path in paths], {}
    threads = [
        threading.Thread(target=lambda path=path: found.update({path: episode(path, example)})) for path in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path, actions in zip(paths, alone, strict=True):
        assert np.array_equal(found[path], actions)


OTHER_PROCESSES = """
import multiprocessing, os, pickle, select, sys
import numpy as np
import torch
from llmdpd.policy.policy import Policy

PATH, S, A, KNOWN = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
PROMPT = np.sin(np.arange(20 * S)).reshape(20, S), np.cos(np.arange(20 * A)).reshape(20, A)

def loaded():
    return Policy.load(PATH).prompt(KNOWN, PROMPT)

def actions(policy):
    policy.seed(4)
    policy.reset()
    alone = policy.act(np.ones(S))
    policy.reset()
    return alone, policy.act(np.sin(np.arange(6000.0 * S)).reshape(6000, S))

def send(make, pipe):
    torch.set_num_threads(1)
    pipe.send(actions(make()))

def forked(policy):
    ours, theirs = multiprocessing.Pipe()
    if (child := os.fork()) == 0:
        theirs.send(actions(policy))
        os._exit(0)
    return ours, lambda: os.kill(child, 9)

class Given:
    def __init__(self, policy):
        self.policy = policy

    def __call__(self):
        return self.policy

def spawned(make):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=send, args=(make, theirs))
    process.start()
    return ours, process.kill

if __name__ == "__main__":
    torch.set_num_threads(1)
    policy = loaded()
    expected = actions(policy)
    torch.set_num_threads(4)  # more than one, so that torch shares work out and starts them
    torch.ones(500, 500) @ torch.ones(500, 500)
    actions(policy)
    children = {
        "forked": forked(policy), "forked, another policy": forked(loaded()), "spawned": spawned(loaded),
        "given to one that is spawned": spawned(Given(policy)),
    }
    try:
        for name, (pipe, _) in children.items():
            assert pipe.poll(60), f"{name}: it hangs"
            for found, wanted in zip(pipe.recv(), expected, strict=True):
                assert np.array_equal(found, wanted), name
    finally:
        for _, end in children.values():
            end()
    again = pickle.loads(pickle.dumps(policy))
    for found, wanted in zip(actions(again), actions(policy), strict=True):
        assert np.array_equal(found, wanted), "pickled"
"""


def test_a_policy_acts_the_same_in_processes_that_are_forked_and_spawned(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    make_policy(acting=BEST).save(tmp_path / "policy")
    (tmp_path / "script.py").write_text(OTHER_PROCESSES)
    argv = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "policy"), str(S), str(A), KNOWN]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
