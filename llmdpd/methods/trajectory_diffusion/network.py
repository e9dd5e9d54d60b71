"""The plan policy: prompts + state → context → reverse diffusion of a plan of states and actions → its first action."""

from __future__ import annotations

import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.nn.context import Condition
from llmdpd.nn.plan_denoiser import PlanDenoiser, reverse_plan
from llmdpd.nn.policy_network import PolicyConfig, PromptedNetwork, Window


class PlanPolicy(PromptedNetwork):
    """p(s_t, a_t … s_{t+H-1}, a_{t+H-1} | s_t, z_text, z_traj): encoders and the denoiser of a plan.

    The states of a plan are scaled to ± the action bound by the least and the greatest that the training tasks have, so
    that the sampler's clip fits states and actions alike.

    Raises:
        InputError: chunks, which plans don't have.
    """

    diffuses = True
    low: Tensor
    high: Tensor

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig) -> None:
        check_plan_chunk(config)
        super().__init__(state_dim, action_dim, embedding_dim, config)
        self.net = PlanDenoiser(
            state_dim + action_dim, self.context.state_dim, self.context.prompt_dim, config.time_dim, config.plan
        )
        self.register_buffer("low", -torch.ones(state_dim))
        self.register_buffer("high", torch.ones(state_dim))

    @property
    def window(self) -> Window:
        """The plan's steps."""
        return Window(self.config.plan.horizon)

    def fit(self, observations: Tensor) -> None:
        """Take the statistics of the training tasks' observations [N, S]."""
        super().fit(observations)
        self.low.copy_(observations.amin(0))
        self.high.copy_(observations.amax(0))

    def scaled(self, states: Tensor) -> Tensor:
        """States [..., S] as they stand in a plan: within ± the action bound, 0 where training knew one value alone."""
        span = self.high - self.low
        unit = torch.where(span > 0, (states - self.low) / span.clamp_min(1e-12) * 2 - 1, 0.0)
        return self.config.action_bound * unit.clamp(-1.0, 1.0)

    def draw(self, states: Tensor, condition: Condition, acting: ActingConfig, seeds: Tensor) -> Tensor:
        """A plan a state: observations [B, S], their condition, seeds int64 [B] → actions [B, H, A].

        Raises:
            InputError: a way of acting that plans don't have.
        """
        check_plan_acting(acting)
        present = self.scaled(states)
        plans = reverse_plan(self.net, present, *condition, acting.plan(self.config), seeds)
        return plans[..., self.state_dim :]


def check_plan_chunk(config: PolicyConfig) -> None:
    """Raise `InputError` for chunks of actions: the steps of a plan have a number of their own."""
    if config.chunk != 1:
        raise InputError(
            "plans have no chunks",
            field="policy.chunk",
            found=config.chunk,
            expected=1,
            hint="policy.plan.horizon says how many steps a plan has; its first action is executed",
        )


def check_plan_acting(acting: ActingConfig) -> None:
    """Raise `InputError` for a choice among several plans, which there is no critic for, and for bf16."""
    for field, found, expected in (("samples", acting.samples, 1), ("precision", acting.precision, "fp32")):
        if found != expected:
            raise InputError(
                "plans have no such way of acting",
                field=f"acting.{field}",
                found=found,
                expected=expected,
            )
