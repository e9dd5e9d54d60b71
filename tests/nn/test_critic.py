from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llmdpd.nn.critic import DoubleQ


def by_hand(network: nn.Sequential, x: np.ndarray) -> np.ndarray:
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert len(layers) == 4  # three hidden layers
    for number, layer in enumerate(layers):
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        if number < 3:
            x = x * np.tanh(np.logaddexp(0, x))
    return x[..., 0]


# 0: the paper's critics, which do not see the prompt.
@pytest.mark.parametrize("prompt_dim", [0, 4])
def test_two_networks_of_state_action_and_prompt(rng: np.random.Generator, prompt_dim: int) -> None:
    critic = DoubleQ(5, 3, prompt_dim, hidden_dim=11)
    state, action, prompt = (torch.randn(2, 7, size) for size in (5, 3, 4))
    q1, q2 = critic(state, action, prompt)
    assert q1.shape == q2.shape == (2, 7)
    joined = np.concatenate([t.double().numpy() for t in (state, action, prompt)], -1)[..., : 8 + prompt_dim]
    np.testing.assert_allclose(q1.detach(), by_hand(critic.q1, joined), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(q2.detach(), by_hand(critic.q2, joined), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(q1, q2)
    assert torch.equal(critic.minimum(state, action, prompt), torch.where(q1 < q2, q1, q2))


def test_leading_axes_are_free(rng: np.random.Generator) -> None:
    critic = DoubleQ(5, 3, 0, 16)
    state, action = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    whole = critic(state, action, torch.zeros(0))
    one = critic(state[1, 2], action[1, 2], torch.zeros(0))
    for all_values, value in zip(whole, one, strict=True):
        assert all_values.shape == (2, 4)
        assert value.shape == ()
        torch.testing.assert_close(value, all_values[1, 2])
