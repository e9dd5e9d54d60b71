"""PnF-Qgrad on COMBO, OTTO on CQL: what is simulated, where, from which states; what the models learn; the losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.methods.batch import StepWindows
from llmdpd.nn.dynamics import EnsembleDynamics
from llmdpd.nn.world_transformer import WorldTransformer, WorldTransformerConfig

S, A = 4, 2
NAMES = ("pnf", "otto")
PROMPTED = {"network.context.text": True, "network.context.trajectory": True}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("count", "prompts"), [(12, 1), (24, 3), (30, 5)])
def test_every_prompt_has_its_share_of_both(
    name: str, count: int, prompts: int, make_method: Any, make_batch: Any
) -> None:
    method = make_method(name, real_share=0.5, **PROMPTED)
    places = method.places(count, torch.device("cpu"))
    shares = torch.bincount(places // (count // prompts), minlength=prompts)
    assert int(shares.sum()) == count // 2
    assert int(shares.max() - shares.min()) <= 1
    batch = make_batch(count, P=prompts, H=4)
    mixed = method.mixed(batch, method.encode(batch))
    kept = torch.ones(count, dtype=torch.bool)
    kept[places] = False
    for part in ("observations", "actions", "rewards", "next_observations", "terminals", "timesteps"):
        assert torch.equal(getattr(mixed, part)[kept], getattr(batch, part)[kept]), part
    assert not (mixed.next_observations[places] == batch.next_observations[places]).all(1).any()
    assert torch.isfinite(mixed.observations).all()
    assert (mixed.actions.abs() <= 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_simulates_when_the_model_has_learned(name: str, make_method: Any, make_batch: Any, calls_of: Any) -> None:
    method, batch = make_method(name, iterations=10, model_share=0.3), make_batch(8, H=4)
    calls = calls_of(method, "simulate")
    for iteration in range(10):
        before = [p.clone() for p in method.model.parameters()]
        metrics = method.update(batch, iteration)
        assert len(calls) == max(0, iteration - 2)
        assert not any(torch.equal(a, b) for a, b in zip(before, method.model.parameters(), strict=True))
        assert all(torch.isfinite(value) for value in metrics.values())


def test_combo_holds_up_the_data_alone(make_method: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = make_method("pnf", samples=2, penalty=3.0, gamma=0.9, real_share=0.5), make_batch(6)
    others, density = torch.rand(6, 6, A) * 2 - 1, torch.randn(6, 6)
    sampled = torch.rand(1, 6, A) * 2 - 1, torch.randn(1, 6)
    monkeypatch.setattr(method.policy, "rsample", lambda condition, count=1: sampled)
    monkeypatch.setattr(method, "_others", lambda now, following: (others, density))
    prompts = method.encode(batch)
    now, later = (method.condition(batch, prompts, following) for following in (False, True))
    with torch.no_grad():
        target = batch.rewards + 0.9 * (1 - batch.terminals) * method.target_critic.minimum(later, sampled[0][0])
        expected = {True: 0.0, False: 0.0}
        for which, value in enumerate(method.critic(now, batch.actions)):
            there = torch.stack([method.critic(now, action)[which] for action in others]) - density
            for simulates in expected:
                held = value[[0, 2, 4]] if simulates else value  # places 1, 3 and 5 are simulated
                penalty = there.logsumexp(0).mean() - held.mean()
                expected[simulates] += float((value - target).square().mean() + 3 * penalty)
    for simulates, loss in expected.items():
        method._simulates = simulates
        assert float(method.critic_loss(batch)[0].detach()) == pytest.approx(loss, rel=1e-4)


def test_perturbed_states_are_worth_more_and_near(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("pnf", perturbation=0.2), make_batch(200)
    observations = batch.observations.clone()
    observations[:, 2] = 0  # nothing there
    batch = dataclasses.replace(batch, observations=observations)
    prompts, unit = method.encode(batch), method.policy.context.features.std
    found = method.perturbed(observations, prompts, batch.timesteps)
    assert not found[:, 2].any()
    lengths = ((found - observations) / unit).norm(dim=1)
    assert 0.15 < float(lengths.max()) <= 0.2 + 1e-5
    with torch.no_grad():
        values = []
        for states in (found, observations):
            torch.manual_seed(0)  # the same noise in both
            condition = method.policy.condition(states, prompts, None, batch.timesteps)
            actions = method.policy.rsample(condition, 200)[0]
            values.append(torch.stack([method.critic.minimum(condition, action) for action in actions]).mean(0))
    assert float((values[0] > values[1]).float().mean()) > 0.7


@pytest.mark.parametrize(("least", "most", "through"), [(0.0, 1.0, 0.8), (0.5, 0.5, 0.0), (0.5, 0.95, 0.2)])
def test_the_filter_is_a_band_of_uncertainty(
    least: float, most: float, through: float, make_method: Any, make_batch: Any
) -> None:
    sizes = {"least_uncertainty": least, "most_uncertainty": most, "perturbation": 0.1}
    method, batch = make_method("pnf", **sizes), make_batch(300)
    starts = method.starts(batch, method.encode(batch))
    changed = (starts != batch.observations).any(1)
    share = float(changed.float().mean())
    assert share >= through
    if least == most:
        assert share < 0.05
    if through == 0.2:
        assert share < 0.8


def test_bands_that_hold_nothing_are_refused(make_config: Any) -> None:
    with pytest.raises(InputError, match="least_uncertainty"):
        make_config("pnf", least_uncertainty=0.9, most_uncertainty=0.5).check()


def test_a_rollout_ends_where_the_model_says(make_method: Any, make_batch: Any, monkeypatch: Any) -> None:
    method, batch = make_method("pnf", rollout=5, **{"network.context.features": "raw"}), make_batch(400)
    steps = iter(range(10))

    def sample(known: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = next(steps)
        found = torch.zeros(len(known), S + 1)
        found[:, 0], found[:, -1] = 1.0, float(step)
        return found, torch.full((len(known),), float(step == 2))

    monkeypatch.setattr(method.model, "sample", sample)
    unit = method.policy.context.features.std
    prompts = method.encode(batch)
    with torch.no_grad():
        found = method._rollout(batch.observations, prompts, None, batch.timesteps)
    assert found.steps.bincount().tolist() == pytest.approx([80, 80, 240], abs=60)
    assert torch.equal(found.terminals, (found.steps == 2).float())
    assert torch.equal(found.rewards, found.steps.float())
    moved = (found.observations - batch.observations)[:, 0] / unit[0]
    torch.testing.assert_close(moved, found.steps.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.next_observations[:, 0], found.observations[:, 0] + unit[0], rtol=1e-4, atol=1e-4)


def test_the_ensemble_learns_a_step_its_noise_and_its_end() -> None:
    model = EnsembleDynamics(3, S, S, A, 32, 2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def world(count: int) -> tuple[torch.Tensor, ...]:
        state, action = torch.randn(count, S), torch.rand(count, A) * 2 - 1
        change = torch.zeros(count, S + 1)
        change[:, :A], change[:, -1] = 0.5 * action, state[:, 0]
        return state, action, change + 0.1 * torch.randn_like(change), (state[:, 1] > 0.5).float()

    for _ in range(700):
        optimizer.zero_grad()
        model.loss(*world(128)).backward()
        optimizer.step()
    state, action, _, ends = world(2000)
    with torch.no_grad():
        found, terminal = model.sample(state, action)
        predicted = model(state, action)
        far = model.disagreement(model(8 * state, action).mean)
    error = found[:, :A] - 0.5 * action
    assert float(error.std()) == pytest.approx(0.1, rel=0.4)
    assert float((found[:, -1] - state[:, 0]).std()) < 0.2
    assert float((terminal == ends).float().mean()) > 0.93
    assert float(far.mean()) > 2 * float(model.disagreement(predicted.mean).mean()), "far from the data they disagree"


def test_a_world_transformer_sees_no_later_step() -> None:
    model = WorldTransformer(S, A, 3, WorldTransformerConfig(horizon=6, layers=2, heads=2, width=16, dropout=0.0))
    known, actions = torch.randn(5, 6, S), torch.randn(5, 6, A)
    with torch.no_grad():
        found = model(known, actions)
        changed, other = known.clone(), actions.clone()
        changed[:, 3], other[:, 3] = 9.0, -9.0
        again, shorter = model(changed, other), model(known[:, :3], actions[:, :3])
    torch.testing.assert_close(found[:, :3], again[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, :3], shorter, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(found[:, 3:], again[:, 3:]).all(2).any(), "each later step sees the change"


def straight(batch: Any, horizon: int, speed: float = 0.3) -> Any:
    """The batch with windows in which every state goes by its action, and a step earns the first number of it."""
    count = len(batch.rewards)
    actions, states = torch.rand(count, horizon, A) * 2 - 1, [batch.observations]
    for step in range(horizon - 1):
        states.append(states[-1] + speed * torch.nn.functional.pad(actions[:, step], (0, S - A)))
    rewards = actions[..., 0]
    returns = rewards.flip(1).cumsum(1).flip(1)
    mask = torch.arange(horizon) < horizon - torch.arange(count)[:, None] % horizon
    return dataclasses.replace(batch, windows=StepWindows(torch.stack(states, 1), actions, None, mask, returns))


def test_otto_learns_the_world_and_simulates_it(make_method: Any, make_batch: Any) -> None:
    method = make_method("otto", iterations=600, model_lr=3e-3, action_noise=0.2, best=0.25)
    losses = []
    for _ in range(600):
        batch = straight(make_batch(64), 4)
        loss = method.model_loss(batch, method.encode(batch))
        losses.append(float(loss.detach()))
        method.step("model", loss)
    assert losses[-1] < 0.15 * losses[0]
    batch = straight(make_batch(200), 4)
    places = torch.arange(1, 200, 2)
    rows = method.sources(batch, places, 1)
    threshold = batch.windows.returns[batch.windows.mask.sum(1) >= 2, 0].topk(50).values.min()
    assert (batch.windows.returns[rows, 0] >= threshold).all()
    assert len(set(rows.tolist())) > 20
    found = method.simulate(batch, method.encode(batch), places)
    moved = found.next_observations - found.observations
    error = moved[:, :A] - 0.3 * found.actions
    assert float(error.abs().mean()) < 0.3 * float((0.3 * found.actions).abs().mean())
    assert float((found.rewards - found.actions[:, 0]).abs().mean()) < 0.3
    assert not found.terminals.any()
    assert (batch.timesteps[places] + found.steps).min() >= batch.timesteps.min()


def test_otto_simulates_no_further_than_was_recorded(
    make_method: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = make_method("otto", action_noise=0.0), straight(make_batch(60), 4)
    places = torch.arange(60)
    monkeypatch.setattr(method, "sources", lambda batch, places, prompts: places)
    prompts = method.encode(batch)
    depth = method.simulate(batch, prompts, places).steps
    length = (batch.windows.mask.sum(1) - 1).clamp_min(1)
    assert (depth >= 0).all()
    assert (depth < length).all()
    assert depth.max() == 2
    torch.testing.assert_close(
        method.simulate(batch, prompts, places).actions[length == 1], batch.windows.actions[length == 1, 0]
    )


def test_windows_of_each_prompt_stay_with_it(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("otto", best=0.5, **PROMPTED), straight(make_batch(40, P=4), 4)
    places = torch.arange(0, 40, 2)
    rows = method.sources(batch, places, 4)
    assert (rows // 10).tolist() == (places // 10).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_their_presets_have_their_own_settings(name: str) -> None:
    config: Any = METHODS[name].Config()
    assert config.lr == 1e-4
    assert config.penalty == (0.5 if name == "pnf" else 10.0)
    assert np.isclose(config.real_share, 0.5)
