"""Through how few files go a run's configuration to its networks, and an observation to the C++ call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from torch import Tensor

import llmdpd
from llmdpd.config.schema import TrainConfig
from llmdpd.methods.base import MethodConfig
from llmdpd.nn.config import NetworkConfig
from llmdpd.nn.policy_network import PolicyNetwork
from llmdpd.policy.policy import Policy

PACKAGE = str(Path(llmdpd.__file__).parent)
NETWORKS = {"methods/llmdpd/network.py", "nn/policy_network.py"}


def files(call: Callable[[], object], is_it: Callable[[object], bool]) -> set[str]:
    """The files of llmdpd in which a function is handed it, as an argument or as its own object, during a call."""
    found = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(is_it(frame.f_locals.get(name)) for name in names):
                found.add(str(Path(code.co_filename).relative_to(PACKAGE)))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_a_configuration_goes_through_twelve_files_to_the_networks(
    train: Callable[..., int], tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BuiltError(BaseException):
        """The networks are there."""

    def built(*_: object) -> None:
        raise BuiltError

    def run() -> None:
        with pytest.raises(BuiltError):
            train("--run-dir", tmp_path / "run", *tiny_options)

    monkeypatch.setattr(PolicyNetwork, "fit", built)
    found = files(run, lambda value: isinstance(value, TrainConfig | MethodConfig | NetworkConfig))
    assert found > NETWORKS
    assert len(found - NETWORKS) <= 12, sorted(found)


def test_an_observation_goes_through_five_files_to_the_native_call(rng: np.random.Generator) -> None:
    policy = Policy.load(Path(__file__).parent / "policy" / "recorded" / "llmdpd")
    width, actions = policy.network.state_dim, policy.network.action_dim
    policy.prompt(trajectory=(rng.normal(size=(9, width)), rng.uniform(-1, 1, (9, actions))))
    policy.act(rng.normal(size=width))  # which packs the weights
    observation = rng.normal(size=width)
    rows = (np.ndarray, Tensor)
    found = files(
        lambda: policy.act(observation), lambda value: isinstance(value, rows) and value.shape[-1:] == (width,)
    )
    assert "ops/acting.py" in found
    assert len(found) <= 5, sorted(found)
