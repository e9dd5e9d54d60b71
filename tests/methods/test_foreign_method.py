"""A method from a module outside the package: one file and one registration."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.config.parse import parse_train
from llmdpd.config.presets import find_preset, with_method
from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.policy import Policy
from llmdpd.utils.plain import from_plain, to_plain

MODULE = '''
"""Regression of the executed actions."""

from dataclasses import dataclass, field
from typing import Annotated

import torch.nn.functional as F

from llmdpd.methods import METHODS
from llmdpd.methods.base import Method, OfflineConfig
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.actor import ActorNetworkConfig, DeterministicPolicy
from llmdpd.utils.bounds import Bounds


@dataclass(frozen=True)
class RegressionConfig(OfflineConfig):
    """Regression of the executed actions, by a power of the error."""

    name = "regression"

    network: ActorNetworkConfig = field(default_factory=ActorNetworkConfig)
    acting: ActingConfig = field(default_factory=ActingConfig)
    power: Annotated[float, Bounds(1, 4)] = 2.0
    """Power of the error."""

    @classmethod
    def from_preset(cls, start):
        return cls(network=ActorNetworkConfig.from_preset(start), ema_start=0, ema_every=1, **start.batches)


class Regression(Method[DeterministicPolicy, RegressionConfig]):
    """Cloning by regression."""

    Config = RegressionConfig

    @classmethod
    def build_network(cls, spaces, config):
        return DeterministicPolicy(spaces, config)

    def learn(self, batch):
        actions = self.policy(self.condition(batch, self.encode(batch)))
        loss = (actions - batch.actions).abs().pow(self.config.power).mean()
        return {"loss/regression": loss.detach(), "grad/policy": self.step("policy", loss)}


METHODS.register("regression", Regression)
'''


@pytest.fixture
def regression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The method, registered for the test alone."""
    monkeypatch.setattr(METHODS, "_loaded", dict(METHODS._loaded))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "regression_method.py").write_text(MODULE)
    yield importlib.import_module("regression_method").Regression
    del sys.modules["regression_method"]


def test_it_is_configured_like_any_other(regression: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert METHODS["regression"] is regression
    config = with_method(find_preset("smoke"), "regression")
    assert (config.method.name, config.method.batch_size) == ("regression", 480)
    assert from_plain(type(config), to_plain(config), "config.json") == config
    words = ["--preset", "smoke", "--method", "regression", "--method.power", "3", "--lr", "0.01"]
    method: Any = parse_train(words).method
    assert (type(method), method.power, method.lr) == (regression.Config, 3.0, 0.01)
    with pytest.raises(InputError) as error:
        parse_train([*words, "--method.power", "5"])
    assert error.value.field == "method.power"
    with pytest.raises(SystemExit):
        parse_train(["--method", "regression", "--help"])
    assert "--method.power" in capsys.readouterr().out


def test_it_learns_and_its_policy_is_saved_loaded_and_acts(
    regression: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    config = parse_train(["--preset", "metaworld-paper", "--method", "regression", "--lr", "0.01"]).method
    network = METHODS["regression"].build_network(Spaces(39, 4, 0), config.network)
    observations, actions = torch.randn(16, 39), torch.rand(16, 4) * 2 - 1
    network.fit(observations, lambda: torch.zeros(1))
    zeros = torch.zeros(16)
    batch = PromptedBatch(observations, actions, zeros, observations, zeros, None, zeros.long(), None, None)
    method = regression(network, config, 30)
    losses = [float(method.update(batch, iteration)["loss/regression"]) for iteration in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    policy = Policy("regression", method.acting_network, method.acting_critic, config.acting)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert (loaded.method, type(loaded.network)) == ("regression", type(network))
    states = rng.normal(size=(5, 39)).astype(np.float32)
    found = loaded.prompt().act(states)
    assert found.shape == (5, 4)
    assert np.array_equal(found, policy.prompt().act(states))
