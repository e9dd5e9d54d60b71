"""The peers compute what they stand for: Diffusion-QL's loop is our chain, its iteration's losses are our losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import peers
import pytest
import torch
from counting import Sizes
from peers import Acting, Compiler, Critic, Diffusion, Model, Trainer, compiled_sample, noise_mlp
from torch import Tensor, nn
from workloads import diffusion_ql

from llmdpd.diffusion import NoiseMLP, reverse_diffusion, sampler_coefficients
from llmdpd.errors import InputError
from llmdpd.methods.llmdpd import method as method_module

CPU = torch.device("cpu")
SIZES = Sizes(state=5, action=3, prompt=4, hidden=16)


def replay(noise: Tensor) -> Callable[..., Tensor]:
    """`randn` that gives noise [draws, B, A] one draw after the other."""
    draws = iter(noise)

    def randn(shape: tuple[int, int], device: torch.device) -> Tensor:
        draw = next(draws)
        assert tuple(draw.shape) == shape
        return draw

    return randn


@pytest.mark.parametrize("prefix", ["", "model.", "actor.model."])
def test_weights_of_the_public_code(rng: np.random.Generator, prefix: str) -> None:
    theirs = Model(9 + 4, 3, hidden=21, time_dim=8)
    weights = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    weights |= {"betas": torch.rand(5)}  # the public Diffusion module keeps its schedule beside
    net = noise_mlp(weights, state_dim=9, action_dim=3, prompt_dim=4)
    assert (net.hidden_dim, net.time_dim) == (21, 8)
    x, s, z = torch.randn(5, 3), torch.randn(5, 9), torch.randn(5, 4)
    t = torch.from_numpy(rng.integers(0, 5, 5))
    torch.testing.assert_close(net(x, t, s, z), theirs(x, t, torch.cat([s, z], 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lost", ["time_mlp.3.bias", "mid_layer.2.weight", "final_layer.weight"])
def test_missing_tensor_is_named(rng: np.random.Generator, lost: str) -> None:
    weights = Model(5, 2, hidden=16).state_dict()
    del weights[lost]
    with pytest.raises(InputError, match="no such tensor") as error:
        noise_mlp(weights, 5, 2, 0)
    assert error.value.field == lost


@pytest.mark.parametrize(
    ("sizes", "field"), [((5, 2, 1), "layers.0.weight"), ((6, 2, 0), "layers.0.weight"), ((4, 3, 0), "layers.3.weight")]
)
def test_wrong_sizes(rng: np.random.Generator, sizes: tuple[int, int, int], field: str) -> None:
    with pytest.raises(InputError, match="another size") as error:
        noise_mlp(Model(5, 2, hidden=16).state_dict(), *sizes)
    assert error.value.field == field


@pytest.mark.parametrize("K", [1, 5, 15, 20])
def test_the_eager_loop_is_our_chain(rng: np.random.Generator, double: None, K: int) -> None:
    B = 9
    actor = Diffusion(SIZES.state + SIZES.prompt, SIZES.action, SIZES.hidden, K)
    net = noise_mlp(actor.state_dict(), SIZES.state, SIZES.action, SIZES.prompt).double()
    state, prompt, noise = torch.randn(B, 5), torch.randn(4), torch.randn(K + 1, B, 3)
    condition = torch.cat([state, prompt.expand(B, -1)], dim=1)
    expected = reverse_diffusion(net, state, prompt, sampler_coefficients("ddpm", K), noise=noise, backend="reference")
    actor.randn = replay(noise)
    torch.testing.assert_close(actor.sample(condition), expected, rtol=1e-9, atol=1e-9)
    actor.randn = replay(noise)
    torch.testing.assert_close(
        compiled_sample(actor, Compiler(CPU, "eager"))(condition), expected, rtol=1e-9, atol=1e-9
    )


def same_networks(trainer: Trainer, learner: method_module.LLMDPD) -> None:
    """Give our learner the peer's weights."""
    for net, actor in ((learner.policy.net, trainer.actor), (learner.ema_policy.net, trainer.ema)):
        theirs = noise_mlp(actor.state_dict(), SIZES.state, SIZES.action, 0)
        net.load_state_dict(theirs.state_dict())
    for ours, critic in ((learner.critic, trainer.critic), (learner.target_critic, trainer.critic_target)):
        assert isinstance(ours, nn.Module)
        ours.load_state_dict(critic.state_dict())


@pytest.mark.parametrize("first", [True, False])
def test_the_iteration_has_our_losses_on_the_same_draws(
    rng: np.random.Generator, double: None, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    B, K = 8, 5
    trainer = Trainer(Sizes(SIZES.state, SIZES.action, 0, SIZES.hidden), CPU, K)
    with torch.no_grad():
        for parameter in (*trainer.ema.parameters(), *trainer.critic_target.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    training = diffusion_ql(SIZES, CPU, B, K)
    learner = training.learner
    same_networks(trainer, learner)
    for module in learner.modules.values():
        module.double()
    batch = training.batch
    draws = {"target": torch.randn(K + 1, B, 3), "actor": torch.randn(K + 1, B, 3)}
    trainer.ema.randn, trainer.actor.randn = replay(draws["target"]), replay(draws["actor"])
    order = iter(draws.values())

    def with_noise(net: NoiseMLP, state: Tensor, prompt: Tensor, plan: Any, noise: None, precision: str) -> Tensor:
        assert (noise, precision) == (None, "fp32")
        return reverse_diffusion(net, state, prompt, plan, noise=next(order), backend="reference")

    monkeypatch.setattr(method_module, "reverse_diffusion", with_noise)
    objective = learner.critic.objective

    def of_one(state: Tensor, actions: Tensor, prompt: Tensor, drawn: bool, precision: str) -> tuple[Tensor, Tensor]:
        return objective(state, actions, prompt, first, precision)

    monkeypatch.setattr(learner.critic, "objective", of_one)
    seed = int(rng.integers(2**31))
    torch.manual_seed(seed)  # time indices and noise of the diffusion loss
    ours = learner.update(batch, training.iteration)
    torch.manual_seed(seed)
    theirs = trainer.train_step(
        batch.observations,
        batch.actions,
        batch.next_observations,
        batch.rewards[:, None],
        1 - batch.terminals[:, None],
        first,
    )
    # The batch is float64 here; the critics have moved by Adam's first step before the actor's loss is taken. The peer
    # bounds gradient norms, at this size far above any; ours does not.
    assert theirs["critic"] == pytest.approx(float(ours["loss/critic"]), rel=1e-6)
    assert theirs["cloning"] == pytest.approx(float(ours["loss/diffusion"]), rel=1e-6)
    assert theirs["actor"] == pytest.approx(float(ours["loss/actor"]), rel=1e-5)
    expected = noise_mlp(trainer.actor.state_dict(), SIZES.state, SIZES.action, 0)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(learner.policy.net.state_dict()[name], value.double(), rtol=1e-4, atol=1e-5)


def some_batch(B: int = 6) -> tuple[Tensor, ...]:
    return torch.randn(B, 5), torch.rand(B, 3) * 2 - 1, torch.randn(B, 5), torch.randn(B, 1), torch.ones(B, 1)


def test_averages_move_as_the_peer_moves_them(rng: np.random.Generator) -> None:
    trainer = Trainer(Sizes(5, 3, 0, 16), CPU, 2)
    for step in range(trainer.EMA_START, trainer.EMA_START + 6):
        ema, target = (copy.deepcopy(list(m.parameters())) for m in (trainer.ema, trainer.critic_target))
        trainer.train_step(*some_batch())
        for old, new, now in zip(target, trainer.critic.parameters(), trainer.critic_target.parameters(), strict=True):
            torch.testing.assert_close(now, 0.995 * old + 0.005 * new)
        for old, new, now in zip(ema, trainer.actor.parameters(), trainer.ema.parameters(), strict=True):
            torch.testing.assert_close(now, 0.995 * old + 0.005 * new if step % 5 == 0 else old)


def test_the_compiled_iteration_is_the_eager_one(rng: np.random.Generator) -> None:
    sizes = Sizes(5, 3, 0, 16)
    eager = Trainer(sizes, CPU, 2)
    compiled = Trainer(sizes, CPU, 2, Compiler(CPU, "eager"))
    for name in ("actor", "ema", "critic", "critic_target"):
        getattr(compiled, name).load_state_dict(getattr(eager, name).state_dict())
    batches = [some_batch() for _ in range(3)]
    seed = int(rng.integers(2**31))
    losses = []
    for trainer in (eager, compiled):
        torch.manual_seed(seed)
        losses.append([trainer.train_step(*batch, index % 2 == 0) for index, batch in enumerate(batches)])
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("shape", [(5,), (4, 5)])
def test_acting_takes_one_of_the_draws_by_what_the_critics_say(
    rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    acting = Acting(SIZES, CPU, 2, 50, None, False)
    with torch.no_grad():
        for network in (acting.critic.q1, acting.critic.q2):
            network[-1].weight.mul_(1e6)  # so sharp that the softmax takes the best
    drawn: list[Tensor] = []
    sample = acting.actor.sample
    acting.actor.sample = lambda condition: drawn.append(sample(condition)) or drawn[-1]  # type: ignore[method-assign, func-returns-value]
    observation = rng.normal(size=shape).astype(np.float32)
    action = acting.act(observation)
    states = torch.from_numpy(observation).reshape(-1, 5)
    assert action.shape == (*shape[:-1], 3)
    actions = drawn[0].reshape(len(states), 50, 3)
    for state, choices, taken in zip(states, actions, action.reshape(-1, 3), strict=True):
        value = torch.min(*acting.critic(state.expand(50, -1), choices))[:, 0]
        np.testing.assert_array_equal(taken, choices[value.argmax()].detach().numpy())


def test_critic_is_ours(rng: np.random.Generator) -> None:
    critic = Critic(5, 3, 16)
    ours = method_module.DoubleQ(5, 3, 0, 16)
    ours.load_state_dict(critic.state_dict())
    state, action = torch.randn(7, 5), torch.randn(7, 3)
    for one, other in zip(critic(state, action), ours(state, action, state[:, :0]), strict=True):
        torch.testing.assert_close(one[:, 0], other)


def test_a_long_chain_is_compiled_by_its_step() -> None:
    """Unrolled, a hundred steps take minutes to compile."""
    seen: list[str] = []

    class Spy(Compiler):
        def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
            seen.append(function.__name__)
            return function

    for K in (peers.WHOLE_CHAIN, peers.WHOLE_CHAIN + 1):
        compiled_sample(Diffusion(5, 3, 16, K), Spy(CPU))(torch.randn(2, 5))
    assert seen == ["sample", "denoise"]
