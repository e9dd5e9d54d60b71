"""The plan policy's scale of states, and the sizes that it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods.networks import make_network, method_of
from llmdpd.methods.trajectory_diffusion.network import PlanPolicy
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.plan_denoiser import PlanConfig
from llmdpd.nn.policy_network import ConditionalPolicy, PolicyConfig
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig

CONFIG = PolicyConfig(
    context=ContextConfig(encoder=TrajectoryEncoderConfig(layers=1, width=8, inner=8)),
    plan=PlanConfig(horizon=3, layers=1, width=8, inner=8),
)


@pytest.mark.usefixtures("rng")
@pytest.mark.parametrize("bound", [1.0, 0.3])
def test_states_are_scaled_to_the_bound(bound: float) -> None:
    network = PlanPolicy(3, 2, 6, dataclasses.replace(CONFIG, action_bound=bound))
    seen = torch.tensor([[0.0, 5.0, 7.0], [2.0, 5.0, 9.0], [1.0, 5.0, 7.5]])
    network.fit(seen)
    expected = bound * torch.tensor([[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0], [0.0, 0.0, -0.5]])
    torch.testing.assert_close(network.scaled(seen), expected)
    # Beyond what training knew it stops at the bound; what was constant there stays 0.
    beyond = network.scaled(torch.tensor([-3.0, 6.0, 100.0]))
    torch.testing.assert_close(beyond, bound * torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(network.context.features.mean, torch.tensor([1.0, 5.0, 23.5 / 3]))
    for name in ("low", "high"):
        assert name in network.state_dict()


def test_networks_by_method() -> None:
    for method, kind in (("llmdpd", ConditionalPolicy), ("trajectory-diffusion", PlanPolicy)):
        network = make_network(method, 3, 2, 6, CONFIG)
        assert type(network) is kind
        assert method_of(network) == method
    with pytest.raises(InputError, match="llmdpd, trajectory-diffusion"):
        make_network("diffuser", 3, 2, 6, CONFIG)


def test_a_width_that_the_heads_cannot_share() -> None:
    plan = dataclasses.replace(CONFIG.plan, width=10, heads=4)
    with pytest.raises(InputError, match=r"plan denoiser(.|\n)*divisor of 10 \(policy\.plan\.width\)") as caught:
        dataclasses.replace(CONFIG, plan=plan).check()
    assert caught.value.field == "plan.heads"
