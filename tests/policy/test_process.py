"""A policy in a user's process: weights that are not finite, and settings of torch that belong to the user."""

from __future__ import annotations

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
from tests.policy.conftest import KNOWN, MakePolicy, S

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
    policy = make_policy().prompt(KNOWN, example)
    for parameter in policy.network.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN or Inf in the action"):
        policy.act(np.zeros(S))


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


@pytest.mark.parametrize("acting", [BestOfN(samples=1), BEST], ids=["one sample", "best of N"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torch_change_no_action(
    make_policy: MakePolicy, example: Any, tmp_path: Path, name: str, acting: BestOfN
) -> None:
    make_policy(acting=acting).save(tmp_path / "policy")
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
