"""Decision Transformers: cloning of the executed actions as the continuation of an episode, given the target return.

Chen et al. 2021 (arXiv 2106.01345); with a trajectory prompt before it, Prompt-DT: Xu et al. 2022 (arXiv 2206.13499).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.methods.base import Method, Start, UnaveragedConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.config import NetworkConfig
from llmdpd.nn.context import ALL_KEPT, ContextConfig, EncodedPrompts, Keep, spread
from llmdpd.nn.episode_memory import History
from llmdpd.nn.features import FeatureKind
from llmdpd.nn.history_policy import DemonstrationConfig, HistoryPolicy, check_one_demonstration
from llmdpd.nn.policy_network import PolicyNetwork, Window
from llmdpd.nn.sequence_model import CausalTransformer, SequenceConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.prompts.demonstration import TrajectoryTokens
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Count, Fraction, NonNegative, WholeNumber


@dataclass(frozen=True)
class DecisionTransformerConfig(NetworkConfig):
    """A Decision Transformer, which reads no prompts."""

    features: FeatureKind = "normalised"
    """State features; see the context of policy diffusion."""
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    """The sequence model."""

    def context_config(self) -> ContextConfig:
        return ContextConfig("pooled", text=False, trajectory=False, features=self.features)


@dataclass(frozen=True)
class PromptDecisionTransformerConfig(DecisionTransformerConfig):
    """A Decision Transformer that reads a demonstration."""

    reads_several = False

    demonstration: DemonstrationConfig = field(default_factory=DemonstrationConfig)
    """How the demonstration is cut."""
    trajectory_dropout: Fraction = 0.0
    """Probability in training that a task's demonstration is left out."""

    def context_config(self) -> ContextConfig:
        return self.demonstration.context(self.features, self.trajectory_dropout)


class DecisionTransformer(HistoryPolicy):
    """Tokens return-to-go, state, action of each step → GPT-2 → bound tanh of the state token's output: the action.

    Time steps are embedded and added to all three tokens of a step. States are read by the features that all methods
    have; returns are scaled by the greatest of the training data.
    """

    config: Any
    prompted = False
    """Whether it reads a demonstration."""
    heads: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, spaces: Spaces, config: Any) -> None:
        super().__init__(spaces, config)
        self.memory_length: int = config.sequence.context
        self.window = Window(self.memory_length)
        self._build(self.context.features.output_dim, spaces.action_dim, config)

    def _build(self, feature_dim: int, action_dim: int, config: Any) -> None:
        """Make the networks: steps' embedding, norm of the tokens, transformer, head."""
        sizes = config.sequence
        self.embed: nn.Module = StepEmbedding(feature_dim, action_dim, sizes)
        self.norm: nn.Module = nn.LayerNorm(sizes.width)
        self.model: nn.Module = CausalTransformer(sizes.sizes, sizes.dropout)
        self.head: nn.Module = nn.Linear(sizes.width, action_dim)

    def forward(
        self,
        returns: Tensor,
        states: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        prompts: EncodedPrompts | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The action that each step of B windows calls for, from what lies before it → [B, T, A].

        Args:
            returns: [B, T], returns-to-go, as they are. states: [B, T, S]. actions: [B, T, A]. timesteps: [B, T].
            prompts: where it reads a demonstration, P of them.
            index: [B], which prompt each window is under; None: P equal groups in order.
        """
        count, steps = returns.shape
        tokens, mask = self.norm(self._embedded(self.embed, returns, states, actions, timesteps)), None
        if prompts is not None and prompts.memory:
            before, given = (spread(prompts.memory[name], index, count) for name in ("tokens", "mask"))
            tokens = torch.cat([before, tokens], dim=1)
            mask = torch.cat([given, given.new_ones(count, 3 * steps)], dim=1)
        hidden = self.model(tokens, mask)[:, -3 * steps :]
        # Of each step the state's token, which has not seen the action yet.
        return self._actions(hidden[:, 1::3])

    def action(
        self, history: History, prompts: EncodedPrompts, index: Tensor | None, acting: ActingConfig, seeds: Tensor
    ) -> Tensor:
        """The action of the present step of B episodes, [B, A]; there is nothing random in it."""
        found = self(history.returns, history.states, history.actions, history.timesteps, prompts, index)
        present = (history.lengths - 1)[:, None, None].expand(-1, 1, found.shape[-1])
        actions: Tensor = found.gather(1, present)[:, 0]
        return actions

    def _actions(self, hidden: Tensor) -> Tensor:
        """The actions [B, T, A] of the state tokens' outputs [B, T, W]."""
        return self.config.action_bound * torch.tanh(self.head(hidden))

    def _embedded(self, embed: nn.Module, returns: Tensor, states: Tensor, *others: Tensor) -> Tensor:
        tokens: Tensor = embed(returns / self.return_scale, self.context.features(states), *others)
        return tokens


class StepEmbedding(nn.Module):
    """Steps as tokens: return-to-go, state features, action, to each of which the time step's embedding is added."""

    def __init__(self, feature_dim: int, action_dim: int, config: SequenceConfig) -> None:
        super().__init__()
        self.returns, self.actions = nn.Linear(1, config.width), nn.Linear(action_dim, config.width)
        self.states = nn.Linear(feature_dim, config.width)
        self.time = nn.Embedding(config.longest, config.width)

    def forward(self, returns: Tensor, features: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Returns [B, T], features [B, T, F], actions [B, T, A], time steps [B, T] → tokens [B, 3 T, W], by step."""
        time = self.time(timesteps.long().clamp(0, self.time.num_embeddings - 1))
        parts = (self.returns(returns[..., None]), self.states(features), self.actions(actions))
        return torch.stack([part + time for part in parts], dim=2).flatten(1, 2)


class PromptDecisionTransformer(DecisionTransformer):
    """The same with a demonstration's steps before the episode's (Prompt-DT), by an embedding of their own."""

    prompted = True
    reads_rewards = True

    def __init__(self, spaces: Spaces, config: PromptDecisionTransformerConfig) -> None:
        super().__init__(spaces, config)
        self.embed_prompt = StepEmbedding(self.context.features.output_dim, spaces.action_dim, config.sequence)

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        """Embed the steps of P demonstrations.

        Raises:
            InputError: one without rewards, since its returns-to-go are part of what is read; or none, where training
                left none out.
        """
        if tokens is None and self.reads.trajectory_dropout > 0:
            return EncodedPrompts(torch.zeros(1, 0, device=self.return_scale.device))
        if tokens is None or tokens.returns is None:
            raise InputError(
                "a Prompt Decision Transformer reads a demonstration with its rewards",
                field="trajectory",
                found="no demonstration" if tokens is None else "observations and actions alone",
                expected="a demonstration with rewards (llmdpd.data.Trajectory)",
                hint="train with --method.network.trajectory-dropout to leave it out when acting",
            )
        check_one_demonstration(tokens)
        embedded = self._embedded(self.embed_prompt, tokens.returns, tokens.states, tokens.actions, tokens.times)
        mask = tokens.mask.repeat_interleave(3, dim=1)
        if keep.trajectory is not None:
            mask = mask & (keep.trajectory > 0)
        pooled = embedded.new_zeros(len(embedded), 0)
        return EncodedPrompts(pooled, {"tokens": embedded, "mask": mask})


@dataclass(frozen=True)
class DTConfig(UnaveragedConfig):
    """Learning of Decision Transformers: its published settings for Gym, with a shorter warm-up."""

    name = "dt"
    legacy: ClassVar[Mapping[str, str]] = {"dt": "method."}

    network: DecisionTransformerConfig = field(default_factory=DecisionTransformerConfig)
    acting: ActingConfig = field(default_factory=ActingConfig)
    batch_size: Count = 64
    """Windows an iteration."""
    prompts_per_batch: Count = 8
    """Tasks in a batch, each with its own share of the windows."""
    lr: NonNegative = 1e-4
    """Learning rate."""
    lr_warmup: WholeNumber = 500
    """Iterations of linear warm-up."""
    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay (AdamW)."""
    grad_clip: NonNegative = 0.25
    """Bound on the norm of the gradient."""

    @classmethod
    def from_preset(cls, start: Start) -> DTConfig:
        own, network = cls(), start.diffusion.network
        network = replace(own.network, action_bound=network.action_bound, features=network.context.features)
        if isinstance(network, PromptDecisionTransformerConfig):
            trim = start.diffusion.network.context.encoder.trim
            network = replace(network, demonstration=replace(network.demonstration, trim=trim))
        return replace(own, network=network)


@dataclass(frozen=True)
class PromptDTConfig(DTConfig):
    """Prompt-DT: the same with a demonstration's last five steps before the episode's."""

    name = "prompt-dt"

    network: PromptDecisionTransformerConfig = field(default_factory=PromptDecisionTransformerConfig)


class DT(Method[DecisionTransformer, DTConfig]):
    """Regression of the executed actions on returns-to-go, states and the actions before."""

    Config: ClassVar[type[DTConfig]] = DTConfig
    network_class: ClassVar[type[PolicyNetwork]] = DecisionTransformer

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step."""
        self.policy.train()
        loss = cloning_loss(self.policy, batch)
        norm = self.step("policy", loss)
        return {"loss/cloning": loss.detach(), "grad/policy": norm}


class PromptDT(DT):
    """The same, read after a demonstration."""

    Config = PromptDTConfig
    network_class = PromptDecisionTransformer


def cloning_loss(policy: DecisionTransformer, batch: PromptedBatch) -> Tensor:
    """Mean squared error of the actions of all steps of the windows, those past an episode's end left out."""
    windows = batch.windows
    assert windows is not None, "the sampler was made with the model's context"
    steps = torch.arange(windows.mask.shape[1], device=windows.mask.device)
    timesteps = batch.timesteps[:, None] + steps
    prompts = policy.encode(batch.text, batch.tokens, batch.keep) if policy.prompted else None
    found = policy(windows.returns, windows.states, windows.actions, timesteps, prompts)
    error = (found - windows.actions).square().mean(-1)
    return (error * windows.mask).sum() / sharding.mean(windows.mask.sum())
