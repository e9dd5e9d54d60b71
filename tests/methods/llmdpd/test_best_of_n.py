"""Best of N: the choice among N sampled actions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, philox_normal, reverse_diffusion
from llmdpd.errors import InputError
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, sample_actions
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import Condition
from llmdpd.nn.critic import DoubleQ
from llmdpd.ops.acting import FrozenActor
from llmdpd.ops.packing import ContextParts, bind_sampler, pack_critic, pack_net, pack_prompts

S, A, Z = 5, 3, 4
NETWORK = DiffusionNetworkConfig(hidden_dim=16, time_dim=8)


class Case:
    def __init__(self, rng: np.random.Generator, B: int = 6, shared: bool = False) -> None:
        torch.manual_seed(int(rng.integers(2**31)))
        self.net = NoiseMLP(S, A, Z, 16, 8)
        self.critic = DoubleQ(S, A, Z, 16)
        for parameter in self.critic.parameters():
            parameter.data *= 3  # so that the choices differ in value
        self.condition = Condition(torch.randn(B, S), torch.randn(Z) if shared else torch.randn(B, Z))
        self.seeds = torch.from_numpy(rng.integers(0, 2**63 - 1, B))

    def sample(self, critic: DoubleQ | None, rows: Any = slice(None), **acting: Any) -> Tensor:
        config = BestOfN(**acting)
        prompt = self.condition.prompt
        condition = Condition(self.condition.state[rows], prompt if prompt.ndim == 1 else prompt[rows])
        return sample_actions(self.net, critic, condition, config.coefficients(NETWORK), config, self.seeds[rows])

    def act(self, critic: DoubleQ | None, acting: BestOfN) -> Tensor:
        """As `sample`, in C++: the context is one that gives states and prompts as they are."""
        bf16, B = acting.precision == "bf16", len(self.seeds)
        numbers = np.tile(np.array([[1, 0]], np.float32), (S, 1))
        kinds = np.array([(0, column, 0, -1, -1) for column in range(S)], np.int32)
        state, prompt = self.condition
        shared = prompt.ndim == 1
        pooled = prompt[None] if shared else prompt
        prompts = pack_prompts(ContextParts(S, A, [], (kinds, numbers), (kinds[:0], numbers[:0]), pooled))
        sampler = bind_sampler(pack_net(self.net, bf16), self.net.time_mlp, acting.coefficients(NETWORK))
        critics = None if critic is None else tuple(pack_critic(q, S, A, bf16) for q in (critic.q1, critic.q2))
        temperature = acting.temperature if acting.selection == "soft" else None
        actor = FrozenActor(prompts, sampler, A, critics, acting.samples, temperature)  # type: ignore[arg-type]
        index = None if shared else np.arange(B)
        return torch.from_numpy(actor.act(state.numpy(), np.zeros(B, np.int64), index, self.seeds.numpy()))

    @torch.no_grad()
    def candidates(self, N: int) -> tuple[Tensor, Tensor]:
        """The N actions of each state, and min Q of each."""
        state, prompt = self.condition
        actions = reverse_diffusion(
            self.net, state, prompt, BestOfN().coefficients(NETWORK), N, seed=self.seeds, backend="reference"
        )
        values = torch.stack(
            [self.critic.minimum(state, actions[:, n], prompt.expand(len(state), -1)) for n in range(N)], 1
        )
        return actions, values


@pytest.fixture
def case(rng: np.random.Generator) -> Case:
    return Case(rng)


def test_one_sample_needs_no_critic(case: Case) -> None:
    expected = reverse_diffusion(case.net, *case.condition, BestOfN().coefficients(NETWORK), seed=case.seeds).detach()
    torch.testing.assert_close(case.sample(None, samples=1), expected, atol=1e-5, rtol=0)


def test_several_samples_do(case: Case) -> None:
    with pytest.raises(InputError, match="no critic") as error:
        case.sample(None, samples=7)
    assert error.value.field == "acting.samples"
    assert error.value.found == 7


@pytest.mark.parametrize("shared", [True, False])
def test_max_takes_the_best_of_the_minimum(rng: np.random.Generator, shared: bool) -> None:
    case = Case(rng, shared=shared)
    actions, values = case.candidates(20)
    expected = actions[torch.arange(6), values.argmax(1)]
    torch.testing.assert_close(case.sample(case.critic, samples=20, selection="max"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_soft_choice_is_distributed_as_the_softmax(rng: np.random.Generator, temperature: float) -> None:
    """Pearson's chi-square of which of N = 5 was taken, against each state's own softmax, over many seeds."""
    N, B = 5, 6000
    case = Case(rng, B=B)
    case.condition = Condition(case.condition.state[:1].expand(B, S), case.condition.prompt[:1].expand(B, Z))
    actions, values = case.candidates(N)
    taken = case.sample(case.critic, samples=N, temperature=temperature)
    distance = (actions - taken[:, None]).abs().amax(-1)
    assert float(distance.amin(1).max()) < 1e-5  # it is one of the N
    probability = (values.double() / temperature).softmax(1)
    # Samples are exchangeable, so their order tells nothing: sort by value, best last.
    order = values.argsort(1)
    rank = order.argsort(1).gather(1, distance.argmin(1, keepdim=True))[:, 0]
    observed = torch.bincount(rank, minlength=N).double()
    expected = probability.gather(1, order).sum(0)
    spread = probability.gather(1, order)
    variance = (spread * (1 - spread)).sum(0)
    assert bool(((observed - expected).abs() < 6 * variance.sqrt()).all()), (observed, expected)
    uniform = torch.full((N,), B / N, dtype=torch.float64)
    assert bool(((expected - uniform).abs() > 6 * variance.sqrt()).any())  # the test could tell it from no choice


def test_cold_is_max_and_hot_is_not(case: Case) -> None:
    best = case.sample(case.critic, samples=30, selection="max")
    torch.testing.assert_close(case.sample(case.critic, samples=30, temperature=1e-9), best, rtol=0, atol=1e-6)
    assert not torch.allclose(case.sample(case.critic, samples=30, temperature=1e9), best, atol=1e-3)


def test_the_choice_is_independent_of_the_draws(rng: np.random.Generator) -> None:
    """The uniform number that chooses comes from no draw of the chain: hot, each of the N is equally often taken."""
    N, B = 4, 4000
    case = Case(rng, B=B)
    actions, _ = case.candidates(N)
    taken = case.sample(case.critic, samples=N, temperature=1e9)
    choice = (actions - taken[:, None]).abs().amax(-1).argmin(1)
    counts = torch.bincount(choice, minlength=N)
    assert float((counts - B / N).abs().max()) < 6 * (B * 3 / 16) ** 0.5
    draws = philox_normal(case.seeds, B, N, 6, A)
    for n in range(N):
        own = draws[:, choice == n]  # given what was chosen, every draw of every sample still has mean 0
        assert float(own.mean(1).abs().max()) < 6 / own.shape[1] ** 0.5


@pytest.mark.parametrize("acting", [{"samples": 1}, {"samples": 9}, {"samples": 9, "selection": "max"}])
def test_an_action_does_not_depend_on_its_batch(rng: np.random.Generator, acting: dict[str, Any]) -> None:
    case = Case(rng, B=12)
    whole = case.sample(case.critic, **acting)
    order = torch.from_numpy(rng.permutation(12))
    torch.testing.assert_close(case.sample(case.critic, order, **acting), whole[order], rtol=0, atol=1e-5)
    for row in (0, 7):
        alone = case.sample(case.critic, slice(row, row + 1), **acting)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sees_prompts", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("selection", ["soft", "max"])
def test_the_actor_in_cpp_is_the_one_in_torch(
    rng: np.random.Generator, selection: Any, shared: bool, sees_prompts: bool
) -> None:
    case = Case(rng, 40, shared)
    critic = case.critic if sees_prompts else DoubleQ(S, A, 0, 24)
    for samples, temperature in ((7, 1.0), (50, 0.3), (2, 5.0)):
        config = BestOfN(samples=samples, selection=selection, temperature=temperature)
        found, expected = case.act(critic, config), case.sample(critic, **asdict(config))
        # Two draws may be worth the same to within rounding, or a draw lie on a step of the running sum.
        different = ((found - expected).abs().amax(1) > 1e-5).sum()
        assert different <= 1


def test_what_does_not_fit_never_reaches_cpp(case: Case) -> None:
    config = BestOfN()
    coefficients = config.coefficients(NETWORK)
    state, prompt = case.condition
    for field, condition, seeds in (
        ("state", Condition(state[:, 1:], prompt), case.seeds),
        ("prompt", Condition(state, prompt[:, 1:]), case.seeds),
        ("seed", Condition(state, prompt), case.seeds[1:]),
        ("seed", Condition(state, prompt), case.seeds.int()),
    ):
        with pytest.raises(InputError) as caught:
            sample_actions(case.net, case.critic, condition, coefficients, config, seeds)
        assert caught.value.field == field


def test_an_actor_in_bf16_takes_nearly_the_same(rng: np.random.Generator) -> None:
    case = Case(rng, 60)
    exact, rounded = (case.sample(None, samples=1, precision=precision) for precision in ("fp32", "bf16"))
    assert not torch.equal(exact, rounded)
    assert float((exact - rounded).norm() / exact.norm()) <= 2e-2
    best = [case.sample(case.critic, samples=20, selection="max", precision=p) for p in ("fp32", "bf16")]
    assert float(((best[0] - best[1]).abs().amax(1) < 0.05).float().mean()) > 0.8


def test_empty_batch(rng: np.random.Generator) -> None:
    case = Case(rng, B=0)
    for acting in ({"samples": 1}, {"samples": 5}, {"samples": 5, "selection": "max"}):
        assert case.sample(case.critic, **acting).shape == (0, A)


def test_no_noise_is_the_same_for_every_seed(case: Case) -> None:
    first = case.sample(None, samples=1, noise_scale=0.0)
    case.seeds = case.seeds + 1
    assert torch.equal(case.sample(None, samples=1, noise_scale=0.0), first)
    assert not torch.equal(case.sample(None, samples=1), first)
