"""The context: what joins prompts and state into the noise network's condition.

One interface, `Context`: `encode` reads prompts once, `condition` turns states into the pair (state part, prompt part)
that the sampler takes. Nothing of it depends on the diffusion step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.features import FeatureKind, StateFeatures
from llmdpd.prompts.trajectory import TrajectoryEncoder, TrajectoryEncoderConfig, TrajectoryTokens


@dataclass(frozen=True)
class ContextConfig:
    """How prompts and state become the condition."""

    kind: Literal["pooled"] = "pooled"
    """`pooled` is the paper's: each prompt becomes one vector."""
    text: bool = True
    """Use the text prompt (off: the paper's ablation w/o-z_text)."""
    trajectory: bool = True
    """Use the trajectory prompt (off: the paper's ablation w/o-z_tau)."""
    text_dim: int = 128
    """Size of z_text."""
    text_hidden: int = 512
    """Hidden width of the text head, three layers with ReLU (the paper's)."""
    trajectory_dim: int = 128
    """Size of z_traj."""
    prompt_dropout: float = 0.0
    """Probability in training that a prompt, text and trajectory each on its own, is left out (a zero vector)."""
    features: FeatureKind = "normalised"
    """State features: `normalised`, or `metaworld` with relative positions beside."""
    encoder: TrajectoryEncoderConfig = field(default_factory=TrajectoryEncoderConfig)
    """The trajectory encoder."""


@dataclass(frozen=True)
class EncodedPrompts:
    """P prompts, read.

    pooled [P, Z]: the prompt vectors. steps [P, T, W] and tokens: the encoded and the raw steps of the trajectory
    prompts, for contexts that look things up in them; None where trajectories are off.
    """

    pooled: Tensor
    steps: Tensor | None = None
    tokens: TrajectoryTokens | None = None


class Condition(NamedTuple):
    """The noise network's condition: state part [B, F]; prompt part [Z] where one prompt serves all, else [B, Z]."""

    state: Tensor
    prompt: Tensor


class Context(nn.Module, ABC):
    """Joins prompts and state. `state_dim` and `prompt_dim` are the sizes of the condition's two parts."""

    state_dim: int
    prompt_dim: int
    features: StateFeatures

    @abstractmethod
    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None) -> EncodedPrompts:
        """Read P prompts: LLM embeddings [P, D], trajectory tokens of P prompts; None where there is none.

        Returns them encoded, `pooled` of it [P, Z]; Z is `prompt_dim`.
        """

    @abstractmethod
    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, clock: Tensor) -> Condition:
        """Observations [B, S] under prompts → the condition.

        index [B] says which prompt each state is under (None: all under the only one); clock [B] is the time step
        within the episode. F of the condition's state part is `state_dim`, Z of its prompt part `prompt_dim`.
        """


class PooledContext(Context):
    """The paper's context: z = [z_text, z_traj] (equations 1 and 3) beside the state features.

    Args:
        state_dim: S, of the observations.
        action_dim: A.
        embedding_dim: D, of the LLM's embeddings.
        config: sizes and switches.
    """

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: ContextConfig) -> None:
        super().__init__()
        self.config = config
        self.features = StateFeatures(state_dim, config.features)
        self.state_dim = self.features.output_dim
        self.prompt_dim = config.text * config.text_dim + config.trajectory * config.trajectory_dim
        self.text_head: nn.Module | None = None
        self.trajectory_encoder: TrajectoryEncoder | None = None
        if config.text:
            hidden = config.text_hidden
            self.text_head = nn.Sequential(
                nn.Linear(embedding_dim, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, config.text_dim),
            )
        if config.trajectory:
            self.trajectory_encoder = TrajectoryEncoder(
                self.state_dim, action_dim, config.trajectory_dim, config.encoder
            )

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None) -> EncodedPrompts:
        """Equations 1 and 3.

        Raises:
            InputError: a prompt missing that the policy has learned to rely on.
        """
        parts, steps = [], None
        if self.text_head is not None:
            parts.append(self._drop(self.text_head(text)) if text is not None else self._absent("text", tokens))
        if self.trajectory_encoder is not None:
            if tokens is None:
                parts.append(self._absent("trajectory", text))
            else:
                steps = self.trajectory_encoder.encode_steps(self.features(tokens.states), tokens)
                parts.append(self._drop(self.trajectory_encoder.pool(steps, tokens.mask)))
        pooled = torch.cat(parts, dim=-1) if parts else torch.zeros(1, 0, device=self.features.mean.device)
        return EncodedPrompts(pooled, steps, tokens)

    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, clock: Tensor) -> Condition:
        """The state's features and its prompt's vector; the pooled context has no use for the clock."""
        pooled = prompts.pooled
        single = index is None or pooled.shape[0] == 1
        return Condition(self.features(state), pooled[0] if single else pooled[index])

    def _drop(self, vectors: Tensor) -> Tensor:
        if not self.training or self.config.prompt_dropout == 0:
            return vectors
        keep = torch.rand(vectors.shape[0], 1, device=vectors.device) >= self.config.prompt_dropout
        return vectors * keep

    def _absent(self, which: Literal["text", "trajectory"], other: Tensor | TrajectoryTokens | None) -> Tensor:
        """The zero vector of a prompt that is left out; only a policy trained with prompt dropout knows it."""
        if self.config.prompt_dropout == 0:
            raise InputError(
                f"this policy was trained with a {which} prompt at every step",
                field=which,
                found="no prompt",
                expected=f"a {which} prompt",
                hint="train with prompt dropout to leave prompts out when acting",
            )
        tensor = other.states if isinstance(other, TrajectoryTokens) else other
        size = self.config.text_dim if which == "text" else self.config.trajectory_dim
        return torch.zeros(1 if tensor is None else tensor.shape[0], size, device=self.features.mean.device)


def make_context(state_dim: int, action_dim: int, embedding_dim: int, config: ContextConfig) -> Context:
    """The context that the config names."""
    return PooledContext(state_dim, action_dim, embedding_dim, config)
