"""What the optimisation of all methods has in common: rates, EMA, gradients' bound, stored configurations."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from llmdpd.methods import METHODS
from llmdpd.methods.base import Method, MethodConfig, OfflineConfig
from llmdpd.methods.optimisation import OptimisationConfig, ema_rate, rate_factor
from llmdpd.utils.plain import from_plain, to_plain

OFFLINE = [name for name in METHODS if issubclass(METHODS[name], Method)]
MODULES = {
    **{name: {"critic", "target_critic"} for name in ("llmdpd", "diffusion-ql", "diffusion-bc")},
    **{name: {"critic", "target_critic", "target_policy"} for name in ("td3-bc", "rad", "s4rl")},
    "rd": {"critic", "target_critic", "target_policy"},
    "cql": {"critic", "target_critic", "temperature"},
    "ads": {"critic", "target_critic", "temperature", "behaviour"},
    **{name: {"critic", "target_critic", "temperature", "model"} for name in ("pnf", "otto")},
}
TWO = pytest.mark.parametrize("name", ["llmdpd", "trajectory-diffusion"])


@pytest.mark.parametrize("name", METHODS)
def test_a_stored_configuration_is_read_as_it_was(name: str) -> None:
    config = METHODS[name].Config()
    plain = to_plain(config)
    assert plain["name"] == name
    assert from_plain(MethodConfig, plain, "config.json") == config
    if name in OFFLINE:
        assert isinstance(config, OfflineConfig)
        changes = {field.name: 1 for field in dataclasses.fields(OptimisationConfig)}
        assert to_plain(from_plain(MethodConfig, plain | changes, "config.json")) == plain | changes


@pytest.mark.parametrize("name", OFFLINE)
def test_a_checkpoint_holds_every_module_and_optimiser(name: str, make_method: Any) -> None:
    method = make_method(name)
    assert method.modules.keys() == {"policy", "ema_policy", *MODULES.get(name, ())}
    own = ("critic", "temperature", "behaviour", "model")
    learns = ("policy", *(("adapters",) if name == "lamo" else MODULES.get(name, set()) & set(own)))
    assert method.optimizers.keys() == {f"{one}_optimizer" for one in learns}
    owned = [p for optimizer in method.optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in owned}) == len(owned)
    learned = [p for one in ("policy", *own) for p in _parameters(method, one)]
    assert {id(p) for p in owned} == {id(p) for p in learned}
    assert not method.acting_network.training
    assert not any(p.requires_grad for p in method.acting_network.parameters())


def _parameters(method: Any, name: str) -> list[torch.nn.Parameter]:
    return list(method.modules[name].parameters()) if name in method.modules else []


def test_the_schedules_follow_any_methods_options() -> None:
    config = OptimisationConfig(lr_warmup=4, lr_final=0.2, ema_decay=0.75, ema_every=2, ema_start=3)
    assert rate_factor(config, 0, 10) == pytest.approx(1 / 4)
    assert rate_factor(config, 5, 10) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert [ema_rate(config, iteration) for iteration in range(5)] == [1.0, None, 1.0, None, 0.25]


@pytest.mark.parametrize(("warmup", "final"), [(0, 1.0), (0, 0.1), (10, 0.1), (4, 1.0)])
def test_rates_warm_up_and_decay_per_iteration(make_method: Any, warmup: int, final: float) -> None:
    method = make_method(iterations=40, lr=2e-3, critic_lr=5e-4, lr_warmup=warmup, lr_final=final)
    for iteration in (0, 1, 3, 9, 20, 39):
        method.schedule(iteration)
        factor = final + (1 - final) * (1 + math.cos(math.pi * iteration / 40)) / 2
        if warmup:
            factor *= min(1.0, (iteration + 1) / warmup)
        for name, rate in (("policy", 2e-3), ("critic", 5e-4)):
            group = method.optimizers[f"{name}_optimizer"].param_groups[0]
            assert float(group["lr"]) == pytest.approx(rate * factor, rel=1e-5)


def test_rates_stay_the_same_tensors(make_method: Any, make_batch: Any) -> None:
    """What a CUDA graph reads must be where it was, also after an optimiser's state was loaded."""
    method, batch = make_method(iterations=10, lr=1e-2, lr_warmup=4, lr_final=0.1), make_batch()
    groups = [group for optimizer in method.optimizers.values() for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    seen = set()
    for iteration in range(10):
        method.update(batch, iteration)
        seen.add(float(rates[0]))
        assert all(group["lr"] is rate for group, rate in zip(groups, rates, strict=True))
    assert len(seen) > 6
    for optimizer in method.optimizers.values():
        optimizer.load_state_dict(optimizer.state_dict())
    method.schedule(0)
    assert float(method.optimizers["policy_optimizer"].param_groups[0]["lr"]) == pytest.approx(1e-2 / 4)


@TWO
def test_the_ema_copies_first_and_then_averages_at_its_marks(name: str, make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(name, ema_every=3, ema_start=6, ema_decay=0.8, lr=1e-2), make_batch(H=5)
    before = copy.deepcopy(method.policy.state_dict())
    for iteration in range(14):
        kept = copy.deepcopy(method.ema_policy.state_dict())
        method.update(batch, iteration)
        rate = 0.0 if iteration % 3 else 1.0 if iteration < 6 else 0.2
        now = method.policy.state_dict()
        for key, value in method.ema_policy.state_dict().items():
            torch.testing.assert_close(value, kept[key] + rate * (now[key] - kept[key]), msg=key)
            assert rate or torch.equal(value, kept[key])
    still = {key for key, value in method.policy.state_dict().items() if torch.equal(value, before[key])}
    statistics = {"context.features.mean", "context.features.std"}
    # The narrow text head's ReLUs can all be off for the one text: then nothing below its last bias learns.
    still = {key for key in still if not key.startswith("context.text_head.") or key.endswith("4.bias")}
    assert still == (statistics if name == "llmdpd" else statistics | {"low", "high"})


@TWO
def test_the_gradients_norm_is_bounded(name: str, make_method: Any, make_batch: Any) -> None:
    def norm(optimizer: torch.optim.Optimizer) -> float:
        """Of the gradients that the first step was made of: a tenth of them is its mean."""
        means = [state["exp_avg"] for state in optimizer.state.values()]
        return 10 * float(torch.nn.utils.get_total_norm(means))

    batch = make_batch(H=5)
    for clip in (0.01, 0.0):
        method = make_method(name, grad_clip=clip)
        metrics = method.update(batch, 0)
        for part in {"policy", "critic"} & method.modules.keys():
            found = float(metrics[f"grad/{part}"])  # as it was before the bound
            assert found > 0.01
            assert norm(method.optimizers[f"{part}_optimizer"]) == pytest.approx(clip or found, rel=1e-3)


def test_weight_decay_is_the_policys(make_method: Any) -> None:
    method = make_method(weight_decay=0.3)
    decays = {name: each.param_groups[0]["weight_decay"] for name, each in method.optimizers.items()}
    assert decays == {"policy_optimizer": 0.3, "critic_optimizer": 0}
