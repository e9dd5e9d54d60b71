"""The policy of policy diffusion: encoders, noise network and best-of-N acting (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, SamplerCoefficients, reverse_diffusion
from llmdpd.errors import InputError
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.config import ChainConfig, ContextNetworkConfig
from llmdpd.nn.context import Condition, EncodedPrompts
from llmdpd.nn.critic import DoubleQ
from llmdpd.nn.policy_network import ConditionedNetwork, States, Window
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import device_choice, native
from llmdpd.ops.acting import FrozenActor
from llmdpd.ops.packing import bind_sampler, pack_critic, pack_net
from llmdpd.ops.philox import philox_normal
from llmdpd.utils.bounds import ACTION_NUMBERS, Steps, Width


@dataclass(frozen=True)
class DiffusionNetworkConfig(ContextNetworkConfig, ChainConfig):
    """The noise network and its diffusion chain. Defaults are Diffusion-QL's."""

    hidden_dim: Width = 256
    """Width of the noise network's three hidden layers."""
    chunk: Steps = 1
    """H, actions that the noise network denoises together: the present one and those that follow."""


class DiffusionPolicy(ConditionedNetwork):
    """Encoders (psi, phi) and noise network (theta).

    With a chunk H above 1 it is pi(a_t … a_{t+H-1} | s_t, z_text, z_traj): to the noise network a chunk is one action
    of H A numbers, step after step (action chunking: Zhao et al. 2023, ACT; Chi et al. 2023, Diffusion Policy).

    Raises:
        InputError: chunks of more numbers than the samplers take.
    """

    config: DiffusionNetworkConfig
    alpha_bar: Tensor

    def __init__(self, spaces: Spaces, config: DiffusionNetworkConfig) -> None:
        numbers = config.chunk * spaces.action_dim
        if numbers > ACTION_NUMBERS.high:
            raise InputError(
                "a chunk has more numbers than the samplers take",
                field="network.chunk",
                found=f"{config.chunk} actions of {spaces.action_dim} numbers: {numbers}",
                expected=f"{ACTION_NUMBERS.high} numbers at most",
            )
        super().__init__(spaces, config)
        if config.chunk > 1:
            self.window = Window(config.chunk)
        self.register_buffer("alpha_bar", config.alpha_bar(), persistent=False)
        self.training_sampler = config.training_sampler()
        self.net = NoiseMLP(
            self.context.state_dim, numbers, self.context.prompt_dim, config.hidden_dim, config.time_dim
        )

    def make_critic(self, hidden: int = 256, sees_prompts: bool = False) -> DoubleQ:  # type: ignore[override]
        """Q_1 and Q_2 on this policy's features, of that width; `sees_prompts`: on its prompt vectors too.

        Raises:
            InputError: a policy with chunks, whose critics would value single actions.
        """
        if self.config.chunk > 1:
            raise InputError(
                "critics value single actions, and this policy samples chunks",
                field="network.chunk",
                found=self.config.chunk,
                expected="1, or no critics",
            )
        return DoubleQ(self.context.state_dim, self.action_dim, self.context.prompt_dim if sees_prompts else 0, hidden)

    def diffusion_loss(self, states: States, prompts: EncodedPrompts, actions: Tensor, seeds: Tensor) -> Tensor | None:
        if self.config.chunk > 1:
            return None
        condition = self.condition(states.observations, prompts, states.prompt_of, states.steps)
        count, levels = len(actions), len(self.alpha_bar)
        noise = philox_normal(seeds, count, 1, levels, self.action_dim, actions.device)
        loss = actions.new_zeros(count)
        for level, alpha_bar in enumerate(self.alpha_bar):
            added = noise[level, :, 0].to(actions.dtype)
            noisy = alpha_bar.sqrt() * actions + (1 - alpha_bar).sqrt() * added
            timesteps = torch.full((count,), level, device=actions.device)
            predicted = self.net(noisy, timesteps, condition.state, condition.prompt)
            loss += (predicted - added).square().mean(-1) / levels
        return loss

    def freeze(self, prompts: EncodedPrompts, acting: BestOfN, critic: DoubleQ | None) -> FrozenActor | None:
        parts = [part for part in (self, critic) if part is not None]
        tensors = [tensor for part in parts for tensor in part.state_dict().values()]
        chooses = acting.samples > 1
        computes = native.available()[0] and all(t.dtype is torch.float32 and t.is_cpu for t in tensors)
        packed = self.context.packed(prompts) if computes else None
        if packed is None or (chooses and critic is None):
            return None
        bf16 = acting.precision == "bf16"
        sampler = bind_sampler(pack_net(self.net, bf16), self.net.time_mlp, acting.coefficients(self.config))
        numbers = self.config.chunk * self.action_dim
        if critic is None or not chooses:
            return FrozenActor(packed, sampler, numbers)
        q1, q2 = (pack_critic(q, self.context.state_dim, numbers, bf16) for q in (critic.q1, critic.q2))
        temperature = acting.temperature if acting.selection == "soft" else None
        return FrozenActor(packed, sampler, numbers, (q1, q2), acting.samples, temperature)

    def sample_conditioned(
        self, observations: Tensor, condition: Condition, acting: BestOfN, seeds: Tensor, critic: Any
    ) -> Tensor:
        coefficients = acting.coefficients(self.config)
        actions = sample_actions(self.net, critic, condition, coefficients, acting, seeds)
        return torch.unflatten(actions, 1, (self.config.chunk, self.action_dim))


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
    draw = coefficients.steps + 1  # of the choice: past the sampler's K + 1
    if acting.selection == "max":
        choice = value.argmax(1)
    elif device_choice.chooses(value, actions, seeds):
        return device_choice.chosen(value, actions, seeds, draw, acting.temperature)
    else:
        # Inverse transform of the softmax by one uniform number a state.
        normal = philox_normal(seeds, batch, 1, draw + 1, 1, value.device)[-1, :, 0, 0]
        uniform = torch.special.ndtr(normal)
        probability = (value.double() / acting.temperature).softmax(1)
        # A running sum as a matrix product: cumsum has no deterministic implementation on CUDA.
        cumulative = probability @ probability.new_ones(acting.samples, acting.samples).triu()
        choice = (cumulative < uniform[:, None]).sum(1).clamp_max(acting.samples - 1)
    return actions[torch.arange(batch, device=actions.device), choice]
