"""MTDiff-p (He et al. 2023): actions to come, diffused under a demonstration, the last states and the return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.diffusion.on_device import coefficient_tensors
from llmdpd.diffusion.reference import walk_chain
from llmdpd.errors import InputError
from llmdpd.methods.base import Method, OfflineConfig, Start
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.acting import ChainActing
from llmdpd.nn.config import ChainConfig
from llmdpd.nn.context import ALL_KEPT, ContextConfig, EncodedPrompts, Keep, spread
from llmdpd.nn.episode_memory import History
from llmdpd.nn.features import FeatureKind
from llmdpd.nn.history_policy import DemonstrationConfig, HistoryPolicy, check_one_demonstration
from llmdpd.nn.layers import mlp
from llmdpd.nn.policy_network import Window
from llmdpd.nn.spaces import Spaces
from llmdpd.nn.trajectory_denoiser import Before, TrajectoryConfig, TrajectoryDenoiser, noise_blocks
from llmdpd.prompts.demonstration import TrajectoryTokens
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, Count, Fraction, NonNegative, Steps, WholeNumber
from llmdpd.utils.sharding import rand, randint, randn


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

    former: ClassVar[Mapping[str, str]] = {"plan": "trajectory"}
    reads_several = False

    diffusion_steps: Annotated[int, Bounds(1, 10_000)] = 200
    """K, steps of the diffusion chain."""
    features: FeatureKind = "normalised"
    """State features; see the context of policy diffusion."""
    demonstration: DemonstrationConfig = field(default_factory=lambda: DemonstrationConfig(20, "window"))
    """How the demonstration is cut."""
    trajectory_dropout: Fraction = 0.0
    """Probability in training that a task's demonstration is left out."""
    trajectory: MTDiffTrajectoryConfig = field(default_factory=MTDiffTrajectoryConfig)
    """What is denoised in place of an action, and the transformer that does it."""

    def context_config(self) -> ContextConfig:
        return self.demonstration.context(self.features, self.trajectory_dropout)


class MTDiffPolicy(HistoryPolicy):
    """p(a_t … a_{t+H-1} | demonstration, s_{t-1}, s_t, R): a token for each of its steps, a state, an action to come.

    The denoiser is that of trajectories (`TrajectoryDenoiser`), which is not causal; its condition is the return, or
    that none is given. States are read by the features that all methods have; returns are scaled by the data's.
    """

    config: MTDiffNetworkConfig
    alpha_bar: Tensor
    heads = ("net.head",)

    def __init__(self, spaces: Spaces, config: MTDiffNetworkConfig) -> None:
        super().__init__(spaces, config)
        self.memory_length = config.trajectory.history
        self.window = Window(config.trajectory.horizon, config.trajectory.history - 1)
        self.register_buffer("alpha_bar", config.alpha_bar(), persistent=False)
        action_dim = spaces.action_dim
        features, width = self.context.features.output_dim, config.trajectory.width
        # The condition: the return and whether one is given; no prompt vector.
        self.net = TrajectoryDenoiser(action_dim, 2, 0, config.time_dim, config.trajectory)
        self.embed_example = _embedding(features + action_dim, width)
        self.embed_state = _embedding(features, width)
        self.example_position = nn.Parameter(0.02 * torch.randn(config.demonstration.steps, width))
        self.state_position = nn.Parameter(0.02 * torch.randn(config.trajectory.history, width))

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        """Embed the steps of P demonstrations.

        Raises:
            InputError: no demonstration, where training left none out.
        """
        if tokens is None:
            if not self.config.trajectory_dropout:
                raise InputError(
                    "MTDiff reads a demonstration", field="trajectory", found="none", expected="a demonstration"
                )
            return EncodedPrompts(torch.zeros(1, 0, device=self.return_scale.device))
        check_one_demonstration(tokens)
        embedded = self.embed_example(torch.cat([self.context.features(tokens.states), tokens.actions], dim=-1))
        embedded = embedded + self.example_position[: embedded.shape[1]]
        mask = tokens.mask
        if keep.trajectory is not None:
            mask = mask & (keep.trajectory > 0)
        return EncodedPrompts(embedded.new_zeros(len(embedded), 0), {"tokens": embedded, "mask": mask})

    def before(self, states: Tensor, given: Tensor, prompts: EncodedPrompts, index: Tensor | None) -> Before:
        """What stands before the actions to come of B episodes: their demonstration's steps, then the last states.

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
        coefficients, guidance = acting.coefficients(self.config), self.config.trajectory.guidance
        time_rows = self.net.time_rows(coefficient_tensors(coefficients.content, seeds.device)[0])
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


@dataclass(frozen=True)
class MTDiffConfig(OfflineConfig):
    """Learning of MTDiff-p: its published settings. Five steps of DDIM walk its chain."""

    name = "mtdiff"
    legacy: ClassVar[Mapping[str, str]] = {"mtdiff": "method."}

    network: MTDiffNetworkConfig = field(default_factory=MTDiffNetworkConfig)
    acting: ChainActing = field(default_factory=lambda: ChainActing(sampler="ddim", steps=5))
    lr: NonNegative = 2e-4
    """Learning rate."""
    ema_every: Count = 10
    """Iterations from one EMA update to the next."""
    ema_start: WholeNumber = 2000
    """Iteration from which the EMA averages; before it copies."""
    first_action_weight: NonNegative = 10.0
    """Weight in the loss of the first of the actions to come, the one that is executed; the others have 1."""
    return_probability: Fraction = 0.8
    """Probability in training that the return is given; without it the network learns what guidance goes away from."""

    @classmethod
    def from_preset(cls, start: Start) -> MTDiffConfig:
        preset = start.diffusion
        network = MTDiffNetworkConfig(
            action_bound=preset.network.action_bound,
            time_dim=preset.network.time_dim,
            schedule=preset.network.schedule,
            features=preset.network.context.features,
            demonstration=DemonstrationConfig(20, "window", preset.network.context.encoder.trim),
            trajectory=MTDiffTrajectoryConfig.sized(start.small),
        )
        # Published: 16 windows a prompt.
        prompts = preset.prompts_per_batch
        return cls(network=network, batch_size=16 * prompts, prompts_per_batch=prompts)


class MTDiff(Method[MTDiffPolicy, MTDiffConfig]):
    """Denoising of the executed actions to come."""

    Config = MTDiffConfig
    network_class = MTDiffPolicy

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step."""
        if not self.policy.training:
            self.policy.train()
        loss, first_action = self.loss(batch)
        norm = self.step("policy", loss)
        return {"loss/diffusion": loss.detach(), "loss/first_action": first_action.detach(), "grad/policy": norm}

    def loss(self, batch: PromptedBatch) -> tuple[Tensor, Tensor]:
        """Huber loss (delta 1) of the noise in the actions to come, k uniform in 1 … K.

        Steps after the episode's end count nothing.

        Returns:
            The weighted mean over the numbers of all sequences, and the plain mean over the first actions'.
        """
        windows, policy = batch.windows, self.policy
        assert windows is not None, "the sampler was made with the sequence's horizon"
        shown = policy.memory_length
        clean, mask = windows.actions[:, shown - 1 :], windows.mask[:, shown - 1 :]
        prompts = self.encode(batch)
        before = policy.before(windows.states[:, :shown], windows.mask[:, :shown], prompts, None)
        given = (rand((len(clean),), clean.device) < self.config.return_probability).to(clean.dtype)
        condition = policy.return_condition(windows.returns[:, shown - 1], given)
        timesteps = randint(len(policy.alpha_bar), (len(clean),), clean.device)
        noise, level = randn(clean.shape, clean.device), policy.alpha_bar[timesteps, None, None]
        noisy = level.sqrt() * torch.where(mask[..., None], clean, 0.0) + (1 - level).sqrt() * noise
        predicted = policy.net.denoise(noisy, condition, policy.net.time_rows(timesteps), mask, before)
        error = F.huber_loss(predicted, noise, reduction="none", delta=1.0)
        weight = mask[..., None].to(clean.dtype).expand_as(clean).clone()
        weight[:, 0] *= self.config.first_action_weight
        return (weight * error).sum() / sharding.mean(weight.sum()), error[:, 0].mean()
