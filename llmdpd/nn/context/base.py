"""The context: what joins prompts and state into the noise network's condition.

One interface, `Context`: `encode` reads prompts once, `condition` turns states into the pair (state part, prompt part)
that the sampler takes. Nothing of it depends on the diffusion step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.nn.feature_table import feature_tables
from llmdpd.nn.features import FeatureKind, StateFeatures
from llmdpd.nn.layers import mlp
from llmdpd.nn.spaces import Spaces
from llmdpd.nn.trajectory_encoder import TrajectoryEncoder
from llmdpd.ops.packing import ContextParts, pack_prompts
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, TrajectoryTokens, joined
from llmdpd.utils.bounds import Fraction, Layers, SharedByHeads, Width


@dataclass(frozen=True)
class RetrievalConfig(SharedByHeads):
    """The four parts of the retrieval context that can be switched, and their sizes."""

    former: ClassVar[Mapping[str, str]] = {"likeness": "geometric_similarity", "clock": "timestep_embedding"}

    attention: bool = True
    """Attention from the state to the encoded steps of the demonstration."""
    waypoints: bool = True
    """Attention whose values are raw: the demonstrated action, and how far the state is from the demonstrated ones."""
    geometric_similarity: bool = True
    """Retrieve waypoints by geometric similarity too, each number of the geometry at a scale that a head learns."""
    timestep_embedding: bool = True
    """Embed the time step, of the state and of every step of the demonstration."""
    layers: Layers = 2
    """Attention layers, each with a feed-forward of twice the width."""
    heads: Width = 4
    """Heads of each attention layer, and of the waypoints' retrieval."""
    width: Width = 128
    """Width of the attention layers."""
    lookahead: tuple[int, ...] = (0, 2)
    """Steps of the (subsampled) demonstration after the retrieved one whose geometry is looked up too."""

    def check(self) -> None:
        """Raise `InputError` for a width that the heads cannot share evenly, and for no step to look up."""
        super().check()
        if not self.lookahead or min(self.lookahead) < 0:
            raise InputError(
                "the retrieval context looks ahead",
                field="lookahead",
                found=self.lookahead,
                expected="one or more numbers of steps, none below 0",
            )


@dataclass(frozen=True)
class ContextConfig:
    """How prompts and state become the condition."""

    kind: Literal["pooled", "retrieval"] = "pooled"
    """`pooled` is the paper's: each prompt becomes one vector. `retrieval` also attends to single steps."""
    text: bool = True
    """Use the text prompt (off: the paper's ablation w/o-z_text)."""
    trajectory: bool = True
    """Use the trajectory prompt (off: the paper's ablation w/o-z_tau)."""
    text_dim: Width = 128
    """Size of z_text."""
    text_hidden: Width = 512
    """Hidden width of the text head, three layers with ReLU (the paper's)."""
    trajectory_dim: Width = 128
    """Size of z_traj."""
    text_dropout: Fraction = 0.0
    """Probability in training that a task's text is left out (a zero vector)."""
    trajectory_dropout: Fraction = 0.0
    """Probability in training that a task's demonstration is left out."""
    features: FeatureKind = "normalised"
    """State features: `normalised`, `combined` with relative positions beside, `relative`, those alone, or `raw`,
    observations as they are. The middle two need a layout; `metaworld` is the former name of `combined`."""
    encoder: TrajectoryEncoderConfig = field(default_factory=TrajectoryEncoderConfig)
    """The trajectory encoder."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """The retrieval context's own parts."""


@dataclass(frozen=True)
class EncodedPrompts:
    """P prompts, read.

    pooled [P, Z]: the prompt vectors. memory: what a context that looks things up keeps of the P demonstrations,
    tensors [P, …] by name; empty for others.
    """

    pooled: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pooled)


class Condition(NamedTuple):
    """The noise network's condition: state part [B, F]; prompt part [Z] where one prompt serves all, else [B, Z]."""

    state: Tensor
    prompt: Tensor

    def joined(self) -> Tensor:
        """Both parts side by side [B, F + Z]."""
        return torch.cat([self.state, self.prompt.expand(len(self.state), -1)], dim=-1)

    def detached(self) -> Condition:
        """The condition without its gradient: critics do not train the policy's encoders."""
        return Condition(self.state.detach(), self.prompt.detach())


@dataclass(frozen=True)
class Keep:
    """Which of P prompts are given, float [P, 1] of zeros and ones: prompt dropout; None where all are."""

    text: Tensor | None = None
    trajectory: Tensor | None = None


ALL_KEPT = Keep()


class Context(nn.Module, ABC):
    """Joins prompts and state. `state_dim` and `prompt_dim` are the sizes of the condition's two parts.

    Every context reads the text by equation 1 and pools the demonstration by equation 3; what else it does with that is
    its own.

    Args:
        spaces: see `Spaces`.
        config: sizes and switches.
    """

    retrieves = False
    """Whether it retrieves waypoints from its demonstration, whose `weights` can be shown."""

    def __init__(self, spaces: Spaces, config: ContextConfig) -> None:
        super().__init__()
        self.config = config
        self.features = StateFeatures(spaces.state_dim, config.features, spaces.layout)
        self.state_dim = self.features.output_dim
        self.prompt_dim = config.text * config.text_dim + config.trajectory * config.trajectory_dim
        self.text_head: nn.Module | None = None
        self.trajectory_encoder: TrajectoryEncoder | None = None
        if config.text:
            hidden = config.text_hidden
            self.text_head = mlp(spaces.embedding_dim, (hidden, hidden), config.text_dim)
        if config.trajectory:
            self.trajectory_encoder = TrajectoryEncoder(
                self.features.output_dim, spaces.action_dim, config.trajectory_dim, config.encoder
            )

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        """Read P prompts: LLM embeddings [P, D], trajectory tokens of P prompts; None where there is none.

        Of several demonstrations of a prompt each is encoded by itself, as in training; their vectors are averaged.

        Returns them encoded, `pooled` of it [P, Z]; Z is `prompt_dim`.

        Raises:
            InputError: a prompt missing that the policy has learned to rely on.
        """
        parts: list[Tensor] = []
        steps = None
        if self.text_head is not None:
            vector = self._absent("text", tokens) if text is None else self.text_head(text)
            parts.append(vector if keep.text is None else vector * keep.text)
        if self.trajectory_encoder is not None:
            if tokens is None:
                parts.append(self._absent("trajectory", text))
            else:
                steps = self.trajectory_encoder.encode_steps(self.features(tokens.states), tokens)
                vector = self.trajectory_encoder.pool(steps, tokens.mask)
                if tokens.counts:
                    vector, steps, tokens = self._together(vector, steps, tokens)
                parts.append(vector if keep.trajectory is None else vector * keep.trajectory)
        pooled = torch.cat(parts, dim=-1) if parts else torch.zeros(1, 0, device=self.features.mean.device)
        return EncodedPrompts(pooled, self.remember(pooled, steps, tokens, keep.trajectory))

    def _together(
        self, vectors: Tensor, steps: Tensor, tokens: TrajectoryTokens
    ) -> tuple[Tensor, Tensor, TrajectoryTokens]:
        """Demonstrations, each read by itself, as P prompts: the mean of a prompt's vectors, its steps in a row."""
        means = torch.stack([part.mean(0) for part in vectors.split(list(tokens.counts))])
        return means, joined(steps, tokens.counts), tokens.together()

    def remember(
        self, pooled: Tensor, steps: Tensor | None, tokens: TrajectoryTokens | None, given: Tensor | None
    ) -> dict[str, Tensor]:
        """What `condition` needs of the demonstrations beside their vectors, computed once a prompt.

        pooled [P, Z]; steps [P, T, W] encoded and tokens raw, None without demonstrations; given [P, 1], see `Keep`.
        """
        return {}

    @abstractmethod
    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, steps: Tensor) -> Condition:
        """Observations [B, S] under prompts → the condition.

        index [B] says which prompt each state is under; None: the states lie in P equal groups, one a prompt, in
        order. steps [B] are the time steps within the episode. F of the condition's state part is `state_dim`, Z of its
        prompt part `prompt_dim`.
        """

    def parts(self, prompts: EncodedPrompts) -> ContextParts | None:
        """This context and P prompts for what computes outside torch; None where nothing else can compute it."""
        return None

    def packed(self, prompts: EncodedPrompts) -> Any | None:
        """This context and P prompts packed for the C++ code (`llmdpd.ops.packing`); None where it has none of it."""
        parts = self.parts(prompts)
        return None if parts is None else pack_prompts(parts)

    def weights(self, state: Tensor, prompts: EncodedPrompts, time: Tensor) -> Tensor:
        """The waypoint heads' weights on the one demonstration's steps, [B, heads, T + 1]; the last for none of them.

        Raises:
            ValueError: a context without waypoints.
        """
        raise ValueError("this context retrieves no waypoints")

    def _absent(self, which: Literal["text", "trajectory"], other: Tensor | TrajectoryTokens | None) -> Tensor:
        """The zero vector of a prompt that is left out; only a policy trained with prompt dropout knows it."""
        check_left_out(self.config, which)
        if isinstance(other, TrajectoryTokens):
            prompts = len(other.counts) or len(other.states)
        else:
            prompts = 1 if other is None else len(other)
        size = self.config.text_dim if which == "text" else self.config.trajectory_dim
        return torch.zeros(prompts, size, device=self.features.mean.device)


def check_left_out(config: ContextConfig, which: Literal["text", "trajectory"]) -> None:
    """Refuse to act without a prompt that the policy was trained with at every step.

    Raises:
        InputError: no dropout of it in training.
    """
    if (config.text_dropout if which == "text" else config.trajectory_dropout) == 0:
        raise InputError(
            f"this policy was trained with a {which} prompt at every step",
            field=which,
            found="no prompt",
            expected=f"a {which} prompt",
            hint=f"train with --method.network.context.{which}-dropout to leave it out when acting",
        )


class PooledContext(Context):
    """The paper's: z = [z_text, z_traj] (equations 1 and 3) beside the state features; see `Context`."""

    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, steps: Tensor) -> Condition:
        """The state's features and its prompt's vector, whatever the time step."""
        features, pooled = self.features(state), prompts.pooled
        return Condition(features, pooled[0] if len(pooled) == 1 else spread(pooled, index, len(features)))

    def parts(self, prompts: EncodedPrompts) -> ContextParts:
        # The demonstration's actions are of no use to it: one number of any.
        return ContextParts(self.features.state_dim, 1, *feature_tables(self.features), prompts.pooled)


def spread(vectors: Tensor, index: Tensor | None, batch: int) -> Tensor:
    """Each prompt's part [P, …] for each of its states [B, …]; see `Context.condition` for `index`."""
    return vectors.repeat_interleave(batch // len(vectors), 0) if index is None else vectors[index]
