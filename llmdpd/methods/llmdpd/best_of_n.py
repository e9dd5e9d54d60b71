"""Acting by best of N: several samples of the policy, of which the critics choose one."""

from __future__ import annotations

import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, SamplerCoefficients, reverse_diffusion
from llmdpd.errors import InputError
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import Condition
from llmdpd.nn.critic import DoubleQ
from llmdpd.ops.packing import best_of_n
from llmdpd.ops.philox import philox_normal


@torch.no_grad()
def sample_actions(
    net: NoiseMLP,
    critic: DoubleQ | None,
    condition: Condition,
    coefficients: SamplerCoefficients,
    acting: BestOfN,
    seeds: Tensor,
) -> Tensor:
    """One action a state, to which a chunk is one of H A numbers: B states' condition, seeds int64 [B] → [B, A].

    Each state's noise depends on its own seed alone: an action doesn't depend on the batch that it is sampled in.

    Raises:
        InputError: several samples and no critic to choose by.
    """
    if critic is not None and acting.samples > 1:
        actions = best_of_n(
            net,
            (critic.q1, critic.q2),
            coefficients,
            condition.state,
            condition.prompt,
            seeds,
            samples=acting.samples,
            temperature=acting.temperature if acting.selection == "soft" else None,
            bf16=acting.precision == "bf16",
        )
        if actions is not None:
            return actions
    return _sample_in_torch(net, critic, condition, coefficients, acting, seeds)


def _sample_in_torch(
    net: NoiseMLP,
    critic: DoubleQ | None,
    condition: Condition,
    coefficients: SamplerCoefficients,
    acting: BestOfN,
    seeds: Tensor,
) -> Tensor:
    """`sample_actions` on any device: what the C++ actor is held to."""
    state, prompt = condition.state, condition.prompt
    samples, precision = acting.samples, acting.precision
    actions = reverse_diffusion(net, state, prompt, coefficients, samples, seed=seeds, precision=precision)
    if acting.samples == 1:
        return actions
    if critic is None:
        raise InputError(
            "no critic to choose among samples by",
            field="acting.samples",
            found=acting.samples,
            expected=1,
            hint="this policy was trained by cloning alone",
        )
    batch = actions.shape[0]
    prompt = condition.prompt.expand(batch, -1)[:, None, :].expand(-1, acting.samples, -1)
    states = condition.state[:, None, :].expand(-1, acting.samples, -1)
    value = critic.minimum(states, actions, prompt, acting.precision)
    if acting.selection == "max":
        choice = value.argmax(1)
    else:
        # Inverse transform of the softmax by one uniform number a state; its draw lies past the sampler's K + 1.
        normal = philox_normal(seeds, batch, 1, coefficients.steps + 2, 1, value.device)[-1, :, 0, 0]
        uniform = torch.special.ndtr(normal)
        probability = (value.double() / acting.temperature).softmax(1)
        # A running sum as a matrix product: cumsum has no deterministic implementation on CUDA.
        cumulative = probability @ torch.ones(acting.samples, acting.samples).to(probability).triu()
        choice = (cumulative < uniform[:, None]).sum(1).clamp_max(acting.samples - 1)
    return actions[torch.arange(batch, device=actions.device), choice]
