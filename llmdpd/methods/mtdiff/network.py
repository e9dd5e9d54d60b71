"""MTDiff-p: actions to come by diffusion, from a demonstration, the last states and a return (He et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from llmdpd.diffusion.reference import walk_chain
from llmdpd.errors import InputError
from llmdpd.nn.acting import ChainActing
from llmdpd.nn.context import ALL_KEPT, ContextConfig, EncodedPrompts, Keep, spread
from llmdpd.nn.episode_memory import History
from llmdpd.nn.features import FeatureKind
from llmdpd.nn.history_policy import DemonstrationConfig, HistoryPolicy
from llmdpd.nn.layers import mlp
from llmdpd.nn.policy_network import ChainConfig, Spaces, Window
from llmdpd.nn.trajectory_denoiser import Before, TrajectoryConfig, TrajectoryDenoiser, noise_blocks
from llmdpd.prompts.demonstration import TrajectoryTokens
from llmdpd.utils.bounds import Bounds, Fraction, NonNegative, Steps


@dataclass(frozen=True)
class MTDiffTrajectoryConfig(TrajectoryConfig):
    """The sequence of actions to come and the transformer that denoises it."""

    history: Steps = 2
    """States that it goes on from, the present one among them."""
    guidance: NonNegative = 1.2
    """How far the noise goes from what it is without a return towards what it is with the target return."""


@dataclass(frozen=True)
class MTDiffNetworkConfig(ChainConfig):
    """MTDiff-p's networks, and a chain of 200 steps."""

    diffusion_steps: Annotated[int, Bounds(1, 10_000)] = 200
    """K, steps of the diffusion chain."""
    features: FeatureKind = "normalised"
    """State features; see the context of policy diffusion."""
    demonstration: DemonstrationConfig = field(default_factory=lambda: DemonstrationConfig(20, "window"))
    """How the demonstration is cut."""
    trajectory_dropout: Fraction = 0.0
    """Probability in training that a task's demonstration is left out."""
    plan: MTDiffTrajectoryConfig = field(default_factory=MTDiffTrajectoryConfig)
    """What is denoised in place of an action, and the transformer that does it."""

    def context_config(self) -> ContextConfig:
        return self.demonstration.context(self.features, self.trajectory_dropout)


class MTDiffPolicy(HistoryPolicy):
    """p(a_t … a_{t+H-1} | demonstration, s_{t-1}, s_t, R): a token a step of the example, a state, an action to come.

    The denoiser is that of trajectories (`TrajectoryDenoiser`), which is not causal; its condition is the return, or
    that none is given. States are read by the features that all methods have; returns are scaled by the data's.
    """

    config: MTDiffNetworkConfig
    alpha_bar: Tensor

    def __init__(self, spaces: Spaces, config: MTDiffNetworkConfig) -> None:
        super().__init__(spaces, config)
        self.register_buffer("alpha_bar", config.alpha_bar(), persistent=False)
        action_dim = spaces.action_dim
        features, width = self.context.features.output_dim, config.plan.width
        # The condition: the return and whether one is given; no prompt vector.
        self.net = TrajectoryDenoiser(action_dim, 2, 0, config.time_dim, config.plan)
        self.embed_example = _embedding(features + action_dim, width)
        self.embed_state = _embedding(features, width)
        self.example_position = nn.Parameter(0.02 * torch.randn(config.demonstration.steps, width))
        self.state_position = nn.Parameter(0.02 * torch.randn(config.plan.history, width))

    @property
    def memory_length(self) -> int:  # type: ignore[override]
        """States that it is shown, the present one among them."""
        return self.config.plan.history

    @property
    def window(self) -> Window:
        """The steps to come, and the states that it goes on from."""
        return Window(self.config.plan.horizon, self.memory_length - 1)

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        """Embed the steps of P demonstrations.

        Raises:
            InputError: no example, where training left none out.
        """
        if tokens is None:
            if not self.config.trajectory_dropout:
                raise InputError(
                    "MTDiff reads a demonstration", field="trajectory", found="none", expected="a demonstration"
                )
            return EncodedPrompts(torch.zeros(1, 0, device=self.return_scale.device))
        embedded = self.embed_example(torch.cat([self.context.features(tokens.states), tokens.actions], dim=-1))
        embedded = embedded + self.example_position[: embedded.shape[1]]
        mask = tokens.mask
        if keep.trajectory is not None:
            mask = mask & (keep.trajectory > 0)
        return EncodedPrompts(embedded.new_zeros(len(embedded), 0), {"tokens": embedded, "mask": mask})

    def before(self, states: Tensor, given: Tensor, prompts: EncodedPrompts, index: Tensor | None) -> Before:
        """What stands before the actions to come of B episodes: their example's steps, then their last states.

        Args:
            states: [B, L, S], the present one last. given: [B, L], False before the episode's start.
            prompts: P of them. index: [B], which prompt each is under; None: P equal groups in order.
        """
        tokens, mask = self.embed_state(self.context.features(states)) + self.state_position, given
        if prompts.memory:
            demonstration, there = (spread(prompts.memory[name], index, len(states)) for name in ("tokens", "mask"))
            tokens, mask = torch.cat([demonstration, tokens], 1), torch.cat([there, mask], 1)
        return Before(tokens, mask)

    def return_condition(self, returns: Tensor, given: Tensor) -> Tensor:
        """The denoiser's condition [B, W]: returns [B], as they are, and whether they are given, float [B]."""
        condition: Tensor = self.net.context(
            torch.stack([returns / self.return_scale * given, given], dim=-1), returns.new_zeros(0)
        )
        return condition

    def action(
        self, history: History, prompts: EncodedPrompts, index: Tensor | None, acting: ChainActing, seeds: Tensor
    ) -> Tensor:
        """The first of the actions to come for each of B episodes, [B, A]; guided by the return (classifier-free).

        epsilon = epsilon(no return) + guidance (epsilon(return) - epsilon(no return)).
        """
        place = history.lengths[:, None] + torch.arange(-self.memory_length, 0, device=seeds.device)
        given, rows = place >= 0, torch.arange(len(seeds), device=seeds.device)[:, None]
        before = self.before(history.states[rows, place.clamp_min(0)], given, prompts, index)
        returns = history.returns[rows[:, 0], place[:, -1]]
        coefficients, guidance = acting.coefficients(self.config), self.config.plan.guidance
        time_rows = self.net.time_rows(torch.tensor(coefficients.timesteps).to(seeds.device))
        found = []
        for block, noise in noise_blocks(self.net, coefficients, seeds, returns):
            # With the return and without it, in one pass.
            twice = block.repeat(2)
            known = Before(before.tokens[twice], before.mask[twice])
            with_return = (torch.arange(len(twice), device=seeds.device) < len(block)).to(returns.dtype)
            condition = self.return_condition(returns[twice], with_return)

            def epsilon(x: Tensor, k: int, condition: Tensor = condition, known: Before = known) -> Tensor:
                both = self.net.denoise(torch.cat([x, x]), condition, time_rows[k], before=known)
                guided, free = both.chunk(2)
                return free + guidance * (guided - free)

            found.append(walk_chain(coefficients, noise, epsilon)[:, 0])
        return torch.cat(found)[: len(seeds)]


def _embedding(numbers: int, width: int) -> nn.Sequential:
    """MTDiff's embedding of a step, without the LayerNorm before it: features are normalised, and one would undo it."""
    return mlp(numbers, (2 * width, 4 * width), width, nn.Mish)
