"""Decision Transformers: the loss, what an action may hang on, prompts, acting as in training, and that they learn."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import policy_act
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.decision_transformer.method import DecisionTransformerConfig, SequenceCloning
from llmdpd.methods.decision_transformer.network import DecisionTransformer, PromptDecisionTransformer
from llmdpd.nn.context import ALL_KEPT, ContextConfig, EncodedPrompts, Keep
from llmdpd.nn.episode_memory import EpisodeMemory
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.nn.sequence_model import SequenceConfig
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.simulation.rollout import EpisodeRequest
from llmdpd.training.batches import moved

S, A, K = 4, 2, 5
ENCODER = TrajectoryEncoderConfig(steps=6)
SIZES = SequenceConfig(context=K, layers=2, heads=2, width=16, dropout=0.0, longest=40)
ACTING = ActingConfig(samples=1, noise_scale=0.0)


def network(prompted: bool = False, bound: float = 1.5, **sizes: Any) -> DecisionTransformer:
    context = ContextConfig(text=False, trajectory=prompted, encoder=ENCODER)
    config = PolicyConfig(action_bound=bound, context=context, sequence=dataclasses.replace(SIZES, **sizes))
    kind = PromptDecisionTransformer if prompted else DecisionTransformer
    made = kind(S, A, 0, config)
    made.fit(torch.randn(60, S) * 2 + 1)
    made.fit_returns(torch.tensor([1.0, -30.0, 7.0]))
    return made.eval()


def parts_of(count: int, steps: int) -> tuple[torch.Tensor, ...]:
    """Returns, states, actions, clock of windows."""
    return (
        20 * torch.randn(count, steps),
        torch.randn(count, steps, S),
        torch.rand(count, steps, A),
        torch.arange(steps).expand(count, -1),
    )


def batch_of(count: int = 6, prompts: int = 2, rng: np.random.Generator | None = None) -> PromptedBatch:
    """Windows of K steps, ending after 1 to K; with `rng` under examples."""
    returns, states, actions, _ = parts_of(count, K)
    mask = torch.arange(K) < (torch.arange(count) % K + 1)[:, None]
    tokens = None
    if rng is not None:
        pairs = [
            (rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)) for n in (4, 9)
        ]
        tokens = make_tokens(pairs[:prompts], ENCODER, rewards=[rng.normal(size=len(p[0])) for p in pairs[:prompts]])
    return PromptedBatch(
        observations=states[:, 0],
        actions=actions[:, 0],
        rewards=torch.randn(count),
        next_observations=states[:, 1],
        terminals=torch.zeros(count),
        expert_actions=None,
        timesteps=torch.randint(0, 60, (count,)),
        text=None,
        tokens=tokens,
        windows=StepWindows(states, actions, None, mask, returns),
    )


@pytest.mark.usefixtures("rng")
def test_the_loss_is_the_mean_square_over_what_is_real() -> None:
    model, batch = network(), batch_of()
    torch.nn.init.zeros_(model.head.weight)
    agent = SequenceCloning(model, DecisionTransformerConfig(), 10)
    assert batch.windows is not None
    answer = 1.5 * np.tanh(model.head.bias.detach().double().numpy())
    actions, mask = batch.windows.actions.double().numpy(), batch.windows.mask.numpy()
    expected = ((actions - answer) ** 2)[mask].mean()
    assert float(agent.loss(batch).detach()) == pytest.approx(expected, rel=1e-5)
    behind = dataclasses.replace(
        batch.windows, actions=torch.where(batch.windows.mask[..., None], batch.windows.actions, 9.0)
    )
    torch.testing.assert_close(agent.loss(dataclasses.replace(batch, windows=behind)), agent.loss(batch))


@torch.no_grad()
@pytest.mark.parametrize("place", range(3 * K))
@pytest.mark.usefixtures("rng")
def test_an_action_hangs_on_what_lies_before_it(place: int) -> None:
    model = network()
    returns, states, actions, clock = parts_of(2, K)
    before = model(returns, states, actions, clock)
    step, kind = divmod(place, 3)
    (returns, states, actions)[kind][:, step] += 3.0
    changed = (model(returns, states, actions, clock) - before).abs().amax((0, 2)) != 0
    # Returns and states tell of the action of their own step, actions of those after.
    assert changed.tolist() == [later > step or (later == step and kind < 2) for later in range(K)]


@torch.no_grad()
@pytest.mark.usefixtures("rng")
def test_returns_are_scaled_and_time_is_seen() -> None:
    model = network()
    assert float(model.return_scale) == 30.0
    returns, states, actions, clock = parts_of(2, K)
    found = model(returns, states, actions, clock)
    assert not torch.allclose(model(returns, states, actions, clock + 3), found, atol=1e-5)
    # Past the last embedded time step they all are the last one.
    late = [model(returns, states, actions, torch.full_like(clock, at)) for at in (39, 40, 1000)]
    assert torch.equal(late[0], late[1])
    assert torch.equal(late[0], late[2])


@torch.no_grad()
def test_examples_are_read_whole_and_alone(rng: np.random.Generator) -> None:
    model = network(prompted=True)
    pairs = [(rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)) for n in (3, 6)]
    rewards = [rng.normal(size=len(states)).astype(np.float32) for states, _ in pairs]

    def encode(which: list[int], keep: Keep = ALL_KEPT) -> EncodedPrompts:
        tokens = make_tokens([pairs[n] for n in which], ENCODER, rewards=[rewards[n] for n in which])
        return model.encode(None, tokens, keep)

    parts = parts_of(4, K)
    both = model(*parts, encode([0, 1]))
    index = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(model(*parts, encode([0, 1]), index), both)
    for number in (0, 1):
        own = index == number
        alone = model(*(part[own] for part in parts), encode([number]))
        torch.testing.assert_close(alone, both[own], rtol=1e-4, atol=1e-5)
    for part in (pairs[0][0], pairs[0][1], rewards[0]):
        part[-1] += 5.0
        changed = model(*parts, encode([0, 1]))
        part[-1] -= 5.0
        assert not torch.equal(changed[:2], both[:2])
        torch.testing.assert_close(changed[2:], both[2:])
    # It is not taken for the episode's own past.
    states, actions = (torch.from_numpy(part)[None] for part in pairs[1])
    earned = torch.from_numpy(rewards[1][::-1].cumsum()[::-1].copy())[None]
    own_past = (earned, states, actions, torch.arange(6)[None])
    joined = model(*(torch.cat([past, now[:1]], 1) for past, now in zip(own_past, parts, strict=True)))[:, 6:]
    assert not torch.allclose(joined, model(*(part[:1] for part in parts), encode([1])), atol=1e-6)
    # An example that is left out is as if there were none.
    dropped = model(*parts, encode([0, 1], Keep(trajectory=torch.tensor([[0.0], [1.0]]))))
    torch.testing.assert_close(dropped[:2], model(*parts)[:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_acts_as_it_was_trained(rng: np.random.Generator) -> None:
    """Step by step with its memory, what one look at the whole window says."""
    model = network()
    facts = {"target_returns": {"reach": 11.0, "push": 19.0}}
    policy = Policy(model, None, ACTING, facts=facts)
    assert policy.target_returns(["push", "reach", "other"], [None] * 3).tolist() == [19.0, 11.0, 15.0]
    policy.prompt(target_return=12.0)
    states = rng.normal(size=(K + 3, 2, S)).astype(np.float32)
    rewards = rng.normal(size=(K + 3, 2)).astype(np.float32)
    done, asked = np.zeros((K + 3, 2, A), np.float32), np.full((K + 3, 2), 12.0, np.float32)
    for step in range(K + 3):
        if step:
            asked[step] = asked[step - 1] - rewards[step - 1]
        returned = policy.act(states[step], reward=rewards[step - 1] if step else None)
        done[step] = returned
        returned *= 100  # what was returned is the caller's
        seen = slice(max(step - K + 1, 0), step + 1)
        window = (torch.from_numpy(part[seen]).transpose(0, 1) for part in (asked, states, done))
        clock = torch.arange(step + 1)[seen].expand(2, -1)
        expected = model(*window, clock)[:, -1]
        np.testing.assert_allclose(done[step], expected.numpy(), rtol=1e-4, atol=1e-5)
    policy.reset()
    np.testing.assert_allclose(policy.act(states[0]), done[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(rng: np.random.Generator) -> None:
    policy = Policy(network(prompted=True), None, ACTING)
    pair = (rng.normal(size=(9, S)), rng.normal(size=(9, A)))
    with pytest.raises(InputError, match="example with rewards"):
        policy.prompt(trajectory=pair)
    with pytest.raises(InputError, match="no example"):
        policy.prompt()
    known = {"target_returns": {"reach": 3.0}}
    with pytest.raises(InputError, match="no return to ask for"):
        Policy(network(), None, ACTING).prompt()
    with pytest.raises(InputError, match="target_return"):
        Policy(network(), None, ACTING, facts=known).prompt(target_return=np.nan)
    plain = Policy(network(), None, ACTING, facts=known).prompt()
    for wrong in (np.nan, [1.0, 2.0], "much"):
        with pytest.raises(InputError, match="reward"):
            plain.act(np.zeros(S), reward=wrong)
    with pytest.raises(ValueError, match="looks back"):
        plain.act_many(np.zeros((1, S), np.float32), plain.encode_prompts([None], [None]), None, *np.zeros((2, 1), int))
    with pytest.raises(InputError, match=r"acting\.samples"):
        plain.with_acting(samples=2)
    for context, told in (
        (ContextConfig(text=True, trajectory=False), "text"),
        (ContextConfig(text=False), "dt none"),
        (ContextConfig("retrieval", text=False, trajectory=False), "pooled"),
    ):
        with pytest.raises(InputError, match=told):
            DecisionTransformer(S, A, 3, PolicyConfig(context=context))


def test_an_example_is_asked_for_what_it_has_earned(rng: np.random.Generator) -> None:
    arrays = rng.normal(size=(9, S)).astype(np.float32), rng.normal(size=(9, A)).astype(np.float32)
    example = Trajectory(*arrays, np.arange(9, dtype=np.float32), "push-v3")
    facts = {"target_returns": {"reach-v3": 3.0, "sweep-v3": 5.0}}
    reading, plain = (Policy(network(prompted), None, ACTING, facts=facts) for prompted in (True, False))
    tasks = ["reach-v3", "push-v3"]
    assert reading.target_returns(tasks, [example] * 2).tolist() == [3.0, 36.0]
    assert plain.target_returns(tasks, [example] * 2).tolist() == [3.0, 4.0]


@torch.no_grad()
def test_an_evaluation_asks_and_remembers_by_episode(rng: np.random.Generator) -> None:
    """Subsets of episodes in turn, of two tasks under their examples: what the model says of each by itself."""
    model, tasks = network(prompted=True), ("reach-v3", "push-v3")
    prompts = {}
    for task in tasks:
        arrays = rng.normal(size=(9, S)).astype(np.float32), rng.normal(size=(9, A)).astype(np.float32)
        example = Trajectory(*arrays, rng.normal(size=9).astype(np.float32), task)
        prompts[task] = TaskPrompt(None, "none", (example,), "made up")
    policy = Policy(model, None, ACTING, facts={"target_returns": {"push-v3": 7.0}})
    requests = [EpisodeRequest(task, seed) for task in tasks for seed in (1, 2)]
    act = policy_act(policy, prompts, requests)
    encoded = policy.encode_prompts([None] * 2, [prompts[task].demonstration for task in tasks])
    first = prompts["reach-v3"].demonstration
    assert first is not None
    asked = [[float(first.rewards.sum())]] * 2 + [[7.0]] * 2
    states: list[list[np.ndarray]] = [[] for _ in requests]
    actions: list[list[np.ndarray]] = [[] for _ in requests]
    for _ in range(2 * K):
        who = rng.permutation(4)[: rng.integers(1, 5)]
        now, rewards = rng.normal(size=(len(who), S)).astype(np.float32), rng.normal(size=len(who)).astype(np.float32)
        steps = np.array([len(states[episode]) for episode in who])
        done = np.asarray(act(now, who, steps, rewards * (steps > 0)))
        for row, episode in enumerate(who.tolist()):
            if steps[row]:
                asked[episode] = [*asked[episode], asked[episode][-1] - float(rewards[row])]
            states[episode].append(now[row])
            window = [np.stack(part[-K:]) for part in (asked[episode], states[episode])]
            past = np.stack([*actions[episode][-K + 1 :], np.zeros(A)]).astype(np.float32)[-len(window[1]) :]
            clock = torch.arange(len(states[episode]))[-K:][None]
            parts = [torch.from_numpy(part).float()[None] for part in (*window, past)]
            expected = model(*parts, clock, encoded, torch.tensor([episode // 2]))[0, -1]
            np.testing.assert_allclose(done[row], expected.numpy(), rtol=1e-4, atol=1e-5)
            actions[episode].append(done[row])


def test_under_examples_everything_learns(rng: np.random.Generator) -> None:
    model = network(prompted=True, dropout=0.3)
    agent = SequenceCloning(model, DecisionTransformerConfig(lr=1e-3, lr_warmup=0), 10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    metrics = agent.update(batch_of(rng=rng), 0)
    assert all(torch.isfinite(value) for value in metrics.values())
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    for one, other in zip(agent.ema_policy.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), "what acts is what was trained"


@pytest.mark.slow
def test_asked_for_much_it_does_better_than_its_data(world: Any, rng: np.random.Generator) -> None:
    behaviour, steps = world.episodes(lambda state, _: world.behave(state), 400)
    states, actions, rewards = (np.stack([step[n] for step in steps], 1).astype(np.float32) for n in range(3))
    to_go = np.cumsum(rewards[:, ::-1], 1)[:, ::-1].copy()
    model = network(bound=1.0, context=world.STEPS, longest=world.STEPS)
    model.fit(torch.from_numpy(states.reshape(-1, S)))
    model.fit_returns(torch.from_numpy(to_go.reshape(-1)))
    agent = SequenceCloning(model.train(), DecisionTransformerConfig(lr=2e-3, lr_warmup=50), 600)
    mask = torch.ones(64, world.STEPS, dtype=torch.bool)
    for iteration in range(600):
        rows = rng.integers(0, len(states), 64)
        windows = StepWindows(
            *map(torch.from_numpy, (states[rows], actions[rows])), None, mask, torch.from_numpy(to_go[rows])
        )
        agent.update(dataclasses.replace(batch_of(64), timesteps=torch.zeros(64).long(), windows=windows), iteration)

    policy = Policy(agent.ema_policy, None, ACTING).prompt(target_return=float(np.quantile(to_go[:, 0], 0.9)))

    learned, _ = world.episodes(world.told(policy), 300)
    best, _ = world.episodes(lambda state, _: world.right(state), 300)
    print("behaviour, learned, best:", behaviour, learned, best)
    assert learned > behaviour + 0.2 * (best - behaviour)


@pytest.mark.slow
@pytest.mark.usefixtures("rng")
def test_it_does_what_it_is_asked_for() -> None:
    """One step, in which an action earns its first number: who asks for 0.6 gets an action of 0.6."""
    model = network(bound=1.0, context=1, layers=1)
    model.fit_returns(torch.ones(1))
    agent = SequenceCloning(model.train(), DecisionTransformerConfig(lr=1e-2, lr_warmup=20, lr_final=0.1), 300)
    for iteration in range(300):
        states, actions = torch.randn(64, 1, S), torch.rand(64, 1, A) * 2 - 1
        windows = StepWindows(states, actions, None, torch.ones(64, 1, dtype=torch.bool), actions[..., 0])
        agent.update(dataclasses.replace(batch_of(64), timesteps=torch.zeros(64).long(), windows=windows), iteration)
    policy = Policy(agent.ema_policy, None, ACTING)
    for asked in (-0.6, 0.0, 0.6):
        done = policy.prompt(target_return=asked).act(torch.randn(50, S).numpy())
        assert np.abs(done[:, 0] - asked).mean() < 0.15
        assert np.abs(done[:, 1]).mean() < 0.3, "nothing is said of the second"


def test_memory_keeps_each_episodes_own_last_steps(rng: np.random.Generator) -> None:
    memory = EpisodeMemory(3, A)
    past: dict[int, list[tuple[np.ndarray, np.ndarray, float, int]]] = {}
    asked: dict[int, float] = {}
    clock = dict.fromkeys(range(5), 0)
    for _ in range(60):
        who = rng.permutation(5)[: rng.integers(1, 6)]
        for episode in who:
            if rng.random() < 0.15:
                clock[int(episode)] = int(rng.integers(0, 2)) * 50  # it begins anew, or its clock was set
        steps = np.array([clock[int(episode)] for episode in who])
        states, actions = (
            rng.normal(size=(len(who), S)).astype(np.float32),
            rng.normal(size=(len(who), A)).astype(np.float32),
        )
        rewards, targets = rng.normal(size=len(who)).astype(np.float32), rng.normal(size=len(who)).astype(np.float32)
        history = memory.recall(who, steps, states, rewards, targets)
        memory.note(who, actions)
        for row, episode in enumerate(who.tolist()):
            known = past.get(episode, [])
            if not known or known[-1][3] + 1 != steps[row]:
                known, asked[episode] = [], float(targets[row])
            else:
                asked[episode] -= float(rewards[row])
            seen = [*known, (states[row], np.zeros(A), asked[episode], int(steps[row]))][-3:]
            length = int(history.lengths[row])
            assert length == len(seen)
            for part, column in ((history.states, 0), (history.actions, 1), (history.returns, 2), (history.clock, 3)):
                np.testing.assert_allclose(
                    part[row, :length], np.stack([one[column] for one in seen]), rtol=0, atol=1e-4
                )
                assert not part[row, length:].any()
            past[episode] = [*known, (states[row], actions[row], asked[episode], int(steps[row]))]
            clock[episode] = int(steps[row]) + 1
    memory.reset()
    assert memory.recall(who, steps + 1, states, rewards, targets).lengths.tolist() == [1] * len(who)


@pytest.mark.parametrize("prompted", [False, True])
def test_the_loss_reads_nothing_back_from_the_device(rng: np.random.Generator, prompted: bool) -> None:
    """On `meta`, a device whose values can't be had; so that a CUDA graph can hold it."""
    model = network(prompted, dropout=0.1).train()
    agent = SequenceCloning(model, DecisionTransformerConfig(), 10)
    model.to("meta")
    batch = moved(batch_of(rng=rng if prompted else None), torch.device("meta"))
    keep = Keep(trajectory=torch.ones(2, 1, device="meta"))
    agent.loss(dataclasses.replace(batch, keep=keep)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
