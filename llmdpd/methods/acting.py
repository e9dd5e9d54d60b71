"""Choosing an action: N draws from the policy, one taken by what the critics say of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, philox_normal, reverse_diffusion, sampler_plan
from llmdpd.diffusion.schedules import Precision, SamplerName, SamplerPlan
from llmdpd.errors import InputError
from llmdpd.nn.context import Condition
from llmdpd.nn.critic import DoubleQ
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.ops.packing import best_of_n
from llmdpd.utils.bounds import LIMITS, check_limits


@dataclass(frozen=True)
class ActingConfig:
    """How a trained policy acts. Diffusion-QL draws 50 and takes one by softmax over min Q."""

    samples: int = 50
    """N, actions drawn a state, and a view; 1 needs no critic."""
    selection: Literal["soft", "max"] = "soft"
    """Which of the N is taken: `soft`, by softmax over min(Q_1, Q_2) / temperature, or `max`."""
    temperature: float = 1.0
    """Of the softmax, in units of Q; above 0, the limit of which is `max`."""
    noise_scale: float = 1.0
    """Factor on the sampler's noise; below 1 actions come from nearer to the mode."""
    sampler: SamplerName = "ddpm"
    """Sampler of the chain: ddpm, ddim or dpm++2m."""
    steps: int | None = None
    """Denoising steps; by default those of training (ddpm needs those)."""
    precision: Precision = "fp32"
    """Of the hidden layers' matrix products: fp32, or bf16 (faster on CPUs and GPUs that have it)."""
    replan: int | None = None
    """Actions of a chunk that are played before the next is drawn; by default the whole chunk (policy.chunk)."""
    views: int = 1
    """Turned and mirrored views of the scene, in each of which an action is drawn, and chosen of N; their mean is done.
    1: none; else an even number. Without an example there is one view: scenes are turned in training under one alone.
    """

    def __post_init__(self) -> None:
        check_limits(self, LIMITS, "acting")
        if self.selection not in ("soft", "max"):
            raise InputError(
                "unknown selection", field="acting.selection", found=self.selection, expected="soft or max"
            )
        if self.precision not in get_args(Precision):
            raise InputError(
                "unknown precision", field="acting.precision", found=self.precision, expected="fp32 or bf16"
            )
        if self.views > 1 and self.views % 2:
            raise InputError(
                "each turned view comes plain and mirrored",
                field="acting.views",
                found=self.views,
                expected="1, or an even number",
            )

    def plan(self, policy: PolicyConfig) -> SamplerPlan:
        """The sampler's coefficients for a policy."""
        total = policy.diffusion_steps
        return sampler_plan(
            self.sampler,
            total if self.steps is None else self.steps,
            policy.schedule,
            policy.action_bound,
            train_steps=total,
            noise_scale=self.noise_scale,
        )

    def played(self, policy: PolicyConfig) -> int:
        """Actions of each chunk that are played before the next is drawn: 1 … H of a policy with chunks of H.

        It is the action horizon of Diffusion Policy's receding-horizon control (Chi et al. 2023), H its prediction
        horizon.

        Raises:
            InputError: more than a chunk has.
        """
        if self.replan is not None and self.replan > policy.chunk:
            raise InputError(
                "more actions are to be played than a chunk has",
                field="replan",
                found=self.replan,
                expected=f"1 to {policy.chunk} (policy.chunk)",
            )
        return policy.chunk if self.replan is None else self.replan


def check_one_draw(acting: ActingConfig) -> None:
    """Raise `InputError` for ways of acting that a policy without diffusion does not have."""
    for field, found, expected in (("samples", acting.samples, 1), ("precision", acting.precision, "fp32")):
        if found != expected:
            field = f"acting.{field}"
            raise InputError("no such way of acting without diffusion", field=field, found=found, expected=expected)


@torch.no_grad()
def draw_actions(
    net: NoiseMLP, critic: DoubleQ | None, condition: Condition, plan: SamplerPlan, acting: ActingConfig, seeds: Tensor
) -> Tensor:
    """One action a state, to which a chunk is one of H A numbers: B states' condition, seeds int64 [B] → [B, A].

    Each state's noise hangs on its own seed alone, so that an action doesn't depend on the batch that it is drawn in.

    Raises:
        InputError: several samples and no critic to choose by.
    """
    if critic is not None and acting.samples > 1:
        actions = best_of_n(
            net,
            (critic.q1, critic.q2),
            plan,
            condition.state,
            condition.prompt,
            seeds,
            samples=acting.samples,
            temperature=acting.temperature if acting.selection == "soft" else None,
            bf16=acting.precision == "bf16",
        )
        if actions is not None:
            return actions
    return _draw_in_torch(net, critic, condition, plan, acting, seeds)


def _draw_in_torch(
    net: NoiseMLP, critic: DoubleQ | None, condition: Condition, plan: SamplerPlan, acting: ActingConfig, seeds: Tensor
) -> Tensor:
    """`draw_actions` on any device: what the C++ actor is held to."""
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
