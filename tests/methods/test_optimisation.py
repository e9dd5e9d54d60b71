"""The options that every method's optimisation has: declared once, named and loaded as before."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from llmdpd.cli.train import configuration
from llmdpd.config.schema import TrainConfig
from llmdpd.methods.llmdpd.method import LLMDPDConfig
from llmdpd.methods.optimisation import OptimisationConfig, ema_rate, rate_factor
from llmdpd.methods.trajectory_diffusion.method import TrajectoryDiffusionConfig
from llmdpd.utils.bounds import LIMITS
from llmdpd.utils.plain import from_plain, to_plain

# As config.json of a run had them before they were inherited; the order of the fields was another.
SAVED: dict[str, dict[str, Any]] = {
    "agent": {
        "lr": 6e-4,
        "critic_lr": 1e-4,
        "lr_warmup": 300,
        "lr_final": 0.03,
        "weight_decay": 1e-4,
        "gamma": 0.98,
        "tau": 0.01,
        "eta": 0.05,
        "reward_scale": 0.1,
        "grad_clip": 1.5,
        "ema_decay": 0.999,
        "ema_every": 1,
        "ema_start": 20,
        "critic_sees_prompts": True,
        "precision": "bf16",
        "critic_hidden": 16,
        "clone": "expert",
    },
    "planner": {
        "lr": 5e-4,
        "lr_warmup": 200,
        "lr_final": 0.1,
        "weight_decay": 1e-3,
        "grad_clip": 2.5,
        "first_action_weight": 4.0,
        "ema_decay": 0.99,
        "ema_every": 2,
        "ema_start": 30,
        "clone": "expert",
    },
}
METHODS = {"agent": LLMDPDConfig, "planner": TrajectoryDiffusionConfig}


@pytest.mark.parametrize("part", METHODS)
def test_a_saved_configuration_loads_as_it_was(part: str) -> None:
    config = from_plain(TrainConfig, SAVED, "config.json")
    assert to_plain(getattr(config, part)) == SAVED[part]


@pytest.mark.parametrize("part", METHODS)
def test_a_method_inherits_every_option_under_its_own_name(part: str) -> None:
    shared = {field.name for field in dataclasses.fields(OptimisationConfig)}
    assert issubclass(METHODS[part], OptimisationConfig)
    assert set(METHODS[part].__annotations__) & shared <= {"lr"}, "declared twice"
    assert {f"{part}.{name}" for name in shared} <= LIMITS.keys()
    method = {"agent": "llmdpd", "planner": "trajectory-diffusion"}[part]
    for name in shared:
        option = f"--{part}.{name.replace('_', '-')}"
        words = ["--preset", "metaworld-paper", "--method", method, "--acting.samples", "1", option, "1"]
        config = configuration(words)
        assert getattr(getattr(config, part), name) == 1


def test_each_method_keeps_its_own_defaults() -> None:
    defaults = [to_plain(kind()) for kind in (OptimisationConfig, LLMDPDConfig, TrajectoryDiffusionConfig)]
    shared, agent, planner = ({name: values[name] for name in defaults[0]} for values in defaults)
    assert agent == shared
    assert planner == {**shared, "lr": 2e-4}


def test_the_schedules_take_any_methods_options() -> None:
    config = OptimisationConfig(lr_warmup=4, lr_final=0.2, ema_decay=0.75, ema_every=2, ema_start=3)
    assert rate_factor(config, 0, 10) == pytest.approx(1 / 4)
    assert rate_factor(config, 5, 10) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert [ema_rate(config, iteration) for iteration in range(5)] == [1.0, None, 1.0, None, 0.25]
