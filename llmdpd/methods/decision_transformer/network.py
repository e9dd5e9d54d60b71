"""Decision Transformers: actions as the continuation of an episode, given the return that is asked for.

Chen et al. 2021 (arXiv 2106.01345); with a trajectory prompt before it, Xu et al. 2022 (arXiv 2206.13499).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig, check_one_draw
from llmdpd.nn.context import ALL_KEPT, EncodedPrompts, Keep
from llmdpd.nn.episode_memory import History
from llmdpd.nn.history_policy import HistoryPolicy
from llmdpd.nn.policy_network import PolicyConfig, Window
from llmdpd.nn.sequence_model import CausalTransformer, SequenceConfig
from llmdpd.prompts.demonstration import TrajectoryTokens


class DecisionTransformer(HistoryPolicy):
    """Tokens return-to-go, state, action of each step → GPT-2 → bound tanh of the state token's output: the action.

    Time steps are embedded and added to all three tokens of a step. States are read by the features that all methods
    have; returns are scaled by the greatest of the training data.

    Raises:
        InputError: see `check_sequence_policy`.
    """

    prompted = False
    """Whether it reads an example."""

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig) -> None:
        check_sequence_policy(config, self.prompted)
        # It reads its example itself, step by step: no encoder of the context's.
        bare = replace(config, context=replace(config.context, trajectory=False))
        super().__init__(state_dim, action_dim, embedding_dim, bare)
        self.config = config
        self._build(self.context.features.output_dim, action_dim, config)

    def _build(self, feature_dim: int, action_dim: int, config: PolicyConfig) -> None:
        """Make the networks: steps' embedding, norm of the tokens, transformer, head."""
        sizes = config.sequence
        self.embed: nn.Module = StepEmbedding(feature_dim, action_dim, sizes)
        self.norm: nn.Module = nn.LayerNorm(sizes.width)
        self.model = CausalTransformer(sizes.sizes, sizes.dropout)
        self.head: nn.Module = nn.Linear(sizes.width, action_dim)

    @property
    def history(self) -> int:
        """K, steps of the episode that it sees."""
        return self.config.sequence.context

    @property
    def window(self) -> Window:
        """As many steps as it sees."""
        return Window(self.history)

    def forward(
        self,
        returns: Tensor,
        states: Tensor,
        actions: Tensor,
        clock: Tensor,
        prompts: EncodedPrompts | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The action that each step of B windows calls for, from what lies before it → [B, T, A].

        Args:
            returns: [B, T], returns-to-go, as they are. states: [B, T, S]. actions: [B, T, A]. clock: [B, T].
            prompts: where it reads an example, P of them.
            index: [B], which prompt each window is under; None: P equal groups in order.
        """
        count, steps = returns.shape
        tokens, mask = self.norm(self._embedded(self.embed, returns, states, actions, clock)), None
        if prompts is not None and prompts.memory:
            before, given = prompts.memory["tokens"], prompts.memory["mask"]
            if index is None:
                before, given = (part.repeat_interleave(count // len(part), 0) for part in (before, given))
            else:
                before, given = before[index], given[index]
            tokens = torch.cat([before, tokens], dim=1)
            mask = torch.cat([given, given.new_ones(count, 3 * steps)], dim=1)
        hidden = self.model(tokens, mask)[:, -3 * steps :]
        # Of each step the state's token, which has not seen the action yet.
        return self._actions(hidden[:, 1::3])

    def check_acting(self, acting: ActingConfig) -> None:
        """Raise `InputError` for ways of acting that a policy without diffusion does not have."""
        check_one_draw(acting)

    def draw(
        self, history: History, prompts: EncodedPrompts, index: Tensor | None, acting: ActingConfig, seeds: Tensor
    ) -> Tensor:
        """The action of the present step of B episodes → [B, A]; there is nothing random in it."""
        found = self(history.returns, history.states, history.actions, history.clock, prompts, index)
        present = (history.lengths - 1)[:, None, None].expand(-1, 1, found.shape[-1])
        actions: Tensor = found.gather(1, present)[:, 0]
        return actions

    def _actions(self, hidden: Tensor) -> Tensor:
        """The actions [B, T, A] of the state tokens' outputs [B, T, W]."""
        return self.config.action_bound * torch.tanh(self.head(hidden))

    def _embedded(self, embed: nn.Module, returns: Tensor, states: Tensor, actions: Tensor, clock: Tensor) -> Tensor:
        tokens: Tensor = embed(returns / self.return_scale, self.context.features(states), actions, clock)
        return tokens


class StepEmbedding(nn.Module):
    """Steps as tokens: return-to-go, state features, action, to each of which the time step's embedding is added."""

    def __init__(self, feature_dim: int, action_dim: int, config: SequenceConfig) -> None:
        super().__init__()
        self.returns, self.actions = nn.Linear(1, config.width), nn.Linear(action_dim, config.width)
        self.states = nn.Linear(feature_dim, config.width)
        self.time = nn.Embedding(config.longest, config.width)

    def forward(self, returns: Tensor, features: Tensor, actions: Tensor, clock: Tensor) -> Tensor:
        """Returns [B, T], features [B, T, F], actions [B, T, A], time steps [B, T] → tokens [B, 3 T, W], by step."""
        time = self.time(clock.long().clamp(0, self.time.num_embeddings - 1))
        parts = (self.returns(returns[..., None]), self.states(features), self.actions(actions))
        return torch.stack([part + time for part in parts], dim=2).flatten(1, 2)


class PromptDecisionTransformer(DecisionTransformer):
    """The same with an example's steps before the episode's (Prompt-DT), by an embedding of their own."""

    prompted = True
    reads_rewards = True

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig) -> None:
        super().__init__(state_dim, action_dim, embedding_dim, config)
        self.embed_prompt = StepEmbedding(self.context.features.output_dim, action_dim, config.sequence)

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        """Embed the steps of P examples.

        Raises:
            InputError: one without rewards, since its returns-to-go are part of what is read; or none, where training
                left none out.
        """
        if tokens is None and self.config.context.trajectory_dropout > 0:
            return EncodedPrompts(torch.zeros(1, 0, device=self.return_scale.device))
        if tokens is None or tokens.returns is None:
            raise InputError(
                "a Prompt Decision Transformer reads an example with its rewards",
                field="trajectory",
                found="no example" if tokens is None else "observations and actions alone",
                expected="an example with rewards (llmdpd.data.Trajectory)",
                hint="train with --policy.context.trajectory-dropout to leave it out when acting",
            )
        embedded = self._embedded(self.embed_prompt, tokens.returns, tokens.states, tokens.actions, tokens.times)
        mask = tokens.mask.repeat_interleave(3, dim=1)
        if keep.trajectory is not None:
            mask = mask & (keep.trajectory > 0)
        pooled = embedded.new_zeros(len(embedded), 0)
        return EncodedPrompts(pooled, {"tokens": embedded, "mask": mask})


def check_sequence_policy(config: PolicyConfig, prompted: bool) -> None:
    """Raise `InputError` for chunks, text prompts, another context than pooled; for an example to `dt`, or none."""
    if config.context.kind != "pooled":
        found = config.context.kind
        raise InputError(
            "sequence models look things up by themselves", field="policy.context.kind", found=found, expected="pooled"
        )
    if config.chunk != 1:
        raise InputError("only policy diffusion has chunks", field="policy.chunk", found=config.chunk, expected=1)
    if config.context.text:
        raise InputError("Decision Transformers read no text", field="policy.context.text", found=True, expected=False)
    if config.context.trajectory is not prompted:
        raise InputError(
            "prompt-dt reads an example, dt none",
            field="policy.context.trajectory",
            found=config.context.trajectory,
            expected=prompted,
        )
