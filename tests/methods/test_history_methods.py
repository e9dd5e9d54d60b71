"""What the methods that are conditioned on history have in common: what an action depends on, what is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.data import EpisodeRecord, Trajectory, join_episodes
from llmdpd.errors import InputError
from llmdpd.nn.policy_network import States
from llmdpd.policy.policy import Policy
from llmdpd.training.batches import BatchSampler

S, A, K = 4, 2, 5
NAMES = ("dt", "prompt-dt", "mtdiff", "lamo")
NAMED = pytest.mark.parametrize("name", NAMES)
PROMPTED = ("prompt-dt", "mtdiff")
DROPOUT = {
    **{name: {"network.sequence.dropout": 0.3} for name in ("dt", "prompt-dt", "lamo")},
    "mtdiff": {"network.trajectory_dropout": 0.3},
}


@pytest.fixture
def make_policy(make_network: Any, make_config: Any) -> Any:
    """A policy of a method with a random network, and this metadata."""

    def make(name: str, metadata: dict[str, Any] | None = None, **changes: Any) -> Policy:
        return Policy(name, make_network(name, **changes), None, make_config(name, **changes).acting, metadata=metadata)

    return make


def demonstration_of(pair: tuple[np.ndarray, np.ndarray], task: str = "push-v3") -> Trajectory:
    return Trajectory(*pair, np.arange(len(pair[0]), dtype=np.float32), task)


@NAMED
def test_everything_that_is_learned_changes(name: str, make_method: Any, make_batch: Any) -> None:
    method = make_method(name, lr=1e-3, lr_warmup=0, **DROPOUT[name])
    policy = method.policy
    with torch.no_grad():  # the adapters' product is 0 at first
        for key, parameter in policy.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    before = {key: parameter.detach().clone() for key, parameter in policy.named_parameters()}
    metrics = method.update(make_batch(6, 2, H=policy.window.horizon, before=policy.window.before), 0)
    assert all(torch.isfinite(value) for value in metrics.values())
    still = {key for key, parameter in policy.named_parameters() if torch.equal(parameter, before[key])}
    assert still == {key for key, parameter in policy.named_parameters() if not parameter.requires_grad}
    assert bool(still) == (name == "lamo")
    for one, other in zip(method.ema_policy.parameters(), policy.parameters(), strict=True):
        assert torch.equal(one, other), "the EMA begins as a copy"


@torch.no_grad()
@pytest.mark.parametrize("name", ["dt", "lamo"])
@pytest.mark.parametrize("place", range(3 * K))
def test_an_action_depends_on_what_lies_before_it(name: str, place: int, make_network: Any, make_batch: Any) -> None:
    model, windows = make_network(name), make_batch(2, H=K).windows
    parts, clock = (windows.returns, windows.states, windows.actions), torch.arange(K).expand(2, -1)
    before = model(*parts, clock)
    step, kind = divmod(place, 3)
    parts[kind][:, step] += 3.0
    changed = (model(*parts, clock) - before).abs().amax((0, 2)) != 0
    # The action of a step depends on its own return and state, and on the actions before it.
    assert changed.tolist() == [later > step or (later == step and kind < 2) for later in range(K)]


@torch.no_grad()
@NAMED
def test_an_episode_does_not_depend_on_the_others(
    name: str, make_policy: Any, make_pairs: Any, rng: np.random.Generator
) -> None:
    """Subsets of episodes of two tasks in turn, each under its own demonstration: as when each acts by itself."""
    policy = make_policy(name)
    demonstrations = [demonstration_of(pair) for pair in make_pairs(4, 9)] if name in PROMPTED else [None, None]
    prompts = policy.encode_prompts([None, None], demonstrations)
    which, targets = np.array([0, 1, 1, 0]), rng.normal(size=4).astype(np.float32)
    together = policy.episodes(prompts, which, targets)
    own_prompts = [policy.encode_prompts([None], [demonstrations[n]]) for n in which]
    alone = [policy.episodes(encoded, targets=targets) for encoded in own_prompts]
    clock = np.zeros(4, np.int64)
    for _ in range(2 * K):
        who = rng.permutation(4)[: rng.integers(1, 5)]
        states, rewards = rng.normal(size=(len(who), S)).astype(np.float32), rng.normal(size=4).astype(np.float32)
        seeds = rng.integers(0, 2**62, len(who))
        found = together.act(who, clock[who], states, rewards[who], lambda rows, seeds=seeds: seeds[rows])
        for row, episode in enumerate(who):
            one = who[row : row + 1]
            own = alone[episode].act(
                one, clock[one], states[row : row + 1], rewards[one], lambda rows, seed=seeds[row]: seed + rows
            )
            np.testing.assert_allclose(found[row], own[0], rtol=1e-4, atol=1e-5)
        clock[who] += 1


@NAMED
def test_the_return_that_is_asked_for(name: str, make_policy: Any, make_pairs: Any) -> None:
    """The task's in training; else, where demonstrations are read, what this one earned; else the mean."""
    demonstration = demonstration_of(make_pairs(9)[0])
    policy = make_policy(name, {"target_returns": {"reach-v3": 3.0, "sweep-v3": 5.0}})
    found = policy.target_returns(["reach-v3", "push-v3"], [demonstration] * 2).tolist()
    assert found == [3.0, 36.0 if name in PROMPTED else 4.0]
    without_rewards = demonstration.observations, demonstration.actions
    assert policy.target_returns([None], [without_rewards]).tolist() == [4.0]
    with pytest.raises(InputError, match="no target return"):
        make_policy(name).target_returns([None], [without_rewards])


@NAMED
def test_inputs_that_do_not_fit_are_refused(name: str, make_policy: Any, make_pairs: Any) -> None:
    demonstration = demonstration_of(make_pairs(9)[0]) if name in PROMPTED else None
    policy = make_policy(name, {"target_returns": {"reach": 3.0}})
    if name in PROMPTED:
        with pytest.raises(InputError) as error:
            policy.prompt()
        assert error.value.field == "trajectory"
        if name == "prompt-dt":
            with pytest.raises(InputError, match="rewards"):
                policy.prompt(trajectory=make_pairs(9)[0])
        else:
            policy.prompt(trajectory=make_pairs(9)[0])
        make_policy(name, **{"network.trajectory_dropout": 0.2}).prompt(target_return=1.0).act(np.zeros(S))
    with pytest.raises(InputError, match="target_return"):
        policy.prompt(trajectory=demonstration, target_return=np.nan)
    policy.prompt(trajectory=demonstration)
    for wrong in (np.nan, [1.0, 2.0], "much"):
        with pytest.raises(InputError, match="reward"):
            policy.act(np.zeros(S), reward=wrong)
    prompts = policy.encode_prompts([None], [demonstration])
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="conditioned on history"):
        policy.network.sample(States(torch.zeros(1, S), None, one), prompts, policy.acting, one)
    with pytest.raises(InputError, match="trained without text"):
        policy.prompt(text="reach", trajectory=demonstration)


LEARNING: dict[str, tuple[int, dict[str, Any]]] = {
    "dt": (600, {"lr": 2e-3, "lr_warmup": 50, "network.sequence.longest": 8}),
    "mtdiff": (
        1000,
        {
            **{"lr": 3e-3, "lr_warmup": 50, "lr_final": 0.05, "ema_decay": 0.98, "ema_every": 1, "ema_start": 200},
            **{"network.trajectory.width": 64, "network.trajectory.inner": 128, "acting.steps": 4},
        },
    ),
    "lamo": (250, {"lr": 5e-3, "lm_lr": 5e-3, "lr_warmup": 30}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_asked_for_much_it_does_better_than_its_data(
    name: str, make_method: Any, make_network: Any, make_config: Any, world: Any, rng: np.random.Generator
) -> None:
    """For MTDiff half of the episodes go straight to their goal, half anywhere: the return says which."""
    good = rng.random(400)[:, None] < 0.5

    def mixed(state: np.ndarray, step: int) -> np.ndarray:
        return np.where(good, world.best(state), world.anyhow(state))

    behaviour, parts = world.episodes(mixed if name == "mtdiff" else world.behave, 400)
    records = [EpisodeRecord([*s, s[-1]], list(a), r, "point", success=-1) for s, a, r, *_ in zip(*parts, strict=True)]
    data = join_episodes(records, goal_visible=None, source="made up")
    iterations, changes = LEARNING[name]
    changes = {"network.action_bound": 1.0, **changes}
    if name != "mtdiff":
        changes["network.sequence.context"] = world.STEPS
    network = make_network(name, **changes)
    network.fit(torch.from_numpy(data.observations), lambda: torch.from_numpy(data.returns_to_go()))
    method, window = make_method(name, iterations, network, **changes), network.window
    encoder = network.reads.encoder if name == "mtdiff" else None
    sampler = BatchSampler(
        data, None, encoder, 64, 2, 0, torch.device("cpu"), horizon=window.horizon, before=window.before
    )
    for iteration in range(iterations):
        metrics = method.update(sampler.next(), iteration)
    returns = data.returns()
    policy = Policy(name, method.acting_network, None, method.config.acting)
    best = data.episode(int(returns.argmax())) if name == "mtdiff" else None
    policy.prompt(trajectory=best, target_return=float(np.quantile(returns, 0.9)))
    world.check(policy, behaviour, 0.2)
    if name == "lamo":
        assert float(metrics["loss/language"]) < 1.0, "text is still predicted: of 13 words any would be worth 2.6"
