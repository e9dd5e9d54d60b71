"""MTDiff-p: the loss by hand, what a plan depends on, and acting as in training with its guidance."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import alphas, philox_normal
from llmdpd.methods.mtdiff import MTDiffPolicy
from llmdpd.nn.acting import ChainActing
from llmdpd.nn.context import ALL_KEPT, EncodedPrompts, Keep
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import make_tokens

S, A, H, L = 4, 2, 3, 2
K = 12


def test_the_loss_by_hand(make_method: Any, make_batch: Any, calls_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head of zeros the answer is its bias; the network is asked what the forward process says."""
    method, batch = make_method("mtdiff"), make_batch(6, 2, H=H, before=L - 1)
    policy = method.policy
    torch.nn.init.zeros_(policy.net.head.weight)
    noise, steps = 2 * torch.randn(6, H, A), torch.randint(0, K, (6,))
    uniform = torch.tensor([0.1, 0.9, 0.2, 0.95, 0.3, 0.79])
    for name, drawn in (("randn", noise), ("randint", steps), ("rand", uniform)):
        monkeypatch.setattr(f"llmdpd.methods.mtdiff.{name}", lambda *given, drawn=drawn: drawn.clone())
    denoised, conditions = calls_of(policy.net, "denoise"), calls_of(policy, "return_condition")
    loss, first = method.loss(batch)

    mask = batch.windows.mask.numpy()[:, L - 1 :]
    error = np.abs(policy.net.head.bias.detach().double().numpy() - noise.double().numpy())
    huber = np.where(error < 1, error**2 / 2, error - 0.5)
    weight = np.where(mask[..., None], np.where(np.arange(H) == 0, 10.0, 1.0)[:, None], 0.0) * np.ones(A)
    assert float(loss.detach()) == pytest.approx((weight * huber).sum() / weight.sum(), rel=1e-5)
    assert float(first.detach()) == pytest.approx(huber[:, 0].mean(), rel=1e-5)
    level = np.cumprod(alphas("vp", K))[steps.numpy()][:, None, None]
    clean = np.where(mask[..., None], batch.windows.actions.numpy()[:, L - 1 :], 0.0)
    expected = np.sqrt(level) * clean + np.sqrt(1 - level) * noise.numpy()
    np.testing.assert_allclose(denoised[0][0].numpy(), expected, rtol=1e-5, atol=1e-5)
    ((returns, given, _),) = conditions
    assert given.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0], "four of five are given their return"
    assert torch.equal(returns, batch.windows.returns[:, L - 1])


def epsilon(
    model: MTDiffPolicy, x: Tensor, states: Tensor, given: Tensor, prompts: EncodedPrompts, returns: Tensor, keep: float
) -> Tensor:
    count = len(states)
    before = model.before(states, given, prompts, torch.arange(count) % max(len(prompts), 1))
    condition = model.return_condition(returns, torch.full((count,), keep))
    return model.net.denoise(x, condition, model.net.time_rows(torch.full((count,), 3)), None, before)


@torch.no_grad()
def test_what_a_plan_depends_on(make_network: Any, make_pairs: Any) -> None:
    model, pairs = make_network("mtdiff"), make_pairs(3, 6)
    states, given, returns = torch.randn(2, L, S), torch.ones(2, L, dtype=torch.bool), torch.randn(2)
    noise = partial(epsilon, model, torch.randn(2, H, A))

    def encode(which: Keep = ALL_KEPT) -> EncodedPrompts:
        return model.encode(None, make_tokens(pairs, model.reads.encoder), which)

    found = noise(states, given, encode(), returns, 1.0)
    for part in range(L):
        other, missing = states.clone(), given.clone()
        other[0, part] += 2.0
        missing[0, part] = False
        changed = noise(other, given, encode(), returns, 1.0)
        assert not torch.equal(changed[0], found[0])
        assert torch.equal(changed[1], found[1])
        # States before the episode are ignored.
        one, two = (noise(s, missing, encode(), returns, 1.0) for s in (states, other))
        assert torch.equal(one, two)
    assert not torch.allclose(noise(states, given, encode(), returns + 3, 1.0), found)
    without = noise(states, given, encode(), returns, 0.0)
    assert not torch.allclose(without, found)
    assert torch.equal(noise(states, given, encode(), returns + 3, 0.0), without)
    for part in pairs[0]:
        part[-1] += 5.0
        changed = noise(states, given, encode(), returns, 1.0)
        part[-1] -= 5.0
        assert not torch.equal(changed[0], found[0])
        torch.testing.assert_close(changed[1], found[1])
    dropped = noise(states, given, encode(Keep(trajectory=torch.tensor([[0.0], [1.0]]))), returns, 1.0)
    none = noise(states, given, EncodedPrompts(torch.zeros(2, 0)), returns, 1.0)
    torch.testing.assert_close(dropped[0], none[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dropped[1], found[1])


@torch.no_grad()
@pytest.mark.parametrize("acting", [ChainActing(sampler="ddim", steps=4), ChainActing()])
def test_it_acts_as_it_was_trained(
    make_network: Any, make_pairs: Any, rng: np.random.Generator, acting: ChainActing
) -> None:
    """Step by step with its memory and its guidance: the chain by hand, from two calls of the network."""
    guidance, demonstration = float(rng.uniform(0.3, 2.0)), make_pairs(6)[0]
    model = make_network("mtdiff", **{"network.trajectory.guidance": guidance})
    model.net.head.bias.add_(0.3 * torch.randn(A))
    policy = Policy("mtdiff", model, None, acting).prompt(trajectory=demonstration, target_return=12.0)
    prompts, table = policy.encode_prompts([None], [demonstration]), acting.coefficients(model.config)
    states = torch.randn(4, 2, S)
    rewards = rng.normal(size=(4, 2)).astype(np.float32)
    asked = torch.full((2,), 12.0)
    policy.seed(5)
    random = torch.Generator().manual_seed(5)
    for step in range(4):
        if step:
            asked = asked - torch.from_numpy(rewards[step - 1])
        actions = policy.act(states[step].numpy(), reward=rewards[step - 1] if step else None)
        seeds = torch.randint(2**63 - 1, (2,), generator=random)
        count = table.steps + 1 if acting.sampler == "ddpm" else 1
        noise = philox_normal(seeds, 2, H, count, A, torch.device("cpu")).float()
        shown, given = torch.stack([states[max(step - 1, 0)], states[step]], 1), torch.tensor([[step > 0, True]] * 2)
        x = table.start * noise[0]
        for k in range(table.steps):
            time = model.net.time_rows(torch.full((2,), int(table.timesteps[k])))
            before = model.before(shown, given, prompts, torch.zeros(2, dtype=torch.long))
            conditional, free = (
                model.net.denoise(x, model.return_condition(asked, torch.full((2,), which)), time, None, before)
                for which in (1.0, 0.0)
            )
            guided = free + guidance * (conditional - free)
            x0 = (table.p[k] * x + table.e[k] * guided).clamp(-1.5, 1.5)
            x = table.A[k] * x + table.B[k] * x0 + (table.S[k] * noise[k + 1] if table.S[k] > 0 else 0)
        np.testing.assert_allclose(actions, x[:, 0].clamp(-1.5, 1.5).numpy(), rtol=1e-3, atol=1e-4)
