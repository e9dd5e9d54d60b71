"""Acting by best of N: several samples of the policy, of which the critics choose one."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, philox_normal, reverse_diffusion
from llmdpd.diffusion.schedules import SamplerPlan
from llmdpd.errors import InputError
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import Condition
from llmdpd.nn.critic import DoubleQ
from llmdpd.ops import native
from llmdpd.ops.packed import check_inputs, noise_keys, packed, packed_critic


@torch.no_grad()
def sample_actions(
    net: NoiseMLP, critic: DoubleQ | None, condition: Condition, plan: SamplerPlan, acting: BestOfN, seeds: Tensor
) -> Tensor:
    """One action a state, to which a chunk is one of H A numbers: B states' condition, seeds int64 [B] → [B, A].

    Each state's noise depends on its own seed alone: an action doesn't depend on the batch that it is sampled in.

    Raises:
        InputError: several samples and no critic to choose by.
    """
    native_actor = (
        None if critic is None or acting.samples == 1 else _native_actor(net, critic, condition, plan, acting)
    )
    if native_actor is not None:
        batch = check_inputs(net, condition.state, condition.prompt, acting.samples)
        actions = np.empty((batch, net.action_dim), np.float32)
        state, prompt = native.array(condition.state), native.array(condition.prompt)
        native_actor.act(state, prompt, noise_keys(seeds, batch), actions, native.threads())
        return torch.from_numpy(actions)
    return _sample_in_torch(net, critic, condition, plan, acting, seeds)


def _native_actor(
    net: NoiseMLP, critic: DoubleQ, condition: Condition, plan: SamplerPlan, acting: BestOfN
) -> Any | None:
    """The C++ actor of these networks as they are now; None where it can't run."""
    tensors = (condition.state, condition.prompt, net.layers[0].bias, critic.q1[0].bias)
    if not native.available()[0] or any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return None
    bf16 = acting.precision == "bf16"
    critics = [packed_critic(q, net.state_dim, net.action_dim, bf16) for q in (critic.q1, critic.q2)]
    sampler = packed(net, bf16).sampler(plan)
    # What the last one was made of: in an episode it is always the same.
    key = (sampler, *critics, acting)
    kept = _actors.get(net)
    if kept is None or any(one is not other for one, other in zip(kept[0], key, strict=True)):
        q1, q2 = (one.packed for one in critics)
        soft = acting.selection == "soft"
        kept = key, native.module().Actor(sampler, q1, q2, acting.samples, soft, acting.temperature)
        _actors[net] = kept
    return kept[1]


_actors: weakref.WeakKeyDictionary[NoiseMLP, tuple[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()


def _sample_in_torch(
    net: NoiseMLP, critic: DoubleQ | None, condition: Condition, plan: SamplerPlan, acting: BestOfN, seeds: Tensor
) -> Tensor:
    """`sample_actions` on any device: what the C++ actor is held to."""
    state, prompt = condition.state, condition.prompt
    actions = reverse_diffusion(net, state, prompt, plan, acting.samples, seed=seeds, precision=acting.precision)
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
        normal = philox_normal(seeds, batch, 1, plan.steps + 2, 1, value.device)[-1, :, 0, 0]
        uniform = torch.special.ndtr(normal)
        probability = (value.double() / acting.temperature).softmax(1)
        # A running sum as a matrix product: cumsum has no deterministic implementation on CUDA.
        cumulative = probability @ torch.ones(acting.samples, acting.samples).to(probability).triu()
        choice = (cumulative < uniform[:, None]).sum(1).clamp_max(acting.samples - 1)
    return actions[torch.arange(batch, device=actions.device), choice]
