"""Whether a text contradicts the demonstration beside it: by how likely the policy finds what was demonstrated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.policy_network import PolicyNetwork, States
from llmdpd.prompts.useful_part import Recorded

_CLEARLY = 1.1  # times the loss: nearer to 1, it is as often the text that is right
_DRAWS = 4  # of the noise, at each step and level
_APART = 1 << 20  # of their seeds: more than an episode has steps


def contradicts(
    network: PolicyNetwork, given: EncodedPrompts, alone: EncodedPrompts, shown: Sequence[Recorded]
) -> bool:
    """Whether the diffusion loss on the demonstrated actions is clearly higher with the text than without it.

    The loss bounds how unlikely a policy finds actions (Ho et al. 2020): a text under which the demonstration becomes
    less likely tells the policy something else than the demonstration does.

    Args:
        network: the policy's; one without such a loss finds no contradiction.
        given: one prompt, of a text and demonstrations. alone: the same without the text.
        shown: those demonstrations as they are read, their actions within ±1; time steps count what is read of them.
    """
    told, plain = (_loss(network, prompt, shown) for prompt in (given, alone))
    return told is not None and plain is not None and told > _CLEARLY * plain


@torch.no_grad()
def _loss(network: PolicyNetwork, prompt: EncodedPrompts, shown: Sequence[Recorded]) -> float | None:
    """The mean loss over all demonstrated steps, at noise that is the same for every prompt."""
    states = torch.cat([torch.from_numpy(one.observations) for one in shown]).to(network.device)
    actions = torch.cat([torch.from_numpy(one.actions) for one in shown]).to(network.device)
    steps = torch.cat([torch.arange(len(one.actions)) for one in shown]).to(network.device)
    seeds = torch.arange(len(steps), device=network.device)
    total = 0.0
    for draw in range(_DRAWS):
        loss = network.diffusion_loss(
            States(states, torch.zeros_like(steps), steps), prompt, actions, seeds + draw * _APART
        )
        if loss is None:
            return None
        total += float(loss.mean())
    return total / _DRAWS
